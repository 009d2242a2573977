"""The report of a calibration: its numbers, its intervals, and what it says of prices."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from policies.evaluation.size_comparison import (
    ALL,
    NOT_WORTH,
    UNCLEAR,
    WORTH,
    SizeAnswer,
    answer_of,
    compare_sizes,
    difference_interval,
    mean_interval,
    score_interval,
    student_quantile,
)
from policies.events import CALIBRATION, Decision, Outcome, Record
from policies.types import Objective
from tests.support.requests import make_profile


def given(
    arm: str,
    prompt: int,
    score: float | None,
    kind: str = "question",
    cost_usd: float = 1e-4,
    latency_s: float = 1.0,
    failed: bool = False,
) -> SizeAnswer:
    return SizeAnswer(
        f"p{prompt}", arm, kind, failed, score, latency_s, 10, 20, cost_usd
    )


def world(count: int = 60) -> list[SizeAnswer]:
    """Large is right in all strings and small in none; both are right in all questions. Large costs ten times more."""
    answers = []
    for i in range(count):
        kind = "strings" if i % 2 else "question"
        right = float(kind == "question")
        answers.append(given("small", i, right, kind))
        answers.append(given("large", i, 1.0, kind, cost_usd=1e-3, latency_s=2.0))
    return answers


def test_the_report_has_the_figures_of_each_size_and_kind() -> None:
    """Means over the answers; the sizes are ordered by their cost."""
    report = compare_sizes(world(), Objective(latency_weight=0.1, cost_weight=100.0))
    assert report.arms == ("small", "large")
    assert report.kinds == (ALL, "question", "strings")
    small = report.figures_of("small", ALL)
    assert small is not None and small.score.mean == 0.5 and small.score.n == 60
    assert small.latency_s.mean == 1.0 and small.latency_p95_s == 1.0
    assert small.output_tokens.mean == 20 and small.prompt_tokens.mean == 10
    assert small.utility.mean == pytest.approx(0.5 - 0.1 - 0.01)
    assert report.best == {ALL: "large", "question": "small", "strings": "large"}


def test_the_report_says_where_a_size_is_worth_its_price() -> None:
    """One score more for 1 s and 0.0009 USD is worth it up to a cost weight of (1 - 0.1) / 0.0009."""
    report = compare_sizes(world(), Objective(latency_weight=0.1, cost_weight=100.0))
    found = {comparison.kind: comparison for comparison in report.comparisons}
    assert found["strings"].verdict == WORTH and found["question"].verdict == NOT_WORTH
    assert found["strings"].worth_up_to == pytest.approx(0.9 / 0.0009)
    assert found["question"].worth_up_to is None
    assert found[ALL].utility.mean == pytest.approx(0.5 - 0.1 - 0.09)
    assert found[ALL].cheaper == "small" and found[ALL].score.n == 60
    few = compare_sizes(world(6), Objective(latency_weight=0.1, cost_weight=100.0))
    verdicts = {comparison.kind: comparison.verdict for comparison in few.comparisons}
    assert verdicts["question"] == UNCLEAR


def test_failed_and_ungraded_answers() -> None:
    """A failed answer has the score 0 and no latency in the mean; an answer without a grade is no score at all."""
    answers = [
        given("small", 0, 1.0),
        given("small", 1, 0.0, failed=True, latency_s=60.0),
        given("small", 2, None, latency_s=3.0),
    ]
    figures = compare_sizes(answers, Objective()).figures_of("small", ALL)
    assert figures is not None and figures.failed == 1
    assert (figures.score.mean, figures.score.n) == (0.5, 2)
    assert (figures.latency_s.mean, figures.latency_s.n) == (2.0, 2)
    only_failed = compare_sizes([replace(answers[1])], Objective())
    found = only_failed.figures_of("small", ALL)
    assert found is not None and found.latency_s.mean is None
    assert found.latency_p95_s is None and found.score.n == 1


def test_sizes_are_compared_on_the_prompts_that_both_answered() -> None:
    """Small answered the easy prompts only."""
    answers = [given("small", i, 1.0) for i in range(10)]
    answers += [given("large", i, float(i < 10), cost_usd=1e-3) for i in range(20)]
    (comparison, _) = compare_sizes(answers, Objective()).comparisons
    assert comparison.score.n == 10 and comparison.score.mean == 0.0


def test_a_report_without_answers_is_empty() -> None:
    """So it can be asked for before the first answer."""
    report = compare_sizes([], Objective())
    assert report.arms == () and report.figures == () and report.best == {}


def test_a_record_becomes_an_answer() -> None:
    """The wait in the queue is no latency; a visible flaw is a failure whatever the score."""
    decision = Decision(
        "d", "small", 0, "v", make_profile(), Objective(), fallback=CALIBRATION
    )
    record = Record(decision)
    assert answer_of(record, "p") is None
    record.outcome = Outcome("d", latency_s=3.0, waited_s=1.0, output_tokens=4)
    record.scores = {CALIBRATION: 0.5, "user": 0.0}
    found = answer_of(record, "p")
    assert found is not None
    assert (found.latency_s, found.score, found.failed) == (2.0, 0.5, False)
    record.outcome = Outcome("d", flaw="empty")
    found = answer_of(record, "p")
    assert found is not None and (found.score, found.failed) == (0.0, True)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 30, 200])
def test_students_quantile(freedom: int) -> None:
    """Against scipy, at the levels that are used."""
    for level in (0.9, 0.95):
        found = student_quantile((1 + level) / 2, freedom)
        assert found == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=0.02)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("n", [15, 60])
def test_the_intervals_hold_as_often_as_they_say(p: float, n: int) -> None:
    """2,000 calibrations each: between 92 and 99 % of the 95 % intervals hold the true value.

    Two sizes that rarely differ have wider intervals than needed.
    """
    rng = np.random.default_rng(int(1000 * p) + n)
    held = np.zeros(3)
    runs = 2000
    for _ in range(runs):
        scores = (rng.random(n) < p).astype(float)
        other = (rng.random(n) < 0.6).astype(float)
        seconds = rng.gamma(4.0, 0.25, n)
        for i, (found, truth) in enumerate(
            (
                (score_interval(scores, 0.95), p),
                (mean_interval(seconds, 0.95), 1.0),
                (
                    difference_interval(other - scores - 0.1, -0.1, 0.95),
                    0.6 - p - 0.1,
                ),
            )
        ):
            assert found.lower is not None and found.upper is not None
            held[i] += found.lower <= truth <= found.upper
    assert ((held / runs > 0.92) & (held / runs <= 0.995)).all(), held / runs


def test_equal_answers_to_few_prompts_do_not_prove_that_two_sizes_are_equal() -> None:
    """The interval of ten differences of zero is wide, and that of a thousand is narrow."""
    few = difference_interval(np.zeros(10), 0.0, 0.95)
    many = difference_interval(np.zeros(1000), 0.0, 0.95)
    assert few.upper is not None and 0.1 < few.upper < 0.3 and few.mean == 0.0
    assert many.upper is not None and many.upper < 0.005
