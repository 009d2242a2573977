"""Schemas of request bodies: an allow-list of OpenAI's fields, plus the `router` object. Unknown keys are errors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, from_json

from deployments.dispatch.admission import BATCH, HIGH, NORMAL, RANKS
from deployments.errors import field_error
from deployments.grammars.bounds import check_schema, check_tools, compiled_tools
from deployments.models.context_length import COMPLETION_TOKENS
from deployments.settings import StrictModel
from policies.types import Objective

MAX_DEPTH = 16
MAX_VALUES = 5_000  # of one tool, schema or other value of free form
MAX_PARTS = 2_048  # of one message
MAX_BIASES = 300
MAX_METADATA = 16
MAX_SCHEMA = 32_000  # characters of JSON
MAX_TOOLS = 128_000  # characters of JSON
MAX_CHARS = 400_000  # of one text
MAX_PROMPTS = 2_048  # of one completion
MAX_CHOICES = 128  # of one request: OpenAI's largest n, over all of its prompts
MAX_TOKENS = 2**31 - 1  # a smaller limit is set by the models' contexts
LEAST_TOP_P = 1e-6  # what an engine takes for 0: the most probable token alone
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


def _whole(value: object) -> object:
    """Refuse what pydantic would turn into a number: booleans, and texts with a number in them."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def _unsupported(instead: str) -> Callable[[object], object]:
    """A check of a field of OpenAI's that is not supported: null is as good as left out."""

    def check(value: object) -> object:
        if value is not None:
            raise ValueError(f"is not supported here; {instead}")
        return value

    return check


# validation stops at the first wrong item of a list
Listed = Annotated[list[Item], Field(fail_fast=True)]
Text = Annotated[str, StringConstraints(max_length=MAX_CHARS)]
# `true` and "1" are no numbers, and 1 and "yes" are no booleans
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,7}$")]
LogitBias = Annotated[
    dict[TokenId, Number],
    Field(max_length=MAX_BIASES),
    BeforeValidator(_at_most(MAX_BIASES)),
]
Name = Annotated[str, StringConstraints(max_length=256)]
Metadata = Annotated[
    dict[Name, Text],
    Field(max_length=MAX_METADATA),
    BeforeValidator(_at_most(MAX_METADATA)),
]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
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

    latency_weight: Number | None = Field(
        None,
        ge=0,
        le=1e9,
        description="Score points that a second of latency costs.",
    )
    cost_weight: Number | None = Field(
        None, ge=0, le=1e9, description="Score points that a US dollar costs."
    )
    max_latency_s: Number | None = Field(
        None,
        gt=0,
        description="Hard limit on the expected time of the whole answer, in seconds.",
    )
    max_cost: Number | None = Field(
        None,
        gt=0,
        description="Hard limit on the expected cost of this request, in US dollars.",
    )
    models: Listed[Name] | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="The only models that may answer.",
    )
    priority: Literal["high", "normal", "batch"] | None = Field(
        None,
        description="Order of the requests that wait for a busy model; `high` needs the scope `priority`.",
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


class FunctionCall(StrictModel):
    """A function that the model called earlier. Keys that other clients add are dropped."""

    model_config = ConfigDict(extra="ignore")

    name: Name
    arguments: Text = ""

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        # the engine reads them, because chat templates take an object
        try:
            read = from_json(arguments or "{}", cache_strings="none")
        except ValueError:
            read = None
        if not isinstance(read, dict):
            raise ValueError("is not a JSON object in a string; correct it")
        _small(read)
        return arguments


class ToolCall(StrictModel):
    """A call of a tool in the history of a chat. Keys that other clients add are dropped."""

    model_config = ConfigDict(extra="ignore")

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(StrictModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[Listed[TextPart], Field(max_length=MAX_PARTS)] | None = (
        None
    )
    name: Name | None = None
    tool_calls: Listed[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: Name | None = None
    # clients send answers of OpenAI and others back unchanged; the models do not use these fields of them
    refusal: Text | None = Field(None, exclude=True)
    annotations: Listed[Free] | None = Field(None, max_length=128, exclude=True)
    reasoning: Text | None = Field(None, exclude=True)
    reasoning_content: Text | None = Field(None, exclude=True)
    audio: Annotated[None, BeforeValidator(_unsupported("leave it out"))] = Field(
        None, exclude=True
    )
    function_call: Annotated[None, BeforeValidator(_unsupported("send tool_calls"))] = (
        Field(None, exclude=True)
    )

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        empty = self.content is None or self.content == []
        if self.role == "tool" and self.tool_call_id is None:
            raise field_error("tool_call_id", "name the call that this message answers")
        if self.role == "assistant":
            # an assistant may have said nothing beside its calls, or may have thought or refused only
            said = self.tool_calls or self.refusal or self.reasoning
            empty = empty and not (said or self.reasoning_content)
        if empty:
            raise field_error(
                "content", f"a message of the role '{self.role}' needs a content"
            )
        return self

    def for_model(self) -> "Message":
        """The message as the model gets it.

        Its parts are joined with nothing between them, as the profiler reads them; engines and chat templates differ
        in what they put there. A developer becomes a system, which every chat template knows.
        """
        change: dict[str, object] = {}
        if self.role == "developer":
            change["role"] = "system"
        if isinstance(self.content, list):
            change["content"] = self.text()
        elif self.content is None and not self.tool_calls:
            change["content"] = self.refusal or ""
        return self.model_copy(update=change) if change else self

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or self.refusal or ""


@dataclass(frozen=True, slots=True)
class Texts:
    """What the model reads of a request.

    Attributes:
        last: what the client asks: the last message of a user, or the prompts.
        context: everything.
        messages: number of messages in `context`.
        parts: the prompts, where the model answers each by itself.
        token_counts: lengths of the prompts, where they are token ids.
    """

    last: str
    context: str
    messages: int = 0
    parts: tuple[str, ...] = ()
    token_counts: tuple[int, ...] = ()


def _function_name(value: Mapping[str, object], place: int | None) -> str:
    """The name of a function in `tools`, at this place, or in `tool_choice`."""
    where = "tool_choice" if place is None else f"tools.{place}"
    if value.get("type") != "function":
        raise field_error(
            f"{where}.type", "must be function; only functions are supported"
        )
    function = value.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise field_error(f"{where}.function.name", "is missing; name the function")
    return name


class StreamOptions(StrictModel):
    """include_usage: a last chunk has the token counts."""

    include_usage: Flag | None = False
    include_obfuscation: Flag | None = Field(None, exclude=True)


class GenerationRequest(StrictModel):
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

    def body(self) -> dict[str, object]:
        """The body for the model: all fields but those of the router."""
        body = self.model_dump(exclude_none=True, exclude={"model", "router"})
        if self.top_p == 0:
            body["top_p"] = LEAST_TOP_P
        if self.temperature == 0 and (self.n or 1) > 1:
            # engines refuse several greedy choices; these are the same, and equal to each other
            body |= {"temperature": 1.0, "top_k": 1}
        return body


class ResponseFormat(StrictModel):
    """Text, any JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type != "json_schema":
            return self
        if self.json_schema is None:
            raise field_error(
                "json_schema", "is missing; the format json_schema needs it"
            )
        if not isinstance(self.json_schema.get("name"), str):
            raise field_error("json_schema.name", "is missing; name the schema")
        if not isinstance(self.json_schema.get("schema"), dict):
            raise field_error(
                "json_schema.schema",
                "is missing or no object; send a JSON schema, or use the format json_object",
            )
        return self


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Listed[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: Flag | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Name | Free | None = None
    parallel_tool_calls: Flag | None = None
    functions: Annotated[None, BeforeValidator(_unsupported("send tools"))] = Field(
        None, exclude=True
    )
    function_call: Annotated[
        None, BeforeValidator(_unsupported("send tool_choice"))
    ] = Field(None, exclude=True)
    audio: Annotated[
        None, BeforeValidator(_unsupported("the models answer in text only"))
    ] = Field(None, exclude=True)
    web_search_options: Annotated[
        None, BeforeValidator(_unsupported("the models cannot search"))
    ] = Field(None, exclude=True)
    modalities: Listed[Literal["text"]] | None = Field(None, max_length=8, exclude=True)
    metadata: Metadata | None = Field(None, exclude=True)
    reasoning_effort: Name | None = Field(None, exclude=True)
    verbosity: Name | None = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check_compiled_tools(self) -> "ChatRequest":
        check_tools(compiled_tools(self.tools or [], self.tool_choice))
        return self

    @model_validator(mode="after")
    def _check_tool_choice(self) -> "ChatRequest":
        names = [_function_name(tool, i) for i, tool in enumerate(self.tools or ())]
        if self.tools == []:
            raise field_error("tools", "is an empty list; send a tool or leave it out")
        choice = self.tool_choice
        if choice is None or choice == "none":
            return self
        if not self.tools:
            raise field_error("tool_choice", "needs tools; send them or leave it out")
        if isinstance(choice, str):
            if choice not in ("auto", "required"):
                raise field_error(
                    "tool_choice", "is none, auto, required or a named function"
                )
        elif _function_name(choice, None) not in names:
            raise field_error(
                "tool_choice.function.name", "names none of the functions in tools"
            )
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise field_error(
                "top_logprobs", "needs logprobs: true; add it or leave this out"
            )
        return self

    @property
    def calls_tools(self) -> bool:
        """Whether the model may call tools."""
        return bool(self.tools) and self.tool_choice != "none"

    def limit(self) -> int:
        """See GenerationRequest."""
        return self.max_completion_tokens or self.max_tokens or 0

    def body(self) -> dict[str, object]:
        """See GenerationRequest."""
        messages = [message.for_model() for message in self.messages]
        request = self.model_copy(update={"messages": messages})
        return GenerationRequest.body(request)

    def texts(self) -> Texts:
        """What the model reads; see Texts."""
        user_messages = [m for m in self.messages if m.role == "user"]
        last = user_messages[-1] if user_messages else self.messages[-1]
        context = "".join(m.text() for m in self.messages)
        return Texts(last.text(), context, len(self.messages))


def _prompts(value: object) -> object:
    """Refuse a prompt that is no text, list of texts, list of token ids or list of such lists."""
    if isinstance(value, str):
        _check_text(value, "")
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            "is no text, list of texts, list of token ids or list of such lists"
        )
    if len(value) > MAX_PROMPTS and not _is_token(value[0]):
        raise ValueError(f"has more than {MAX_PROMPTS} prompts; send fewer")
    kind = type(value[0])
    for i, item in enumerate(value):
        if type(item) is not kind:
            raise field_error(str(i), "is of another type than the prompts before it")
        if isinstance(item, str):
            _check_text(item, str(i))
        elif isinstance(item, list):
            if not item:
                raise field_error(str(i), "is empty; send at least one token id")
            for j, token in enumerate(item):
                _check_token(token, f"{i}.{j}")
        else:
            _check_token(item, str(i))
    return value


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_text(text: str, where: str) -> None:
    if text and len(text) <= MAX_CHARS:
        return
    message = f"has more than {MAX_CHARS} characters; send less"
    if not text:
        message = "is empty; send at least one character"
    raise field_error(where, message) if where else ValueError(message)


def _check_token(value: object, where: str) -> None:
    if not _is_token(value) or not 0 <= value < 2**31:  # type: ignore[operator]
        raise field_error(where, "is no text and no token id")


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. Each prompt gets `n` choices."""

    prompt: Annotated[
        str | Listed[str] | Listed[int] | Listed[Listed[int]], BeforeValidator(_prompts)
    ]
    max_tokens: Whole | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: Whole | None = Field(None, ge=0, le=5)
    echo: Flag | None = None
    best_of: Whole | None = Field(None, ge=1, le=MAX_CHOICES, exclude=True)
    suffix: Annotated[
        None, BeforeValidator(_unsupported("the models only continue a prompt"))
    ] = Field(None, exclude=True)

    @model_validator(mode="after")
    def _check_choices(self) -> "CompletionRequest":
        each = self.n or 1
        if self.best_of is not None and self.best_of != each:
            raise field_error(
                "best_of", f"other than n ({each}) is not supported; leave it out"
            )
        if each * self.prompts > MAX_CHOICES:
            raise field_error(
                "prompt" if each == 1 else "n",
                f"the prompts times n are more than {MAX_CHOICES}; send several requests",
            )
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "0 needs echo: true; ask for a token")
        return self

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return 1
        return len(self.prompt)

    @property
    def has_tokens(self) -> bool:
        """Whether the prompts are token ids."""
        return not isinstance(self.prompt, str) and not isinstance(self.prompt[0], str)

    def limit(self) -> int:
        """See GenerationRequest. OpenAI's default is small, and is no flaw of a model."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def texts(self) -> Texts:
        """See Texts."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return Texts(prompt, prompt)
        if not self.has_tokens:
            texts = tuple(str(text) for text in prompt)
            context = "\n".join(texts)
            return Texts(context, context, parts=texts)
        lists = [prompt] if isinstance(prompt[0], int) else prompt
        return Texts("", json.dumps(prompt), token_counts=tuple(map(len, lists)))  # type: ignore[arg-type]


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
    dimensions: Whole | None = Field(None, ge=1, le=1_000_000)
    user: str | None = Field(None, max_length=512, exclude=True)

    stream: Literal[False] | None = Field(False, exclude=True)
    router: Wishes | None = None

    def users(self) -> list[str]:
        """See GenerationRequest."""
        return [self.user] if self.user else []

    def rank(self) -> int:
        """See GenerationRequest."""
        if self.router is None or self.router.priority is None:
            return NORMAL
        return RANKS[self.router.priority]

    def limit(self) -> int:
        """See GenerationRequest."""
        return 0

    def texts(self) -> Texts:
        """See Texts."""
        text = self.input if isinstance(self.input, str) else "\n".join(self.input)
        return Texts(text, text)

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
