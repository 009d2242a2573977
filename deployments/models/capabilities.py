"""What a model can do, by the arguments of its application; and how vLLM says that a model cannot.

The arguments of an application say what its engine can do. The settings of the gateway may say it as well
(`models.NAME.capabilities`), and replace what follows from the arguments. A capability of which neither says anything
is assumed, except for those in ASSUMED_ABSENT.
"""

import re
from collections.abc import Collection, Mapping

from deployments.errors import ApiError
from deployments.model_settings import CapabilitySettings, ModelSettings
from deployments.models.handle import Body
from deployments.models.report import ModelError
from policies.capabilities import Capability

CODE = "unsupported_parameter"  # OpenAI's
# what few models can do, so that a model of which nothing is known is not asked for it
ASSUMED_ABSENT = frozenset({Capability.IMAGES, Capability.AUDIO, Capability.VIDEO})
# sources of models that call tools in a way of their own, which vLLM knows without these arguments
OWN_WAY = re.compile(r"gpt[-_]?oss|mistral|magistral|devstral|ministral", re.I)
# of these also the thinking comes apart without an argument
HARMONY = re.compile(r"gpt[-_]?oss", re.I)
# vLLM's names of the kinds of media
MODALITIES: Mapping[Capability, str] = {
    Capability.IMAGES: "image",
    Capability.AUDIO: "audio",
    Capability.VIDEO: "video",
}
TOOL_ARGUMENTS = ("enable_auto_tool_choice", "tool_call_parser")
TOOL_CAPABILITIES = (
    Capability.TOOLS,
    Capability.FORCED_TOOLS,
    Capability.PARALLEL_TOOLS,
)
# OpenAI's parameters that models without the capability do not get
HINTS: Mapping[str, Capability] = {"reasoning_effort": Capability.THINKING}
Known = Mapping[Capability, bool]
# arguments of an engine that give a capability, for the messages of the configuration check
ARGUMENTS: Mapping[Capability, str] = {
    **dict.fromkeys(TOOL_CAPABILITIES, " and ".join(TOOL_ARGUMENTS)),
    Capability.LOGPROBS: "max_logprobs above 0",
    **{
        medium: f"limit_mm_per_prompt with {modality}"
        for medium, modality in MODALITIES.items()
    },
    Capability.THINKING: "reasoning_parser",
    Capability.VLLM_PARAMETERS: "llm_engine vLLM",
    Capability.JSON_OBJECT: "a runner that generates",
    Capability.JSON_SCHEMA: "a runner that generates",
}
# what vLLM answers for want of a capability, and the parameter at fault
VLLM_CANNOT: tuple[tuple[re.Pattern[str], Capability, str], ...] = (
    (
        re.compile(r"requires .*--tool-call-parser to be set"),
        Capability.TOOLS,
        "tools",
    ),
    *(
        (
            re.compile(rf"At most 0 {name}|'{name}' requires a multimodal processor"),
            medium,
            "messages",
        )
        for medium, name in MODALITIES.items()
    ),
    (re.compile(r"not a multimodal model"), Capability.IMAGES, "messages"),
    (
        re.compile(r"thinking_token_budget is set but"),
        Capability.THINKING,
        "thinking_token_budget",
    ),
    (
        re.compile(r"logprobs of -?\d+, which is greater than max allowed"),
        Capability.LOGPROBS,
        "logprobs",
    ),
    (
        re.compile(r"Structured outputs are not yet supported"),
        Capability.JSON_SCHEMA,
        "response_format",
    ),
    (
        re.compile(r"sampling parameters\s+are not yet supported"),
        Capability.VLLM_PARAMETERS,
        "min_p",
    ),
)


def of_application(args: Mapping[str, object]) -> Known:
    """What is known of a model's capabilities.

    Args:
        args: of the model's application in serve_config.yaml. Without engine arguments nothing is known.
    """
    engine = args.get("engine_kwargs")
    if not isinstance(engine, Mapping):
        return {}
    if str(args.get("llm_engine", "vLLM")) != "vLLM":
        return {Capability.VLLM_PARAMETERS: False}
    if engine.get("runner") == "pooling":
        return dict.fromkeys(Capability, False)
    known = {
        Capability.VLLM_PARAMETERS: True,
        Capability.JSON_OBJECT: True,
        Capability.JSON_SCHEMA: True,
        Capability.LOGPROBS: engine.get("max_logprobs") != 0,
    }
    source = str(args.get("model_loading_config"))
    known[Capability.THINKING] = (
        bool(_reasoning_parser(engine)) or HARMONY.search(source) is not None
    )
    if OWN_WAY.search(source) is None:
        # vLLM 0.29 makes a parser only if both are set, for tools that must be called, too
        parses = all(engine.get(name) for name in TOOL_ARGUMENTS)
        for capability in TOOL_CAPABILITIES:
            known[capability] = parses
    for medium, modality in MODALITIES.items():
        takes = _takes(engine, modality)
        if takes is not None:
            known[medium] = takes
    return known


def _reasoning_parser(engine: Mapping[str, object]) -> object:
    outputs = engine.get("structured_outputs_config")
    inner = outputs.get("reasoning_parser") if isinstance(outputs, Mapping) else None
    return engine.get("reasoning_parser") or inner


def _takes(engine: Mapping[str, object], modality: str) -> bool | None:
    """Whether an engine takes media of a modality; None if its arguments do not say."""
    if engine.get("language_model_only"):
        return False
    limits = engine.get("limit_mm_per_prompt")
    limit = limits.get(modality) if isinstance(limits, Mapping) else None
    if isinstance(limit, Mapping):
        limit = limit.get("count")
    return limit > 0 if isinstance(limit, int) else None


def lacking(declared: CapabilitySettings, known: Known) -> frozenset[str]:
    """The capabilities that a model does not have.

    Args:
        declared: by the gateway's settings.
        known: of its application.
    """
    has: dict[Capability, bool] = {}
    for capability in Capability:
        stated = getattr(declared, capability.value)
        found = known.get(capability, capability not in ASSUMED_ABSENT)
        has[capability] = found if stated is None else stated
    return frozenset(name.value for name, can in has.items() if not can)


def lacking_by_arm(
    models: Mapping[str, ModelSettings], known: Mapping[str, Known]
) -> dict[str, frozenset[str]]:
    """The capabilities that each arm does not have. A variant has those of its model, unless it does not think.

    Args:
        models: their settings by name.
        known: of each model's application.
    """
    lacks = {}
    for name, model in models.items():
        lacks[name] = own = lacking(model.capabilities, known.get(name, {}))
        for variant, settings in model.variants.items():
            thinks = settings.thinks is not False
            lacks[variant] = own if thinks else own | {Capability.THINKING.value}
    return lacks


def without_hints(body: Body, lacks: Collection[str]) -> Body:
    """The body for a model that lacks these capabilities: without what is a wish only, and which it might refuse."""
    dropped = [name for name, needed in HINTS.items() if needed.value in lacks]
    if not any(name in body for name in dropped):
        return body
    return {name: value for name, value in body.items() if name not in dropped}


def contradictions(declared: CapabilitySettings, known: Known) -> list[str]:
    """What the settings declare and the application cannot do, each with what to change."""
    return [
        f"{capability.value} is true, but the application's engine has no {ARGUMENTS[capability]}; add it there, or "
        "write false"
        for capability in Capability
        if getattr(declared, capability.value) and known.get(capability) is False
    ]


def refusal(capability: Capability, parameter: str, models: str) -> ApiError:
    """The error of a request that no model can answer, because all that may answer lack a capability.

    Args:
        capability: which.
        parameter: path of the parameter that needs it.
        models: their names.
    """
    return ApiError(
        400,
        f"no model that may answer can {capability.words} ({models}); leave {parameter} out"
        f"{_otherwise(capability)}",
        parameter,
        CODE,
    )


def _otherwise(capability: Capability) -> str:
    tools = (Capability.TOOLS, Capability.FORCED_TOOLS)
    if capability in tools:
        return ", or send tool_choice: none"
    return ""


def from_engine(message: str) -> ModelError | None:
    """The error in place of vLLM's, if vLLM refused a request for want of a capability; otherwise None."""
    for pattern, capability, parameter in VLLM_CANNOT:
        if pattern.search(message):
            words = f"this model cannot {capability.words}; leave {parameter} out"
            return ModelError(words + _otherwise(capability), 400, parameter, CODE)
    return None
