"""The parameters of a chat."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from deployments.errors import field_error
from deployments.grammars.bounds import check_tools, compiled_tools
from deployments.media.medium import MAX_MEDIA, Medium
from deployments.model_settings import THINKING_SWITCHES, Effort
from deployments.parameters.generation import GenerationRequest, Texts
from deployments.parameters.messages import Message
from deployments.parameters.needs import Need
from deployments.parameters.structured_outputs import MAX_SCHEMA
from deployments.parameters.values import (
    MAX_TOKENS,
    Flag,
    Free,
    Listed,
    Metadata,
    Name,
    Unsupported,
    Whole,
    short,
)
from deployments.parameters.vllm import EngineChatParameters, RefusedChatParameters
from policies.capabilities import Capability

MAX_TOOLS = 128_000  # characters of JSON
Tool = Annotated[Free, AfterValidator(lambda tool: short(tool, MAX_SCHEMA))]
Tools = Annotated[
    Listed[Tool],
    Field(max_length=128),
    AfterValidator(lambda tools: short(tools, MAX_TOOLS)),
]


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


class ChatRequest(EngineChatParameters, RefusedChatParameters, GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Listed[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: Whole | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: Flag | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: Name | Free | None = None
    parallel_tool_calls: Flag | None = None
    functions: Annotated[None, BeforeValidator(Unsupported("send tools"))] = Field(
        None, exclude=True
    )
    function_call: Annotated[None, BeforeValidator(Unsupported("send tool_choice"))] = (
        Field(None, exclude=True)
    )
    audio: Annotated[
        None, BeforeValidator(Unsupported("the models answer in text only"))
    ] = Field(None, exclude=True)
    web_search_options: Annotated[
        None, BeforeValidator(Unsupported("the models cannot search"))
    ] = Field(None, exclude=True)
    modalities: Listed[Literal["text"]] | None = Field(None, max_length=8, exclude=True)
    metadata: Metadata | None = Field(None, exclude=True)
    reasoning_effort: Effort | None = None
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

    @model_validator(mode="after")
    def _check_labels(self) -> "ChatRequest":
        if self.logprob_token_ids is not None and not self.logprobs:
            raise field_error("logprob_token_ids", "needs logprobs: true; add it")
        return self

    @model_validator(mode="after")
    def _check_last_message(self) -> "ChatRequest":
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error(
                "continue_final_message",
                "cannot be true beside add_generation_prompt; leave one out",
            )
        return self

    @model_validator(mode="after")
    def _check_outputs(self) -> "ChatRequest":
        if self.structured_outputs is not None and self.forces_tools:
            raise field_error(
                "structured_outputs",
                "cannot bind an answer that must call a tool; leave one out",
            )
        return self

    @model_validator(mode="after")
    def _check_media(self) -> "ChatRequest":
        if sum(1 for _ in self.media()) > MAX_MEDIA:
            raise field_error(
                "messages",
                f"have more than {MAX_MEDIA} images, audio and videos; send fewer",
            )
        return self

    def media(self) -> Iterator[tuple[str, Medium]]:
        """The images, audio and videos of all messages, each with the path of its message's content."""
        for i, message in enumerate(self.messages):
            for medium in message.media:
                yield f"messages.{i}.content", medium

    @property
    def forces_tools(self) -> bool:
        """Whether the model must call a tool."""
        return bool(self.tools) and self.tool_choice not in (None, "none", "auto")

    @property
    def thinks(self) -> str | None:
        """The parameter that asks the model to think; None if none does."""
        for name in THINKING_SWITCHES:
            if (self.chat_template_kwargs or {}).get(name) is True:
                return f"chat_template_kwargs.{name}"
        return None

    def needs(self) -> list[Need]:
        """See GenerationRequest."""
        needs = GenerationRequest.needs(self)
        if self.calls_tools:
            kind = Capability.FORCED_TOOLS if self.forces_tools else Capability.TOOLS
            needs.append(Need(kind, "tools"))
            if self.parallel_tool_calls:
                needs.append(Need(Capability.PARALLEL_TOOLS, "parallel_tool_calls"))
        if self.logprobs:
            needs.append(Need(Capability.LOGPROBS, "logprobs"))
        places: dict[Capability, str] = {}
        for where, medium in self.media():
            places.setdefault(medium.capability, where)
        needs += [Need(capability, where) for capability, where in places.items()]
        if (switch := self.thinks) is not None:
            needs.append(Need(Capability.THINKING, switch))
        return needs

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
        body = GenerationRequest.body(request)
        if self.continue_final_message:
            body["add_generation_prompt"] = False
        return body

    def texts(self) -> Texts:
        """What the model reads; see Texts."""
        user_messages = [m for m in self.messages if m.role == "user"]
        last = user_messages[-1] if user_messages else self.messages[-1]
        context = "".join(m.text() for m in self.messages)
        tokens = sum(medium.tokens for _, medium in self.media())
        return Texts(last.text(), context, len(self.messages), media_tokens=tokens)
