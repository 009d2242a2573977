"""The messages of a chat."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from deployments.errors import field_error
from deployments.media.audio import AudioUrl, InputAudio
from deployments.media.images import ImageUrl
from deployments.media.medium import Medium
from deployments.media.video import VideoUrl
from deployments.model_settings import StrictModel
from deployments.parameters.values import Free, Listed, Name, Text, Unsupported, small

MAX_PARTS = 2_048  # of one message
MEDIA = ("image_url", "input_audio", "audio_url", "video_url")
OTHER_PARTS = ("input_image", "file")


def _known_part(kind: object) -> object:
    """Refuse kinds of parts that OpenAI's API has and no model here takes."""
    if kind in OTHER_PARTS:
        raise ValueError(
            f"'{kind}' is not supported here; send text, image_url, input_audio, audio_url or video_url"
        )
    return kind


class Part(StrictModel):
    """One piece of a message's content: a text or a medium."""

    type: Annotated[
        Literal["text", "image_url", "input_audio", "audio_url", "video_url"],
        BeforeValidator(_known_part),
    ]
    text: Text | None = None
    image_url: ImageUrl | None = None
    input_audio: InputAudio | None = None
    audio_url: AudioUrl | None = None
    video_url: VideoUrl | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> "Part":
        for name in ("text", *MEDIA):
            given = getattr(self, name) is not None
            if given is not (name == self.type):
                problem = "is missing; send it"
                if given:
                    problem = f"does not belong to a part of the type '{self.type}'"
                raise field_error(name, problem)
        return self

    @property
    def medium(self) -> Medium | None:
        """The image, audio or video of the part; None for a text."""
        found: Medium | None = None
        if self.type in MEDIA:
            found = getattr(self, self.type)
        return found


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
        small(read)
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
    content: Text | Annotated[Listed[Part], Field(max_length=MAX_PARTS)] | None = None
    name: Name | None = None
    tool_calls: Listed[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: Name | None = None
    # clients send answers of OpenAI and others back unchanged; the models do not use these fields of them
    refusal: Text | None = Field(None, exclude=True)
    annotations: Listed[Free] | None = Field(None, max_length=128, exclude=True)
    reasoning: Text | None = Field(None, exclude=True)
    reasoning_content: Text | None = Field(None, exclude=True)
    audio: Annotated[None, BeforeValidator(Unsupported("leave it out"))] = Field(
        None, exclude=True
    )
    function_call: Annotated[None, BeforeValidator(Unsupported("send tool_calls"))] = (
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
        if self.media and self.role != "user":
            raise field_error(
                "content", f"a message of the role '{self.role}' has text only"
            )
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
            change["content"] = self._joined() if self.media else self.text()
        elif self.content is None and not self.tool_calls:
            change["content"] = self.refusal or ""
        return self.model_copy(update=change) if change else self

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or self.refusal or ""

    @property
    def media(self) -> list[Medium]:
        """The images, audio and videos of the content, in their order."""
        if not isinstance(self.content, list):
            return []
        return [part.medium for part in self.content if part.medium is not None]

    def _joined(self) -> list[Part]:
        """The parts, where texts that follow each other are one."""
        parts: list[Part] = []
        for part in self.content if isinstance(self.content, list) else ():
            if parts and part.text is not None and parts[-1].text is not None:
                text = parts[-1].text + part.text
                parts[-1] = part.model_copy(update={"text": text})
            else:
                parts.append(part)
        return parts
