"""Schemas of request bodies: an allow-list of OpenAI's fields, plus the `router` object. Unknown keys are errors."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from deployments.dispatch.admission import BATCH, HIGH, NORMAL, RANKS
from deployments.models.grammar import check_schema, check_tools, compiled_tools
from deployments.settings import StrictModel
from policies.types import Objective

MAX_DEPTH = 16
MAX_VALUES = 5_000  # of one tool, schema or other value of free form
MAX_PARTS = 2_048  # of one message
MAX_BIASES = 300
MAX_METADATA = 16
MAX_SCHEMA = 32_000  # characters of JSON
MAX_TOOLS = 128_000  # characters of JSON
Item = TypeVar("Item")
DECISION_ID = r"^[^\x00-\x1f\x7f]{1,64}$"  # PostgreSQL takes no NUL


def _small(value: Item) -> Item:
    """Refuse a value that is nested too deeply, has too many parts, or has numbers that are not finite."""
    layer: list[object] = [value]
    values = 0
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in layer:
            if isinstance(item, float) and not isfinite(item):
                raise ValueError("numbers must be finite")
            if isinstance(item, dict | list):
                inner += item.values() if isinstance(item, dict) else item
        layer = inner
        values = values + len(inner)
        if values > MAX_VALUES:
            raise ValueError(f"has more than {MAX_VALUES} values; send less")
    if layer:
        raise ValueError(f"is nested deeper than {MAX_DEPTH}; make it flatter")
    return value


def _short(value: Item, limit: int) -> Item:
    """Refuse a value that is longer than `limit` characters as JSON."""
    if len(json.dumps(value, ensure_ascii=False)) > limit:
        raise ValueError(f"is longer than {limit} characters as JSON; send less")
    return value


def _compilable(named: dict[str, object]) -> dict[str, object]:
    """Refuse a `json_schema` whose schema an engine would compile for minutes, or fail to compile."""
    try:
        check_schema(_short(named, MAX_SCHEMA))
    except ValueError as error:
        if "schema" not in named:
            raise
        # the error is at the schema itself
        problem = InitErrorDetails(
            type=PydanticCustomError("value_error", "{why}", {"why": str(error)}),
            loc=("schema",),
            input=None,
        )
        raise ValidationError.from_exception_data("json_schema", [problem]) from None
    return named


def _at_most(count: int) -> Callable[[object], object]:
    """A check of an object's size before its members are validated; a repeated key counts once."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"has more than {count} keys; send fewer")
        return value

    return check


# validation stops at the first wrong item of a list
Listed = Annotated[list[Item], Field(fail_fast=True)]
Text = Annotated[str, StringConstraints(max_length=400_000)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,7}$")]
LogitBias = Annotated[
    dict[TokenId, float],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_at_most(MAX_BIASES)),
]
Name = Annotated[str, StringConstraints(max_length=256)]
Metadata = Annotated[
    dict[Name, Text],
    Field(max_length=MAX_METADATA),
    BeforeValidator(_at_most(MAX_METADATA)),
]
Stop = Annotated[str, StringConstraints(max_length=256)]
Free = Annotated[dict[str, object], AfterValidator(_small)]
Schema = Annotated[Free, AfterValidator(_compilable)]
Tool = Annotated[Free, AfterValidator(lambda tool: _short(tool, MAX_SCHEMA))]
Tools = Annotated[
    Listed[Tool],
    Field(max_length=128),
    AfterValidator(lambda tools: _short(tools, MAX_TOOLS)),
]
TIERS = {
    "priority": HIGH,
    "auto": NORMAL,
    "default": NORMAL,
    "scale": NORMAL,
    "flex": BATCH,
}


class Wishes(StrictModel):
    """Options of the router for one request; the preset sets the others."""

    latency_weight: float | None = Field(None, ge=0, le=1e9)
    cost_weight: float | None = Field(None, ge=0, le=1e9)
    max_latency_s: float | None = Field(None, gt=0)
    max_cost: float | None = Field(
        None, gt=0, description="US dollars for this request"
    )
    models: Listed[Name] | None = Field(None, min_length=1, max_length=64)
    priority: Literal["high", "normal", "batch"] | None = Field(
        None, description="order of requests that wait for a busy model"
    )

    def objective(self, base: Objective) -> Objective:
        """The preset's objective with these options applied."""
        return Objective(
            latency_weight=_or(self.latency_weight, base.latency_weight),
            cost_weight=_or(self.cost_weight, base.cost_weight),
            max_latency_s=_or(self.max_latency_s, base.max_latency_s),
            max_cost_usd=_or(self.max_cost, base.max_cost_usd),
            models=base.models if self.models is None else tuple(self.models),
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class TextPart(StrictModel):
    """One piece of a message's content."""

    type: Literal["text"]
    text: Text


class Message(StrictModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[Listed[TextPart], Field(max_length=MAX_PARTS)] | None = (
        None
    )
    name: Name | None = None
    tool_calls: Listed[Free] | None = Field(None, max_length=128)
    tool_call_id: Name | None = None
    # clients send answers of OpenAI and others back unchanged; the models do not use these fields of them
    refusal: Text | None = Field(None, exclude=True)
    annotations: Listed[Free] | None = Field(None, max_length=128, exclude=True)
    reasoning: Text | None = Field(None, exclude=True)
    reasoning_content: Text | None = Field(None, exclude=True)
    audio: None = Field(None, exclude=True)
    function_call: None = Field(None, exclude=True)

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(StrictModel):
    """include_usage: a last chunk has the token counts."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(None, exclude=True)


class GenerationRequest(StrictModel):
    """Fields that chats and completions share."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=4)
    stop: Stop | Annotated[Listed[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    router: Wishes | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = (
        Field(None, exclude=True)
    )
    # accepted from OpenAI's clients and ignored
    user: str | None = Field(None, max_length=512, exclude=True)
    safety_identifier: str | None = Field(None, max_length=512, exclude=True)
    prompt_cache_key: str | None = Field(None, max_length=512, exclude=True)
    prompt_cache_retention: Name | None = Field(None, exclude=True)
    prompt_cache_options: Free | None = Field(None, exclude=True)
    prediction: Free | None = Field(None, exclude=True)
    moderation: Free | None = Field(None, exclude=True)
    store: bool | None = Field(None, exclude=True)

    def rank(self) -> int:
        """The priority among requests that wait for a busy model: of `router`, or else of OpenAI's service_tier."""
        if self.router is not None and self.router.priority is not None:
            return RANKS[self.router.priority]
        return TIERS[self.service_tier or "auto"]

    def limit(self) -> int:
        """The client's limit on the answer's tokens; 0 for none."""
        return self.max_tokens or 0

    def body(self) -> dict[str, object]:
        """The body for the model: all fields but those of the router."""
        return self.model_dump(exclude_none=True, exclude={"model", "router"})


class ResponseFormat(StrictModel):
    """Text, any JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Listed[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Name | Free | None = None
    parallel_tool_calls: bool | None = None
    modalities: Listed[Literal["text"]] | None = Field(None, max_length=8, exclude=True)
    metadata: Metadata | None = Field(None, exclude=True)
    reasoning_effort: Name | None = Field(None, exclude=True)
    verbosity: Name | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check_compiled_tools(self) -> "ChatRequest":
        check_tools(compiled_tools(self.tools or [], self.tool_choice))
        return self

    def limit(self) -> int:
        """See GenerationRequest."""
        return self.max_completion_tokens or self.max_tokens or 0

    def body(self) -> dict[str, object]:
        """See GenerationRequest. Messages of a developer become system messages, which every chat template knows."""
        messages = [
            message.model_copy(update={"role": "system"})
            if message.role == "developer"
            else message
            for message in self.messages
        ]
        request = self.model_copy(update={"messages": messages})
        return GenerationRequest.body(request)

    def texts(self) -> tuple[str, str, int]:
        """The last user message, the text of all messages, and the number of messages."""
        user_messages = [m for m in self.messages if m.role == "user"]
        last = user_messages[-1] if user_messages else self.messages[-1]
        context = "".join(m.text() for m in self.messages)
        return last.text(), context, len(self.messages)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Text, StringConstraints(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None

    def texts(self) -> tuple[str, str, int]:
        """See ChatRequest."""
        return self.prompt, self.prompt, 0


def _no_tokens(value: object) -> object:
    """Refuse token ids: the client made them with the tokenizer of another model."""
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise ValueError(
            "send text rather than token ids (LangChain: check_embedding_ctx_length=False)"
        )
    return value


class EmbeddingRequest(StrictModel):
    """POST /v1/embeddings."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    input: Annotated[
        Annotated[Text, StringConstraints(min_length=1)]
        | Annotated[
            Listed[Annotated[Text, StringConstraints(min_length=1)]],
            Field(min_length=1, max_length=2048),
        ],
        BeforeValidator(_no_tokens),
    ]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1, le=1_000_000)
    user: str | None = Field(None, max_length=512, exclude=True)

    stream: Literal[False] | None = Field(False, exclude=True)
    router: Wishes | None = None

    def rank(self) -> int:
        """See GenerationRequest."""
        if self.router is None or self.router.priority is None:
            return NORMAL
        return RANKS[self.router.priority]

    def limit(self) -> int:
        """See GenerationRequest."""
        return 0

    def texts(self) -> tuple[str, str, int]:
        """See ChatRequest."""
        text = self.input if isinstance(self.input, str) else "\n".join(self.input)
        return text, text, 0

    def body(self) -> dict[str, object]:
        """See GenerationRequest."""
        return self.model_dump(exclude_none=True, exclude={"model", "router"})


class FeedbackRequest(StrictModel):
    """POST /v1/feedback."""

    decision_id: Annotated[str, StringConstraints(pattern=DECISION_ID)]
    score: float = Field(ge=0, le=1, strict=True)
    source: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = (
        "user"
    )


AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest
