"""What a model thought has both names, in whole answers and in streams; it counts as tokens and is no answer."""

import json
from typing import Any

import pytest

from deployments.models.thinking import name_thinking, with_both_names

THOUGHT = '3 and 5\n\ndata: are 8, "reasoning":"no"'


def chunk(**delta: Any) -> str:
    """An event as vLLM writes it."""
    content = {"id": "a", "choices": [{"index": 0, "delta": delta}]}
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def deltas(events: str) -> list[dict[str, Any]]:
    """What the events add."""
    lines = [line for line in events.split("\n") if line.startswith("data: {")]
    return [json.loads(line[6:])["choices"][0]["delta"] for line in lines]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thinking_in_a_stream_has_both_names(name: str) -> None:
    """Other events stay byte for byte; several events may come in one text."""
    said = chunk(content='"reasoning":"x"') + "data: [DONE]\n\n"
    assert with_both_names(said) == said
    found = deltas(with_both_names(chunk(**{name: THOUGHT}) + said))
    assert found[0] == {"reasoning": THOUGHT, "reasoning_content": THOUGHT}
    assert found[1] == {"content": '"reasoning":"x"'}


def test_thinking_in_a_message_has_both_names() -> None:
    """A message without any has neither."""
    for given in ({"reasoning": "a"}, {"reasoning_content": "a"}):
        message = {"content": "b", **given}
        name_thinking(message)
        assert message["reasoning"] == message["reasoning_content"] == "a"
    message = {"content": "b", "reasoning": None}
    name_thinking(message)
    assert "reasoning_content" not in message
