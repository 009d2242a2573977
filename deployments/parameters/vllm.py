"""The parameters that vLLM has beside OpenAI's: those that are passed on, and those that are refused on purpose.

tests/deployments/parameters/test_vllm.py compares them with the classes of the installed vLLM, so that a new one is
decided about. docs/parameters.md shows both tables.
"""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    model_validator,
)

from deployments.errors import field_error
from deployments.model_settings import StrictModel
from deployments.parameters.structured_outputs import StructuredOutputs
from deployments.parameters.values import (
    MAX_TOKENS,
    Flag,
    Listed,
    Number,
    Tokens,
    Unsupported,
    Whole,
    at_most,
    short,
    small,
)

MAX_LABELS = 128  # vLLM's MAX_LOGPROB_TOKEN_IDS
MAX_BAD_WORDS = 64  # each becomes up to two lists of tokens, and vLLM takes 128
MAX_TEMPLATE_DEPTH = 4
MAX_TEMPLATE_VALUES = 64
MAX_TEMPLATE_CHARS = 4_000
MAX_TEMPLATE_KEYS = 16
MAX_INTERVAL = 100  # tokens; a chunk must arrive within chunk_timeout_s
# arguments of transformers' apply_chat_template, by which a client could replace what the engine does
RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
)


def _template_values(values: dict[str, object]) -> dict[str, object]:
    """Refuse values that are large, or that are no variables of a template."""
    for name in values:
        if name in RESERVED:
            raise field_error(name, "is no variable of a chat template; leave it out")
    small(values, MAX_TEMPLATE_DEPTH, MAX_TEMPLATE_VALUES)
    return short(values, MAX_TEMPLATE_CHARS)


Word = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
TemplateValues = Annotated[
    dict[Variable, object],
    BeforeValidator(at_most(MAX_TEMPLATE_KEYS)),
    AfterValidator(_template_values),
]


class RepetitionDetection(StrictModel):
    """The answer ends where it repeats a pattern of so many tokens so often."""

    max_pattern_size: Whole = Field(0, ge=0, le=256)
    min_pattern_size: Whole = Field(0, ge=0, le=256)
    min_count: Whole = Field(0, ge=0, le=256)

    @model_validator(mode="after")
    def _check_sizes(self) -> "RepetitionDetection":
        if self.min_pattern_size > self.max_pattern_size:
            raise field_error("min_pattern_size", "is above max_pattern_size; lower it")
        if self.max_pattern_size and self.min_count < 2:
            raise field_error("min_count", "must be 2 or more; raise it")
        return self


class EngineParameters(StrictModel):
    """The parameters of vLLM's chats and completions that are passed to arms whose engine is vLLM."""

    top_k: Whole | None = Field(None, ge=-1, le=MAX_TOKENS)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=100)
    stop_token_ids: Tokens | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = Field(None, description="Needs a limit on the answer.")
    min_tokens: Whole | None = Field(None, ge=0, le=MAX_TOKENS)
    skip_special_tokens: Flag | None = None
    spaces_between_special_tokens: Flag | None = None
    truncate_prompt_tokens: Whole | None = Field(
        None,
        ge=-1,
        le=MAX_TOKENS,
        description="The prompt is cut to so many tokens; -1: to what the model has room for.",
    )
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: Whole | None = Field(None, ge=0, le=20)
    logprob_token_ids: Annotated[Tokens, Field(max_length=MAX_LABELS)] | None = None
    allowed_token_ids: Tokens | None = None
    bad_words: Annotated[Listed[Word], Field(max_length=MAX_BAD_WORDS)] | None = None
    thinking_token_budget: Whole | None = Field(None, ge=-1, le=MAX_TOKENS)
    structured_outputs: StructuredOutputs | None = None
    repetition_detection: RepetitionDetection | None = None
    add_special_tokens: Flag | None = None
    return_tokens_as_token_ids: Flag | None = None
    return_token_ids: Flag | None = None
    stream_interval: Whole | None = Field(None, ge=1, le=MAX_INTERVAL)
    cache_salt: (
        Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None
    ) = None

    def own_parameters(self) -> list[str]:
        """The names of vLLM's own parameters that this request has."""
        given = self.model_fields_set & type(self).engine_names()
        return [name for name in sorted(given) if getattr(self, name) is not None]

    @classmethod
    def engine_names(cls) -> frozenset[str]:
        """The names of vLLM's own parameters."""
        return ENGINE_NAMES

    @property
    def token_list(self) -> str | None:
        """The first parameter with ids of tokens, which belong to one tokenizer; None for none."""
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
            if getattr(self, name) is not None:
                return name
        return None


class EngineChatParameters(EngineParameters):
    """Those that only chats have."""

    include_reasoning: Flag | None = None
    chat_template_kwargs: TemplateValues | None = Field(
        None, description="Variables of the model's chat template."
    )
    echo: Flag | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    return_prompt_text: Flag | None = None

    @classmethod
    def engine_names(cls) -> frozenset[str]:
        """See EngineParameters."""
        return ENGINE_CHAT_NAMES


ENGINE_NAMES = frozenset(EngineParameters.model_fields)
ENGINE_CHAT_NAMES = frozenset(EngineChatParameters.model_fields)


class RefusedParameters(StrictModel):
    """The parameters of vLLM's chats and completions that no model gets, each with the reason."""

    use_beam_search: Annotated[
        None,
        BeforeValidator(
            Unsupported(
                "one request would take the places of many in the engine; send n, or sample",
                False,
            )
        ),
    ] = Field(None, exclude=True)
    length_penalty: Annotated[
        None, BeforeValidator(Unsupported("it belongs to beam search", 1.0))
    ] = Field(None, exclude=True)
    priority: Annotated[
        None,
        BeforeValidator(
            Unsupported("send router.priority or service_tier, which need a scope", 0)
        ),
    ] = Field(None, exclude=True)
    request_id: Annotated[
        None, BeforeValidator(Unsupported("send the header x-request-id"))
    ] = Field(None, exclude=True)
    session_id: Annotated[
        None, BeforeValidator(Unsupported("the engines keep no sessions"))
    ] = Field(None, exclude=True)
    logits_processors: Annotated[
        None, BeforeValidator(Unsupported("it names code that the engine would run"))
    ] = Field(None, exclude=True)
    vllm_xargs: Annotated[
        None,
        BeforeValidator(Unsupported("it belongs to extensions of the operator's")),
    ] = Field(None, exclude=True)
    kv_transfer_params: Annotated[
        None,
        BeforeValidator(Unsupported("it lets an engine fetch memory of other hosts")),
    ] = Field(None, exclude=True)
    ec_transfer_params: Annotated[
        None,
        BeforeValidator(Unsupported("it lets an engine fetch memory of other hosts")),
    ] = Field(None, exclude=True)
    routed_experts_prompt_start: Annotated[
        None,
        BeforeValidator(Unsupported("the experts of a model are not returned", 0)),
    ] = Field(None, exclude=True)
    return_token_offsets: Annotated[
        None,
        BeforeValidator(Unsupported("vLLM returns them from another route", False)),
    ] = Field(None, exclude=True)
    guided_json: Annotated[
        None, BeforeValidator(Unsupported("send structured_outputs.json"))
    ] = Field(None, exclude=True)
    guided_regex: Annotated[
        None, BeforeValidator(Unsupported("send structured_outputs.regex"))
    ] = Field(None, exclude=True)
    guided_choice: Annotated[
        None, BeforeValidator(Unsupported("send structured_outputs.choice"))
    ] = Field(None, exclude=True)
    guided_grammar: Annotated[
        None, BeforeValidator(Unsupported("send structured_outputs.regex or .json"))
    ] = Field(None, exclude=True)


class RefusedChatParameters(RefusedParameters):
    """Those that only chats have."""

    chat_template: Annotated[
        None,
        BeforeValidator(
            Unsupported(
                "it is a program that the engine would run; send chat_template_kwargs"
            )
        ),
    ] = Field(None, exclude=True)
    documents: Annotated[
        None,
        BeforeValidator(
            Unsupported("the router would not read them; put them into a message")
        ),
    ] = Field(None, exclude=True)
    media_io_kwargs: Annotated[
        None, BeforeValidator(Unsupported("it bounds what the engine decodes"))
    ] = Field(None, exclude=True)
    mm_processor_kwargs: Annotated[
        None, BeforeValidator(Unsupported("it bounds what the engine decodes"))
    ] = Field(None, exclude=True)
    return_assistant_tokens_mask: Annotated[
        None,
        BeforeValidator(Unsupported("vLLM returns it from another route", False)),
    ] = Field(None, exclude=True)


class RefusedCompletionParameters(RefusedParameters):
    """Those that only completions have."""

    prompt_embeds: Annotated[
        None, BeforeValidator(Unsupported("an engine may crash on them; send text"))
    ] = Field(None, exclude=True)
