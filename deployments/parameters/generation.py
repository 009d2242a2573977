"""The parameters that chats and completions share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from deployments.dispatch.admission import BATCH, HIGH, NORMAL, RANKS
from deployments.errors import field_error
from deployments.model_settings import StrictModel
from deployments.parameters.needs import Need
from deployments.parameters.structured_outputs import ResponseFormat
from deployments.parameters.values import (
    MAX_TOKENS,
    Flag,
    Free,
    Listed,
    LogitBias,
    Name,
    Number,
    Stop,
    Whole,
)
from deployments.parameters.vllm import EngineParameters
from deployments.parameters.wishes import Wishes
from policies.capabilities import Capability

MAX_CHOICES = 128  # of one request: OpenAI's largest n, over all of its prompts
LEAST_TOP_P = 1e-6  # what an engine takes for 0: the most probable token alone
TIERS = {
    "priority": HIGH,
    "auto": NORMAL,
    "default": NORMAL,
    "scale": NORMAL,
    "flex": BATCH,
}


@dataclass(frozen=True, slots=True)
class Texts:
    """What the model reads of a request.

    Attributes:
        last: what the client asks: the last message of a user, or the prompts.
        context: everything.
        messages: number of messages in `context`.
        parts: the prompts, where the model answers each by itself.
        token_counts: lengths of the prompts, where they are token ids.
        media_tokens: estimate of the tokens of all images, audio and videos.
    """

    last: str
    context: str
    messages: int = 0
    parts: tuple[str, ...] = ()
    token_counts: tuple[int, ...] = ()
    media_tokens: int = 0


class StreamOptions(StrictModel):
    """include_usage: a last chunk has the token counts; continuous_usage_stats: all chunks have them (vLLM's)."""

    include_usage: Flag | None = False
    continuous_usage_stats: Flag | None = None
    include_obfuscation: Flag | None = Field(None, exclude=True)


class GenerationRequest(EngineParameters):
    """Fields that chats and completions share."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    stream: Flag | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, ge=0, le=1)
    n: Whole | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[Listed[Stop], Field(max_length=4)] | None = None
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    router: Wishes | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = (
        Field(None, exclude=True)
    )
    # only their salted hashes are stored; models do not get them
    user: str | None = Field(None, max_length=512, exclude=True)
    safety_identifier: str | None = Field(None, max_length=512, exclude=True)
    # accepted from OpenAI's clients and ignored
    prompt_cache_key: str | None = Field(None, max_length=512, exclude=True)
    prompt_cache_retention: Name | None = Field(None, exclude=True)
    prompt_cache_options: Free | None = Field(None, exclude=True)
    prediction: Free | None = Field(None, exclude=True)
    moderation: Free | None = Field(None, exclude=True)
    store: Flag | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise field_error(
                "stream_options", "is for streams; add stream: true or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_limits(self) -> "GenerationRequest":
        """Refuse limits that contradict each other, before an engine does so in its own words."""
        limit = self.limit()
        if self.min_tokens and limit and self.min_tokens > limit:
            raise field_error(
                "min_tokens", f"is above the limit of the answer ({limit}); lower it"
            )
        if self.ignore_eos and not limit:
            raise field_error(
                "ignore_eos",
                "needs max_tokens, or the answer would fill the model's context",
            )
        if self.truncate_prompt_tokens == 0:
            raise field_error(
                "truncate_prompt_tokens",
                "0 leaves nothing of the prompt; send a larger number, or -1",
            )
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise field_error("truncation_side", "needs truncate_prompt_tokens; add it")
        if self.prompt_logprobs and self.stream:
            raise field_error("prompt_logprobs", "are not in streams; leave stream out")
        return self

    @model_validator(mode="after")
    def _check_formats(self) -> "GenerationRequest":
        bound = self.response_format is not None and self.response_format.capability
        if bound and self.structured_outputs is not None:
            raise field_error(
                "structured_outputs",
                "cannot be sent beside response_format; leave one out",
            )
        return self

    def users(self) -> list[str]:
        """The client's names for its user, each once."""
        named = dict.fromkeys((self.user, self.safety_identifier))
        return [name for name in named if name]

    def rank(self) -> int:
        """The priority among requests that wait for a busy model: of `router`, or else of OpenAI's service_tier."""
        if self.router is not None and self.router.priority is not None:
            return RANKS[self.router.priority]
        return TIERS[self.service_tier or "auto"]

    def limit(self) -> int:
        """The client's limit on the answer's tokens; 0 for none."""
        return self.max_tokens or 0

    def needs(self) -> list[Need]:
        """What the request needs of an arm, with the parameters that say so."""
        needs = [
            Need(Capability.VLLM_PARAMETERS, name) for name in self.own_parameters()
        ]
        if self.stream_options and self.stream_options.continuous_usage_stats:
            where = "stream_options.continuous_usage_stats"
            needs.append(Need(Capability.VLLM_PARAMETERS, where))
        if self.structured_outputs is not None:
            needs.append(Need(self.structured_outputs.capability, "structured_outputs"))
        if self.response_format is not None and self.response_format.capability:
            needs.append(Need(self.response_format.capability, "response_format"))
        if self.prompt_logprobs is not None:
            needs.append(Need(Capability.LOGPROBS, "prompt_logprobs"))
        if self.thinking_token_budget is not None:
            needs.append(Need(Capability.THINKING, "thinking_token_budget"))
        return needs

    def body(self) -> dict[str, object]:
        """The body for the model: all fields but those of the router."""
        body = self.model_dump(exclude_none=True, exclude={"model", "router"})
        if self.top_p == 0:
            body["top_p"] = LEAST_TOP_P
        if self.temperature == 0 and (self.n or 1) > 1:
            # engines refuse several greedy choices; these are the same, and equal to each other
            body |= {"temperature": 1.0, "top_k": 1}
        return body
