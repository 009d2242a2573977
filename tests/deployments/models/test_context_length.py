"""A request that is too long: vLLM's errors become the one that the gateway gives."""

from typing import Any

import pytest

from deployments.models import context_length

HEAD = "This model's maximum context length is 512 tokens. However, you requested "
CHAT: dict[str, Any] = {"messages": []}
# vLLM's messages, the request, and the parameter at fault
ERRORS = [
    (
        f"{HEAD}500 output tokens and your prompt contains at least 13 input tokens, "
        "for a total of at least 513 tokens.",
        {**CHAT, "max_tokens": 500},
        "max_tokens",
    ),
    (
        f"{HEAD}512 output tokens and your prompt contains 42 characters (more than 0 characters, which is the upper "
        "bound for 0 input tokens).",
        {**CHAT, "max_completion_tokens": 512},
        "max_completion_tokens",
    ),
    (
        f"{HEAD}0 output tokens and your prompt contains at least 513 input tokens, "
        "for a total of at least 513 tokens.",
        CHAT,
        "messages",
    ),
    (
        f"{HEAD}0 output tokens and your prompt contains 90000 characters (more than 5000 characters, which is the "
        "upper bound for 512 input tokens).",
        CHAT,
        "messages",
    ),
    (
        f"{HEAD}16 output tokens and your prompt contains at least 497 input tokens, "
        "for a total of at least 513 tokens.",
        {"prompt": "7"},
        "prompt",
    ),
    (
        "The decoder prompt (length 600) is longer than the maximum model length of 512. Make sure that "
        "`max_model_len` is no smaller than the number of text tokens.",
        {"prompt": "7", "max_tokens": 5},
        "prompt",
    ),
    (
        "The decoder prompt (length 512) plus the number of requested output tokens (at least 1) is longer than the "
        "maximum model length of 512. Make sure that `max_model_len` is no smaller.",
        CHAT,
        "messages",
    ),
    (
        f"{HEAD}0 output tokens and your prompt contains 513 input tokens, "
        "for a total of 513 tokens.",
        {"input": "7"},
        "input",
    ),
]


@pytest.mark.parametrize(("message", "body", "param"), ERRORS, ids=range(len(ERRORS)))
def test_vllms_errors_become_one(
    message: str, body: dict[str, Any], param: str
) -> None:
    """OpenAI's code and words, and a parameter that the request has; nothing of the engine's."""
    error = context_length.from_engine(message, body)
    assert error is not None
    assert (error.status, error.param) == (400, param)
    assert error.code == "context_length_exceeded"
    assert error.message.startswith("This model's maximum context length is 512 tokens")
    assert "characters" not in error.message and "max_model_len" not in error.message


def test_other_errors_are_left_as_they_are() -> None:
    assert context_length.from_engine("temperature must be in [0, 2]", CHAT) is None


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (CHAT, 0),
        ({**CHAT, "max_tokens": 5}, 5),
        ({**CHAT, "max_tokens": 5, "max_completion_tokens": 7}, 7),
        ({"prompt": "a"}, 16),
        ({"prompt": "a", "max_tokens": 0}, 0),
        ({"input": "a"}, 0),
    ],
    ids=str,
)
def test_room_for_the_answer(body: dict[str, Any], tokens: int) -> None:
    """The client's limit; for a completion OpenAI's default; for a chat and an embedding none."""
    assert context_length.answer_tokens(body) == tokens
