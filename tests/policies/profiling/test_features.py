"""The features and the profile of a text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.profiling.features import (
    EMBEDDING_COLUMNS,
    KINDS,
    MANY_CLAUSES,
    MOST_CLAUSES,
    NAMES,
    D,
    Reading,
    profile,
)
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


def test_complexity_rises_with_numbers_and_clauses() -> None:
    """A greeting, a sum of digits and a story with many numbers are in this order, and the reasons say why."""
    texts = ["Hello there", "What is 3 plus 5?", COMPLEX]
    found = [make_profile(text) for text in texts]
    assert found[0].complexity < found[1].complexity < found[2].complexity
    assert any("numbers" in reason for reason in found[2].reasons)


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("", 0),
        ("Hello there", 0),
        ("Read it, sum it up; then check it: is it right?", 4),
        ("Prüfe es, fasse es zusammen, antworte.", 3),
        ("把它读一遍，总结一下，然后检查。对吗？", 4),
        ("読んで、要約して、確認してください。", 3),
        ("इसे पढ़ो, समझाओ और जाँचो। क्या यह सही है?", 3),
        ("اقرأه، ثم لخّصه؛ هل هو صحيح؟", 3),
        ("1. read\n2. sort\r\n3. print", 5),
        ("Wait... what?!", 2),
        ('He said "yes," and (perhaps!) went.', 3),
        ("3.5 and 1,000 at 12:30 on www.example.org/a?b", 0),
    ],
)
def test_clauses_are_counted_in_every_script(text: str, clauses: int) -> None:
    """By the marks that end them; a mark within a number or an address ends nothing, and a row of marks counts once."""
    found = make_profile(text)
    assert found.features[NAMES.index("clauses")] == clauses / MOST_CLAUSES
    assert (f"{clauses} clauses" in found.reasons) == (clauses >= MANY_CLAUSES)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("Sum it up.", "Read it, sum it up, check it, and say what is missing."),
        ("总结一下。", "读一遍，总结一下，检查一下，然后说缺了什么。"),
        ("Tóm tắt.", "Đọc nó, tóm tắt nó, kiểm tra nó, rồi nói điều gì còn thiếu."),
    ],
)
def test_a_text_of_more_clauses_is_more_complex(short: str, long: str) -> None:
    """In a language with spaces and in one without."""
    reading = Reading("writing")
    few, many = (profile(text, reading, None, "chat", 9) for text in (short, long))
    assert few.complexity < many.complexity
    assert "4 clauses" in many.reasons


def test_the_count_of_clauses_ends_at_a_bound() -> None:
    """So a long text takes no longer, and the reason says that there may be more."""
    found = profile("a, " * 500, Reading(), None, "chat", 9)
    assert found.features[NAMES.index("clauses")] == 1
    assert "16 or more clauses" in found.reasons


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
