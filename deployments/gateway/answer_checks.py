"""Checks the text of an answer while it is relayed: is it empty, and where JSON was requested, is it valid JSON?"""

import msgspec
from pydantic_core import from_json

from deployments.models.handle import Body

MAX_NESTING = 200  # levels that pydantic's parser reads, without Python's recursion
JSON_FORMATS = ("json_object", "json_schema")
JSON_OUTPUTS = {"json", "json_object"}  # kinds of vLLM's structured_outputs
STOPS = ("stop", "stop_token_ids")


class _Part(msgspec.Struct):
    """The message of an answer, or what a chunk of a stream adds to it; what the model thought is no part of it."""

    content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    """One of an answer's choices. A completion has its text here and not in a message."""

    index: int = 0
    delta: _Part | None = None
    message: _Part | None = None
    text: str | None = None


class _Payload(msgspec.Struct):
    """A whole answer, or a chunk of a stream: only the fields that are checked."""

    choices: list[_Choice] | None = None


_PAYLOAD = msgspec.json.Decoder(_Payload)


def wants_json(body: Body) -> bool:
    """Whether a request in OpenAI's shape asks for an answer in JSON."""
    wanted = body.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") in JSON_FORMATS:
        return True
    outputs = body.get("structured_outputs")
    return isinstance(outputs, dict) and bool(outputs.keys() & JSON_OUTPUTS)


class AnswerChecker:
    """Collects the text of one answer from the bytes for the client.

    The checker parses no more than it needs. It ignores an answer that it cannot parse.

    Args:
        task: one of types.TASKS.
        body: the request, in OpenAI's shape.
        keep_text: whether the caller needs the answer's text.

    Attributes:
        keeps_text: whether `text` is the complete answer.
    """

    def __init__(self, task: str, body: Body, keep_text: bool = False):
        self.body = body
        self._stream = bool(body.get("stream"))
        self._json = wants_json(body)
        self._limited = bool(
            body.get("max_tokens") or body.get("max_completion_tokens")
        )
        self._stops = any(body.get(name) for name in STOPS)
        self.keeps_text = keep_text or self._json
        self._texts: dict[int, str] = {}  # by choice
        self._tool_choices: set[int] = set()  # choices that call tools need no text
        self._disabled = task == "embed"

    def feed(self, payload: bytes) -> None:
        """Read the next bytes: whole events of a stream, or a whole answer."""
        if self._disabled or not payload:
            return
        try:
            for choice in self._choices(payload):
                self._add(choice)
        except (msgspec.DecodeError, RecursionError):
            self._disabled = True
            self._texts = {}
            return
        # a stream with some text in every choice is not empty, and only `keeps_text` needs the rest
        if self._stream and not self.keeps_text:
            self._disabled = all(text.strip() for text in self._texts.values())

    def _add(self, choice: _Choice) -> None:
        """Append the text of a choice, or of a part of one."""
        part = choice.delta or choice.message or _Part(choice.text)
        if part.tool_calls:
            self._tool_choices.add(choice.index)
        text = part.content or ""
        self._texts[choice.index] = self._texts.get(choice.index, "") + text

    def _choices(self, payload: bytes) -> list[_Choice]:
        if not self._stream:
            return _PAYLOAD.decode(payload).choices or []
        choices: list[_Choice] = []
        for line in payload.splitlines():
            data = line[5:].strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                choices += _PAYLOAD.decode(data).choices or []
        return choices

    @property
    def text(self) -> str:
        """The text of the answer's first choice."""
        return self._texts.get(0, "")

    def defect(self, finish_reason: str) -> str:
        """One of types.FLAWS, or "" for none. An answer that the client's own limits cut short has no defect."""
        texts = [
            text
            for index, text in self._texts.items()
            if index not in self._tool_choices
        ]
        if finish_reason == "length" and self._limited:
            return ""
        if any(not text.strip() for text in texts):
            return "" if self._stops or finish_reason == "length" else "empty"
        if self._json and not all(_is_json(text) for text in texts):
            return "invalid_json"
        return ""


def flaw_of(body: Body, payload: bytes, finish_reason: str) -> str:
    """The visible flaw of a whole answer to a chat or a completion; see AnswerChecker.defect."""
    checker = AnswerChecker("chat", body)
    checker.feed(payload)
    return checker.defect(finish_reason)


def _is_json(text: str) -> bool:
    """Whether a text is valid JSON. A text that is nested too deeply for the parser counts as valid."""
    try:
        from_json(text, cache_strings="none")
    except ValueError:
        return _is_deep(text)
    return True


def _is_deep(text: str) -> bool:
    """Whether the brackets of a text, outside of its strings, are nested deeper than MAX_NESTING."""
    depth = 0
    in_string = False
    escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = in_string
        elif character == '"':
            in_string = not in_string
        elif in_string:
            continue
        elif character in "[{":
            depth += 1
            if depth > MAX_NESTING:
                return True
        elif character in "]}":
            depth -= 1
    return False
