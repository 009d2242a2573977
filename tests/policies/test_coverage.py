"""Coverage: the rate of scores among the answers without a visible flaw, by arm and kind."""

import numpy as np
import pytest

from policies.coverage import FeedbackCoverage
from policies.events import Decision, Outcome, Record
from policies.types import Objective
from tests.support.requests import make_profile

ARITHMETIC = "What is 3 plus 5?"
WRITING = "Write a poem about the sea"


def record(
    n: int, arm: str = "small", text: str = ARITHMETIC, scored: bool = False, **of: str
) -> Record:
    """A finished answer."""
    decision = Decision(f"d{n}", arm, n, "v", make_profile(text), Objective())
    scores = {"user": 1.0} if scored else {}
    return Record(decision, Outcome(decision.id, **of), scores)  # type: ignore[arg-type]


def test_the_rate_is_that_of_the_arm_and_the_kind() -> None:
    """Cells with enough answers have their own rate; a new arm gets that of the kind, a new kind that of all."""
    rng = np.random.default_rng(0)
    records = []
    for n in range(8000):
        text = ARITHMETIC if n % 2 else WRITING
        rate = 0.2 if text == ARITHMETIC else 0.02
        records.append(record(n, text=text, scored=bool(rng.random() < rate)))
    coverage = FeedbackCoverage.of(records)
    assert coverage.rate(record(0)) == pytest.approx(0.2, rel=0.1)
    assert coverage.rate(record(0, text=WRITING)) == pytest.approx(0.02, rel=0.35)
    assert coverage.rate(record(0, arm="new")) == pytest.approx(0.2, rel=0.1)
    code = record(0, text="def f(): return 1  # python")
    assert coverage.rate(code) == pytest.approx(0.11, rel=0.15)


def test_a_weighted_mean_over_flaws_and_scores_is_the_mean_of_all_answers() -> None:
    """3 % of the answers fail and are always seen; of the others, which are all right, 5 % are scored."""
    rng = np.random.default_rng(1)
    records = []
    for n in range(20_000):
        status = "error" if rng.random() < 0.03 else "ok"
        scored = status == "ok" and bool(rng.random() < 0.05)
        records.append(record(n, scored=scored, status=status))
    coverage = FeedbackCoverage.of(records)
    seen = [r for r in records if r.flaw or r.vote is not None]
    values = [0.0 if r.flaw else 1.0 for r in seen]
    plain = np.mean(values)
    weighted = np.average(values, weights=[coverage.weight(r) for r in seen])
    assert plain < 0.7 and weighted == pytest.approx(0.97, abs=0.005)


def test_without_answers_every_rate_is_1() -> None:
    """Nothing is known, so nothing is divided."""
    assert FeedbackCoverage().rate(record(0)) == 1.0


def test_the_counts_can_be_restored() -> None:
    """A restart keeps the rates."""
    coverage = FeedbackCoverage.of(record(n, scored=n % 3 == 0) for n in range(90))
    other = FeedbackCoverage()
    other.restore(coverage.state())
    assert other.rate(record(0)) == coverage.rate(record(0)) == pytest.approx(1 / 3)
