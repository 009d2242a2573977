"""Tests of the metrics of the latest decisions for MLflow: which decisions they are of, and from how many scores on."""

import numpy as np
import pytest
from msgspec import structs

from policies.evaluation.kind_figures import RecentFigures
from policies.evaluation.recent_metrics import (
    LEAST_VOTES,
    Window,
    kind_metrics,
)
from policies.events import FORCED, ArmEstimate, Decision, Feedback, Outcome, Record
from policies.types import Objective
from tests.support.requests import make_profile

OBJECTIVE = Objective(latency_weight=0.1, cost_weight=100.0)
PROFILE = make_profile()


class Played:
    """A window with the events of decisions that are made up one by one."""

    def __init__(self, size: int = 500):
        self.window = Window(size)
        self.kinds = RecentFigures()
        self.count = 0

    def answer(
        self, score: float | None = None, status: str = "ok", fallback: str = ""
    ) -> Record:
        """One decision with its outcome and, if given, its score."""
        estimates = (ArmEstimate("small", utility=0.3), ArmEstimate("large"))
        decision = Decision(
            f"d{self.count}",
            "small",
            self.count,
            "thompson-v1",
            PROFILE,
            OBJECTIVE,
            estimates,
            fallback,
        )
        self.count += 1
        record = Record(decision)
        self._add(decision, record)
        record.outcome = Outcome(decision.id, status, latency_s=0.5, cost_usd=1e-4)
        self._add(record.outcome, record)
        if score is not None:
            self.score(record, score)
        return record

    def score(self, record: Record, score: float, source: str = "user") -> None:
        if source in record.scores:
            record.corrected.add(source)
        record.scores[source] = score
        self._add(Feedback(record.decision.id, score, source), record)

    def _add(self, event: Decision | Outcome | Feedback, record: Record) -> None:
        self.window.add(event, record)
        self.kinds.record(event, record)


def test_a_score_of_few_votes_is_no_point() -> None:
    """One bad score of an hour would otherwise be drawn as the reward; the number of votes is logged all the same."""
    played = Played()
    for n in range(LEAST_VOTES):
        figures = played.window.figures()
        assert "score" not in figures and "reward" not in figures
        assert figures["votes"] == n
        played.answer(score=0.8)
    figures = played.window.figures()
    assert figures["score"] == pytest.approx(0.8) and figures["votes"] == LEAST_VOTES
    assert figures["reward"] == pytest.approx(0.8 - 0.1 * 0.5 - 100 * 1e-4)


def test_forced_requests_do_not_push_out_the_scores() -> None:
    """A benchmark of 5,000 requests to one model leaves the router's own figures as they were."""
    played = Played()
    for _ in range(30):
        played.answer(score=0.7)
    before = played.window.figures()
    for _ in range(5000):
        played.answer(score=0.0, fallback=FORCED, status="error")
    after = played.window.figures()
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed and all(name.startswith("forced/") for name in changed)
    assert after["forced/decisions_total"] == 5000 == after["forced/scores_total"]
    assert after["forced/cost_usd_total"] == pytest.approx(0.5)
    assert after["cost_usd_total"] == pytest.approx(30 * 1e-4)
    assert after["forced/availability"] == 0.0


def test_scores_of_few_answers_are_not_mixed_with_the_failures_of_all() -> None:
    """5 % scored, right in 0.95, 3 % failures: the truth is 0.92, and a mean over both would be 0.6."""
    rng = np.random.default_rng(3)
    played = Played()
    for _ in range(6000):
        failed = rng.random() < 0.03
        scored = not failed and rng.random() < 0.05
        played.answer(
            float(rng.random() < 0.95) if scored else None, "error" if failed else "ok"
        )
    figures = played.window.figures()
    assert figures["votes"] == 200
    assert figures["score"] == pytest.approx(0.95 * 0.97, abs=0.05)


def test_a_correction_is_no_second_vote() -> None:
    """Neither in the mean nor in the totals; a second source is a second score of the same vote."""
    played = Played()
    records = [played.answer(score=0.0) for _ in range(LEAST_VOTES)]
    for record in records:
        played.score(record, 1.0)
        played.score(record, 0.5, "judge")
    figures = played.window.figures()
    assert figures["score"] == pytest.approx(0.75) and figures["votes"] == LEAST_VOTES
    assert figures["feedback_total"] == 3 * LEAST_VOTES
    assert figures["scores_total"] == 2 * LEAST_VOTES
    assert figures["scored_total"] == LEAST_VOTES


def test_totals_continue_after_a_restart() -> None:
    """Each total of a window is a start value of the next one; unknown names are ignored."""
    played = Played()
    for fallback in ("", FORCED):
        for _ in range(3):
            played.answer(score=0.5, fallback=fallback)
    before = played.window.totals
    assert before["regret_total"] == 0.0 and before["decisions_total"] == 3
    again = Window(totals={**before, "of another release": 1.0})
    assert again.totals == before
    # a release that stored three totals only
    assert Window(totals={"cost_usd_total": 2.0}).totals["cost_usd_total"] == 2.0


def test_metrics_by_kind_leave_out_what_is_unknown_and_keep_a_zero() -> None:
    """An arm that was wrong four times has a line at 0; one without a score has none."""
    played = Played()
    played.answer()
    name = f"kind/{PROFILE.kind}/small"
    metrics = kind_metrics(played.kinds.table())
    assert f"{name}/score" not in metrics and metrics[f"{name}/votes"] == 0
    for _ in range(4):
        played.answer(score=0.0)
    metrics = kind_metrics(played.kinds.table())
    assert metrics[f"{name}/score"] == 0.0 and metrics[f"{name}/votes"] == 4
    assert metrics[f"{name}/availability"] == 1.0 and metrics[f"{name}/answers"] == 5
    assert f"{name}/tokens_per_s" not in metrics


def test_a_score_before_the_outcome_counts_once() -> None:
    """It waits for the outcome, which shows whether the answer has a flaw."""
    played = Played()
    for status in ("ok", "error"):
        for _ in range(LEAST_VOTES):
            record = played.answer()
            decision = structs.replace(record.decision, id=f"{record.decision.id}x")
            early = Record(decision)
            played.window.add(decision, early)
            early.scores["user"] = 0.4
            played.window.add(Feedback(decision.id, 0.4), early)
            early.outcome = Outcome(decision.id, status)
            played.window.add(early.outcome, early)
    figures = played.window.figures()
    assert figures["votes"] == LEAST_VOTES
    assert figures["availability"] == pytest.approx(0.75)
    assert figures["score"] == pytest.approx(0.75 * 0.4)
