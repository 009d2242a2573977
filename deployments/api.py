"""What clients may send: OpenAI's requests as an allow-list, plus the `router` object. Unknown keys are errors."""

import json
from math import isfinite
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from deployments.admission import BATCH, HIGH, NORMAL, RANKS
from deployments.grammar import check_schema, check_tools, compiled_tools
from policies.types import Objective

MAX_DEPTH, MAX_VALUES = 16, 5_000  # of what a client may nest freely: tools, schemas
MAX_PARTS = 2_048  # of one message
MAX_SCHEMA, MAX_TOOLS = 32_000, 128_000  # characters of JSON
DECISION_ID = r"^[^\x00-\x1f\x7f]{1,64}$"  # PostgreSQL takes no NUL


def _small(value: Any) -> Any:
    """Refuse what is nested too deeply, has too many parts, or numbers that are not finite."""
    layer, values = [value], 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in layer:
            if isinstance(item, float) and not isfinite(item):
                raise ValueError("numbers must be finite")
            if isinstance(item, dict | list):
                inner += item.values() if isinstance(item, dict) else item
        layer, values = inner, values + len(inner)
        if values > MAX_VALUES:
            raise ValueError(f"has more than {MAX_VALUES} values; send less")
    if layer:
        raise ValueError(f"is nested deeper than {MAX_DEPTH}; make it flatter")
    return value


def _short(value: Any, most: int) -> Any:
    """Refuse what is too long as JSON."""
    if len(json.dumps(value, ensure_ascii=False)) > most:
        raise ValueError(f"is longer than {most} characters as JSON; send less")
    return value


def _compilable(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse a schema that the engine would compile for minutes, or fail to."""
    check_schema(_short(schema, MAX_SCHEMA))
    return schema


Item = TypeVar("Item")
Listed = Annotated[list[Item], Field(fail_fast=True)]  # its first wrong item is the only one that is reported
Text = Annotated[str, StringConstraints(max_length=400_000)]
Name = Annotated[str, StringConstraints(max_length=256)]
Stop = Annotated[str, StringConstraints(max_length=256)]
Free = Annotated[dict[str, Any], AfterValidator(_small)]
Schema = Annotated[Free, AfterValidator(_compilable)]
Tool = Annotated[Free, AfterValidator(lambda tool: _short(tool, MAX_SCHEMA))]
Tools = Annotated[Listed[Tool], Field(max_length=128), AfterValidator(lambda tools: _short(tools, MAX_TOOLS))]
TIERS = {"priority": HIGH, "auto": NORMAL, "default": NORMAL, "scale": NORMAL, "flex": BATCH}


class Strict(BaseModel):
    """Refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Wishes(Strict):
    """What one request wants of the router; what is not said comes from the preset."""

    latency_weight: float | None = Field(None, ge=0, le=1e9)
    cost_weight: float | None = Field(None, ge=0, le=1e9)
    max_latency_s: float | None = Field(None, gt=0)
    max_cost: float | None = Field(None, gt=0, description="US dollars for this request")
    models: Listed[Name] | None = Field(None, min_length=1, max_length=64)
    priority: Literal["high", "normal", "batch"] | None = Field(None, description="who goes first when it is full")

    def objective(self, base: Objective) -> Objective:
        """The preset's objective with these wishes in it."""
        return Objective(
            latency_weight=base.latency_weight if self.latency_weight is None else self.latency_weight,
            cost_weight=base.cost_weight if self.cost_weight is None else self.cost_weight,
            max_latency_s=base.max_latency_s if self.max_latency_s is None else self.max_latency_s,
            max_cost_usd=base.max_cost_usd if self.max_cost is None else self.max_cost,
            models=base.models if self.models is None else tuple(self.models),
        )


class TextPart(Strict):
    """One piece of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[Listed[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: Listed[Free] | None = Field(None, max_length=128)
    tool_call_id: Name | None = None
    # in answers of OpenAI and others, which clients send back as they are; of no use to the models
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


class StreamOptions(Strict):
    """include_usage: a last chunk tells the token counts."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(None, exclude=True)


class Generation(Strict):
    """What chat and plain completion have in common."""

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
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,7}$")], float] | None = Field(
        None, max_length=300
    )
    router: Wishes | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = Field(None, exclude=True)
    # what OpenAI's clients send for OpenAI's own sake
    user: str | None = Field(None, max_length=512, exclude=True)
    safety_identifier: str | None = Field(None, max_length=512, exclude=True)
    prompt_cache_key: str | None = Field(None, max_length=512, exclude=True)
    prompt_cache_retention: Name | None = Field(None, exclude=True)
    prompt_cache_options: Free | None = Field(None, exclude=True)
    prediction: Free | None = Field(None, exclude=True)
    moderation: Free | None = Field(None, exclude=True)
    store: bool | None = Field(None, exclude=True)

    def rank(self) -> int:
        """Who goes first when it is full: what `router` says, or else OpenAI's service_tier."""
        if self.router is not None and self.router.priority is not None:
            return RANKS[self.router.priority]
        return TIERS[self.service_tier or "auto"]

    def limit(self) -> int:
        """The client's own limit on the answer's tokens; 0 for none."""
        return self.max_tokens or 0

    def body(self) -> dict[str, Any]:
        """What the model gets: everything but what was for the router."""
        return self.model_dump(exclude_none=True, exclude={"model", "router"})


class ResponseFormat(Strict):
    """Text, any JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class ChatRequest(Generation):
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
    metadata: dict[Name, Text] | None = Field(None, max_length=16, exclude=True)
    reasoning_effort: Name | None = Field(None, exclude=True)
    verbosity: Name | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check_compiled_tools(self) -> "ChatRequest":
        check_tools(compiled_tools(self.tools or [], self.tool_choice))
        return self

    def limit(self) -> int:
        """See Generation."""
        return self.max_completion_tokens or self.max_tokens or 0

    def texts(self) -> tuple[str, str, int]:
        """What is asked (the last user message), all that will be read, and the number of messages."""
        asked = next((m.text() for m in reversed(self.messages) if m.role == "user"), self.messages[-1].text())
        return asked, "".join(m.text() for m in self.messages), len(self.messages)


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Annotated[Text, StringConstraints(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None

    def texts(self) -> tuple[str, str, int]:
        """See ChatRequest."""
        return self.prompt, self.prompt, 0


def _no_tokens(value: Any) -> Any:
    """Refuse token ids: whoever made them took another model's tokenizer, and they would mean something else here."""
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise ValueError("send text rather than token ids (LangChain: check_embedding_ctx_length=False)")
    return value


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    input: Annotated[
        Annotated[Text, StringConstraints(min_length=1)]
        | Annotated[Listed[Annotated[Text, StringConstraints(min_length=1)]], Field(min_length=1, max_length=2048)],
        BeforeValidator(_no_tokens),
    ]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512, exclude=True)

    stream: Literal[False] | None = Field(False, exclude=True)
    router: Wishes | None = None

    def rank(self) -> int:
        """See Generation."""
        return RANKS[(self.router and self.router.priority) or "normal"]

    def limit(self) -> int:
        """See Generation."""
        return 0

    def texts(self) -> tuple[str, str, int]:
        """See ChatRequest."""
        text = self.input if isinstance(self.input, str) else "\n".join(self.input)
        return text, text, 0

    def body(self) -> dict[str, Any]:
        """See Generation."""
        return self.model_dump(exclude_none=True, exclude={"model", "router"})


class FeedbackRequest(Strict):
    """POST /v1/feedback."""

    decision_id: Annotated[str, StringConstraints(pattern=DECISION_ID)]
    score: float = Field(ge=0, le=1, strict=True)
    source: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "user"


AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest
