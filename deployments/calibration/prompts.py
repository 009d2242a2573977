"""Reads PROMPTS.jsonl: one JSON object a line.

    {"prompt": "What is 2 plus 2?", "reference": "4", "grade": "number", "max_tokens": 50}
    {"messages": [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}]}

`reference` and `grade` (grading.py, by default exact) are optional: without a reference a judge or a program grades.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from deployments.calibration.grading import check_pattern, check_reference
from deployments.calibration.records import Message, Prompt
from deployments.model_settings import StrictModel

MAX_PROMPTS = 2_000  # of one calibration
MAX_CHARS = 100_000  # of one message
MAX_MESSAGES = 64
MAX_REFERENCE = 4_000  # characters
MOST_ERRORS = 10  # that one message names


class PromptMessage(StrictModel):
    """One message of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1, max_length=MAX_CHARS)


class PromptLine(StrictModel):
    """One line of PROMPTS.jsonl, and one prompt in the body of a request."""

    prompt: str | None = Field(None, min_length=1, max_length=MAX_CHARS)
    messages: list[PromptMessage] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES
    )
    reference: (
        str
        | StrictBool
        | StrictInt
        | StrictFloat
        | list[object]
        | dict[str, object]
        | None
    ) = None
    grade: Literal["exact", "regex", "number", "json"] | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _consistent(self) -> "PromptLine":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('give either "prompt" or "messages"')
        if self.reference is None and self.grade is not None:
            raise ValueError('"grade" needs a "reference"; add one, or remove "grade"')
        if self.reference is not None:
            text = self._reference_text()
            if not text.strip():
                raise ValueError(
                    "the reference is empty; remove it, and a judge grades"
                )
            if len(text) > MAX_REFERENCE:
                raise ValueError(
                    f"the reference is longer than {MAX_REFERENCE} characters; shorten it"
                )
            check_reference(self.grade or "exact", text)
        return self

    def _reference_text(self) -> str:
        if self.reference is None:
            return ""
        if isinstance(self.reference, str):
            return self.reference
        return json.dumps(self.reference, ensure_ascii=False)

    def check_pattern(self) -> None:
        """Refuse a reference that is to be, and is not, a regular expression.

        Raises:
            ValueError: the message says what to change.
        """
        if self.grade == "regex":
            check_pattern(self._reference_text())

    def record(self) -> Prompt:
        """The prompt as the other modules know it."""
        if self.messages is not None:
            messages = tuple(Message(m.role, m.content) for m in self.messages)
        else:
            messages = (Message("user", self.prompt or ""),)
        return Prompt(
            messages=messages,
            reference=self._reference_text(),
            rule=self.grade or "exact",
            max_tokens=self.max_tokens or 0,
        )


def read_prompts(path: Path) -> list[PromptLine]:
    """The prompts of a file, each once.

    Raises:
        ValueError: the message names each wrong line, and says what to change.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    prompts: dict[Prompt, PromptLine] = {}
    wrong = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parsed = PromptLine.model_validate_json(line)
            parsed.check_pattern()
        except ValidationError as error:
            wrong.append(f"{path}, line {number}: {_problem(error)}")
        except ValueError as error:
            wrong.append(f"{path}, line {number}: {error}")
        else:
            prompts.setdefault(parsed.record(), parsed)
    if wrong:
        more = len(wrong) - MOST_ERRORS
        rest = [f"and {more} more lines"] if more > 0 else []
        raise ValueError("\n".join(wrong[:MOST_ERRORS] + rest))
    if not prompts:
        raise ValueError(
            f'{path} has no prompts; write one JSON object a line: {{"prompt": "…"}}'
        )
    return list(prompts.values())


def _problem(error: ValidationError) -> str:
    """The first problem of a line, in words."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return f"no JSON object ({reason}); write one object a line"
    if first["type"] in ("model_type", "dict_type") and not where:
        return 'no JSON object; write {"prompt": "…"}'
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(first["loc"][-1]), PromptLine.model_fields, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "remove it"
        return f"unknown key '{where}'; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def sample(prompts: Sequence[PromptLine], most: int) -> list[PromptLine]:
    """At most so many prompts, in a random order that depends on the texts alone.

    A file gives the same sample each time, and a larger sample begins with the smaller one. The order mixes the kinds
    of work, because many answers of one kind in a row look like a change of the arm.
    """
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(prompt.model_dump_json().encode())
    order = list(prompts)
    random.Random(digest.digest()).shuffle(order)
    return order[:most]
