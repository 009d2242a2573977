"""Whether a model can call tools, by the arguments of its application; and how vLLM says that one cannot."""

import re
from collections.abc import Mapping

from deployments.errors import ApiError

CODE = "unsupported_parameter"  # OpenAI's
# the engine arguments without which vLLM refuses requests with tools
NEEDED = ("enable_auto_tool_choice", "tool_call_parser")
# vLLM's answer to such a request
VLLM_CANNOT = re.compile(r"requires .*--tool-call-parser to be set")
# sources of models that call tools in a way of their own, which vLLM knows without these arguments
OWN_WAY = re.compile(r"gpt[-_]?oss|mistral|magistral|devstral|ministral", re.I)


def can_call_tools(args: Mapping[str, object]) -> bool:
    """Whether a model may be able to call tools; only arguments that rule it out count.

    Args:
        args: of the model's application in serve_config.yaml. Without engine arguments nothing is known.
    """
    engine = args.get("engine_kwargs")
    if not isinstance(engine, Mapping):
        return True
    if all(engine.get(name) for name in NEEDED):
        return True
    return OWN_WAY.search(str(args.get("model_loading_config"))) is not None


def refusal(models: str) -> ApiError:
    """The error of a request with tools that no model can call."""
    return ApiError(
        400,
        f"no model that may answer can call tools ({models}); leave tools out, or send tool_choice: none",
        "tools",
        CODE,
    )
