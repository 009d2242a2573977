"""What a model thought before its answer: under both names that clients read.

vLLM calls it `reasoning`, as OpenAI's newer clients do; DeepSeek's API and the clients made for it call it
`reasoning_content`.
"""

import json
from typing import Any

import msgspec

NAMES = ("reasoning", "reasoning_content")
DATA = "data: "
# what a chunk of vLLM's has only if it has some thinking; in a text of the model's the quotes would be escaped
MARKS = tuple(f'"{name}":"' for name in NAMES)


def name_thinking(message: dict[str, Any]) -> None:
    """Give the thinking of a message, or of what a chunk adds to one, both names; in place."""
    for name, other in (NAMES, NAMES[::-1]):
        if message.get(name) and not message.get(other):
            message[other] = message[name]


def with_both_names(event: str) -> str:
    """An event of vLLM's stream; what it has of thinking has both names.

    Args:
        event: one or several lines with data; events without thinking are returned as they are.
    """
    if not any(mark in event for mark in MARKS):
        return event
    return "\n".join(_with_both_names(line) for line in event.split("\n"))


def _with_both_names(line: str) -> str:
    if not line.startswith(DATA) or not any(mark in line for mark in MARKS):
        return line
    chunk = json.loads(line.removeprefix(DATA))
    for choice in chunk.get("choices", ()):
        name_thinking(choice.get("delta") or {})
    return DATA + msgspec.json.encode(chunk).decode()
