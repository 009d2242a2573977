"""The number of tokens of a text, and what its count costs."""

from typing import Any

import pytest

from deployments.profiler.reader import MAX_COUNTED, count_tokens


class Words:
    """A tokenizer whose tokens are words; it notes the longest text that it got."""

    def __init__(self) -> None:
        self.longest = 0

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        self.longest = max(self.longest, len(text))
        assert not add_special_tokens
        return text.split()


@pytest.mark.parametrize("length", [10, MAX_COUNTED, 10 * MAX_COUNTED])
def test_the_tokens_of_any_text_are_counted_at_a_bounded_cost(length: int) -> None:
    """A text up to the limit is counted exactly, a longer one within a percent if it is alike throughout."""
    text = ("word " * length)[:length]
    tokenizer = Words()
    tokens = count_tokens(tokenizer, text, messages=0)
    assert tokenizer.longest <= MAX_COUNTED
    exact = len(text.split())
    assert (
        tokens == exact if length <= MAX_COUNTED else abs(tokens - exact) < exact / 100
    )


def test_both_ends_of_a_long_text_count() -> None:
    """A text whose tokens are all at its end has tokens."""
    text = " " * 5 * MAX_COUNTED + "a " * MAX_COUNTED
    assert count_tokens(Words(), text, messages=0) > MAX_COUNTED // 2
