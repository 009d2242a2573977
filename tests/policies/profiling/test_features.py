"""The features and the profile of a text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.profiling.features import EMBEDDING_COLUMNS, KINDS, D
from tests.support.requests import make_profile

COMPLEX = "Ann has 384 apples and buys 7 bags of 219 apples, and then gives 12 to each of 5 friends. How many are left?"


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_has_bounded_features(text: str) -> None:
    """No prompt has features far from those of all others, so none can dominate a linear model."""
    found = make_profile(text, embedding=np.ones(EMBEDDING_COLUMNS) / 4)
    assert found.features.shape == (D,) and np.abs(found.features).max() <= 1
    assert 0 <= found.complexity <= 1 and found.kind in KINDS


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("def f(x): return x  # why does this fail?", "code"),
        ("Translate 'good morning' into French", "translation"),
        ("Summarise this article: ...", "extraction"),
        ("What is 37 times 4?", "arithmetic"),
        ("Which is larger, 570 or 718?", "arithmetic"),
        ("¿Cuánto es 347 más 586?", "arithmetic"),
        ("Reverse the word planet.", "strings"),
        ("Write a poem about autumn", "writing"),
        ("Who was the first emperor of Rome?", "question"),
        ("In what year did it begin, 1914 or 1939?", "question"),
        ("hm", "other"),
    ],
)
def test_the_kind_of_work_is_recognised(text: str, kind: str) -> None:
    """Also where no word of the question names it."""
    assert make_profile(text).kind == kind


def test_complexity_rises_with_numbers_and_steps() -> None:
    """A greeting, a sum of digits and a story with many numbers are in this order, and the reasons say why."""
    texts = ["Hello there", "What is 3 plus 5?", COMPLEX]
    found = [make_profile(text) for text in texts]
    assert found[0].complexity < found[1].complexity < found[2].complexity
    assert any("numbers" in reason for reason in found[2].reasons)


def test_sensitivities_are_read() -> None:
    """`exactly` and `carefully` mean accuracy, `quickly` and `urgent` mean time, `breakfast` means neither."""
    careful = make_profile("Tell me exactly what 3 plus 5 is.")
    hasty = make_profile("Urgent: what is 3 plus 5?")
    neither = make_profile("What is a good breakfast?")
    assert (careful.accuracy_sensitivity, careful.time_sensitivity) == (1, 0)
    assert (hasty.accuracy_sensitivity, hasty.time_sensitivity) == (0, 1)
    assert (neither.accuracy_sensitivity, neither.time_sensitivity) == (0, 0)
    assert "asks for accuracy" in careful.reasons


def test_without_an_embedding_its_columns_are_zero() -> None:
    """A late profiler costs the embedding, not the decision."""
    found = make_profile("What is 3 plus 5?")
    assert (
        not found.features[1 : 1 + EMBEDDING_COLUMNS].any()
        and found.features[1 + EMBEDDING_COLUMNS :].any()
    )


def test_the_prior_length_is_that_of_the_kind_of_work() -> None:
    """An essay is longer than a sorted list; the client's limit does not change the length that forecasts use."""
    essay, listed = (
        make_profile(text) for text in ("Write an essay.", "Sort these: 3 1 2")
    )
    assert essay.output_tokens > listed.output_tokens > 0
    limited = make_profile("Write an essay.", limit=7)
    assert (
        limited.output_tokens == essay.output_tokens and limited.max_output_tokens == 7
    )
