"""What clients may send: OpenAI's requests as an allow-list, plus the `router` object. Unknown keys are errors."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from policies.types import Objective

Text = Annotated[str, StringConstraints(max_length=400_000)]


class Strict(BaseModel):
    """Refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Wishes(Strict):
    """What one request wants of the router; what is not said comes from the preset."""

    latency_weight: float | None = Field(None, ge=0, le=1e9)
    cost_weight: float | None = Field(None, ge=0, le=1e9)
    max_latency_s: float | None = Field(None, gt=0)
    max_cost: float | None = Field(None, gt=0, description="US dollars for this request")
    models: list[str] | None = Field(None, min_length=1, max_length=64)

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
    content: Text | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(Strict):
    """include_usage: a last chunk tells the token counts."""

    include_usage: bool = False


class Generation(Strict):
    """What chat and plain completion have in common."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=4)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    user: str | None = Field(None, max_length=512)
    router: Wishes | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > 4:
            raise ValueError("give at most 4 stop sequences")
        return value

    def limit(self) -> int:
        """The client's own limit on the answer's tokens; 0 for none."""
        return self.max_tokens or 0

    def body(self) -> dict[str, Any]:
        """What the model gets: everything but what was for the router."""
        return self.model_dump(exclude_none=True, exclude={"model", "router", "user", "metadata"})


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=256)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=5)
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None

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


class EmbeddingRequest(Strict):
    """POST /v1/embeddings."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    input: (
        Annotated[Text, StringConstraints(min_length=1)]
        | Annotated[list[Annotated[Text, StringConstraints(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=512)

    stream: Literal[False] = Field(False, exclude=True)
    router: Wishes | None = None

    def limit(self) -> int:
        """See Generation."""
        return 0

    def texts(self) -> tuple[str, str, int]:
        """See ChatRequest."""
        text = self.input if isinstance(self.input, str) else "\n".join(self.input)
        return text, text, 0

    def body(self) -> dict[str, Any]:
        """See Generation."""
        return self.model_dump(exclude_none=True, exclude={"model", "router", "user"})


class FeedbackRequest(Strict):
    """POST /v1/feedback."""

    decision_id: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    score: float = Field(ge=0, le=1, strict=True)
    source: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = "user"


AnyRequest = ChatRequest | CompletionRequest | EmbeddingRequest
