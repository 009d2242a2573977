"""Reads along while an answer passes by: is there anything in it, and is it JSON where JSON was asked for?"""

import json
from typing import Any

JSON_FORMATS = ("json_object", "json_schema")


class Listener:
    """Hears the bytes of one answer; what it need not know it does not parse, and what it cannot read it lets pass.

    Args:
        task: one of types.TASKS.
        body: the request, in OpenAI's shape.
        keep: whether the answer's text is wanted.

    Attributes:
        whole: whether `text` is all that was said.
    """

    def __init__(self, task: str, body: dict[str, Any], keep: bool = False):
        self.body = body
        self._stream = bool(body.get("stream"))
        self._json = (body.get("response_format") or {}).get("type") in JSON_FORMATS
        self._limited = bool(body.get("max_tokens") or body.get("max_completion_tokens"))
        self._stops = bool(body.get("stop"))
        self.whole = keep or self._json
        self._texts: dict[int, str] = {}  # by choice
        self._called: set[int] = set()  # choices that call tools, which need no text
        self._deaf = task == "embed"

    def hear(self, payload: bytes) -> None:
        """Take in the next bytes: whole events of a stream, or a whole answer."""
        if self._deaf or not payload:
            return
        try:
            for choice in self._choices(payload):
                said = choice.get("delta") or choice.get("message") or choice
                index = int(choice.get("index", 0))
                if said.get("tool_calls"):
                    self._called.add(index)
                self._texts[index] = self._texts.get(index, "") + (said.get("content") or said.get("text") or "")
        except (ValueError, TypeError, AttributeError, RecursionError):
            self._deaf, self._texts = True, {}
            return
        # a stream that has begun to speak is not empty: the rest matters only to those who want all of it
        self._deaf = self._stream and not self.whole and all(text.strip() for text in self._texts.values())

    def _choices(self, payload: bytes) -> list[dict[str, Any]]:
        if not self._stream:
            return list(json.loads(payload).get("choices") or ())
        lines = (line[5:].strip() for line in payload.splitlines() if line.startswith(b"data:"))
        return [choice for line in lines if line != b"[DONE]" for choice in json.loads(line).get("choices") or ()]

    @property
    def text(self) -> str:
        """What was said, its first choice."""
        return self._texts.get(0, "")

    def flaw(self, finish_reason: str) -> str:
        """One of types.FLAWS, or "": nothing is held against a model that obeyed the client's own limits."""
        spoken = [text for index, text in self._texts.items() if index not in self._called]
        if finish_reason == "length" and self._limited:
            return ""
        if any(not text.strip() for text in spoken):
            return "" if self._stops or finish_reason == "length" else "empty"
        if self._json and not all(_is_json(text) for text in spoken):
            return "invalid_json"
        return ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    except RecursionError:  # too deep for this reader, which is no mistake of the model
        return True
    return True
