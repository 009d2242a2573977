"""Tests of the figures by arm and kind: what is counted, with which n, and what is unknown."""

import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from msgspec import structs

from policies.evaluation.kind_figures import (
    Counts,
    Figures,
    RecentFigures,
    Totals,
    interval,
)
from policies.events import (
    ANY_OWNER,
    FORCED,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
)
from policies.feedback.decision_records import DecisionRecords, History
from policies.profiling.features import KINDS
from policies.types import Objective
from tests.support.requests import make_profile

CODE = "Write a python function"
ARITHMETIC = "3 + 5"
TEXTS = {"code": CODE, "arithmetic": ARITHMETIC}


class Log:
    """Decisions with outcomes and scores, as the router's records would pass them on."""

    def __init__(self, size: int = 2000):
        self.figures = RecentFigures(size)
        self.totals = Totals()
        self.records = DecisionRecords(
            history=History(keeps_unknown=True), projection=self
        )
        self.count = 0

    def record(self, event: Event, record: Record) -> None:
        self.figures.record(event, record)
        self.totals.add(event, record)

    def apply(self, *events: Event) -> None:
        for event in events:
            self.records.apply(event, None)

    def answer(
        self,
        arm: str = "small",
        kind: str = "code",
        score: float | None = None,
        fallback: str = "",
        **outcome: object,
    ) -> str:
        """An answer; returns its decision's id."""
        events = make_events(f"d{self.count}", arm, kind, score, fallback, **outcome)
        self.count += 1
        self.apply(*events)
        return events[0].id  # type: ignore[union-attr]

    def of(self, arm: str = "small", kind: str = "code") -> Figures:
        return self.figures.table().kinds[arm][kind]


def make_events(
    name: str,
    arm: str,
    kind: str,
    score: float | None,
    fallback: str = "",
    **outcome: object,
) -> list[Event]:
    profile = make_profile(TEXTS.get(kind, kind))
    decision = Decision(
        name, arm, 0, "thompson-v1", profile, Objective(), (), fallback, time_s=5.0
    )
    given = {"latency_s": 0.5, "output_tokens": 10, "cost_usd": 1e-3} | outcome
    events: list[Event] = [decision, Outcome(name, **given)]  # type: ignore[arg-type]
    return events if score is None else [*events, Feedback(name, score)]


def test_flaws_and_scores_are_counted_apart() -> None:
    """Of 100 answers 20 failed and 10 of the others have a score; a mean over all 30 would be 0.3."""
    log = Log()
    for n in range(100):
        log.answer(score=0.9 if n >= 90 else None, status="error" if n < 20 else "ok")
    figures = log.of()
    assert (figures.answers, figures.availability) == (100, pytest.approx(0.8))
    assert (figures.votes, figures.score) == (10, pytest.approx(0.9))
    assert figures.overall_score == pytest.approx(0.8 * 0.9)
    assert figures.arrived == 80 and figures.cost_usd == pytest.approx(0.1)


def test_unknown_is_none_and_a_true_zero_is_zero() -> None:
    """A decision without an answer says nothing; an arm that was wrong each time has a score of 0."""
    log = Log()
    log.apply(make_events("d", "small", "code", None)[0])
    figures = log.of()
    numbers = {name: value for name, value in asdict(figures).items() if value}
    assert numbers == {"decisions": 1, "routed": 1}
    unknown = [name for name, value in asdict(figures).items() if value is None]
    assert {"availability", "score", "score_low", "latency_p50_s"} <= set(unknown)
    for _ in range(4):
        log.answer(arm="large", score=0.0, status="ok")
        log.answer(arm="nano", status="error")
    assert log.of("large").score == 0.0 and log.of("large").score_low == 0.0
    assert log.of("nano").availability == 0.0 and log.of("nano").score is None


def test_a_client_that_left_and_a_wrong_request_are_no_answers() -> None:
    log = Log()
    for status in ("disconnected", "rejected", "ok"):
        log.answer(status=status, score=0.5)
    figures = log.of()
    assert (figures.decisions, figures.answers, figures.votes) == (3, 1, 1)
    # the client that left may have read enough to score it; a request that was refused has nothing to score
    assert (figures.scores, figures.scored) == (2, 2)


def test_every_flaw_counts_against_availability() -> None:
    """Empty, malformed and cut off answers are flawed; one that the client's own limit ended is not."""
    log = Log()
    log.answer(flaw="empty", score=1.0)
    log.answer(flaw="invalid_json")
    log.answer(finish_reason="length")
    log.answer()
    assert log.of().availability == pytest.approx(0.25)
    # the score of a flawed answer is no vote on the quality of unflawed ones
    assert log.of().votes == 0 and log.of().score is None and log.of().scores == 1


def test_latency_and_tokens_per_second_are_of_answers_that_arrived() -> None:
    """The wait in the queue is part of the latency, and not of the rate of tokens."""
    log = Log()
    for n in range(1, 21):
        log.answer(latency_s=n / 10, waited_s=n / 20, output_tokens=n, ttft_s=0.2)
    log.answer(status="error", latency_s=60.0)
    figures = log.of()
    assert figures.arrived == 20 == figures.streams
    assert figures.latency_p50_s == pytest.approx(1.05)
    assert figures.latency_p95_s == pytest.approx(np.quantile(range(1, 21), 0.95) / 10)
    assert figures.tokens_per_s == pytest.approx(20.0)
    assert figures.ttft_p50_s == pytest.approx(0.2)


@pytest.mark.parametrize("n", [5, 20, 100])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("spread", ["right or wrong", "grades"])
def test_intervals_cover_the_true_mean(n: int, p: float, spread: str) -> None:
    """In at least 91 % of 4,000 samples. It is 95 % on average over p, and 91.9 % for right and wrong at n 5, p 0.9."""
    rng = np.random.default_rng(n)
    samples = rng.beta(2 * p, 2 * (1 - p), (4000, n))
    if spread == "right or wrong":
        samples = rng.random((4000, n)) < p
    covered = 0
    for mean in samples.mean(axis=1).tolist():
        low, high = interval(mean, n)
        assert 0.0 <= low <= mean <= high <= 1.0
        covered += low <= p <= high
    assert covered / 4000 >= 0.91


def test_an_arms_mean_counts_each_kind_by_its_answers() -> None:
    """People score all code and one tenth of the arithmetic; the mean over the scores alone would be 0.26."""
    log = Log()
    for n in range(400):
        log.answer(kind="code", score=0.2)
        log.answer(kind="arithmetic", score=0.9 if n % 10 == 0 else None)
    arm = log.figures.table().arms["small"]
    naive = (400 * 0.2 + 40 * 0.9) / 440
    assert naive < 0.27 and arm.score == pytest.approx(0.55, abs=0.03)
    assert arm.votes == 440 and log.of(kind="code").score == pytest.approx(0.2)
    # few votes stand for half of the answers, so the interval is wider than that of 440 equal votes
    assert arm.score_low is not None and arm.score_high is not None
    low, high = interval(arm.score, 440)
    assert arm.score_high - arm.score_low > 1.5 * (high - low)


def test_the_window_has_the_latest_decisions_only() -> None:
    """A score of a decision that has left the window changes nothing; one of a decision within counts."""
    log = Log(size=50)
    ids = [log.answer(score=1.0 if n < 50 else None) for n in range(100)]
    assert len(log.figures) == 50 and log.of().answers == 50 and log.of().votes == 0
    log.apply(Feedback(ids[0], 0.3, time_s=9.0), Feedback(ids[99], 0.4))
    assert log.of().votes == 1 and log.of().score == pytest.approx(0.4)
    assert log.figures.table().total.decisions == 50


def test_a_decision_has_one_vote_and_a_correction_replaces_it() -> None:
    """Two sources are two scores and one vote; the table after a correction is that of the corrected score."""
    log = Log()
    name = log.answer(score=0.2)
    log.apply(Feedback(name, 0.8, "judge"))
    assert (log.of().scores, log.of().scored, log.of().votes) == (2, 1, 1)
    assert log.of().score == pytest.approx(0.5)
    log.apply(Feedback(name, 1.0, time_s=2.0))
    assert (log.of().scores, log.of().score) == (2, pytest.approx(0.9))
    assert log.totals.routed == Counts(1, 0, 1, 3, 2, 1, 1e-3)


def test_scores_of_a_suspended_key_leave_the_figures() -> None:
    """The set of suspended keys is the router's own; the next event shows the change."""
    log = Log()
    silenced: set[str] = set()
    for owner in ("ann", "eve"):
        name = f"of {owner}"
        decision, outcome = make_events(name, "small", "code", None)
        log.apply(structs.replace(decision, owner=owner), outcome)  # type: ignore[type-var]
        record = log.records.get(name)
        assert record is not None
        record.silenced = silenced
        log.apply(Feedback(name, float(owner == "ann"), owner=owner))
    assert log.of().votes == 2
    silenced.add("eve")
    log.answer()
    assert log.of().votes == 1 and log.of().score == 1.0
    assert log.totals.routed.scores == 2


def test_the_order_of_events_does_not_matter() -> None:
    """Scores may come before outcomes, and both before decisions; decisions keep their order."""
    made = [
        make_events(
            f"d{n}",
            "small" if n % 3 else "large",
            "code" if n % 2 else "arithmetic",
            n / 40 if n % 4 else None,
            FORCED if n % 5 == 0 else "",
            status="error" if n % 7 == 0 else "ok",
        )
        for n in range(40)
    ]
    plain = Log()
    plain.apply(*(event for events in made for event in events))
    mixed = Log()
    rng = random.Random(1)
    rest = [event for events in made for event in events[1:]]
    rng.shuffle(rest)
    mixed.apply(*rest[:40], *(events[0] for events in made), *rest[40:])
    assert mixed.figures.table() == plain.figures.table()
    assert mixed.totals.of_all().scored == 30
    assert asdict(mixed.figures.table().total)["scored"] == 30
    for one, other in (
        (mixed.totals.routed, plain.totals.routed),
        (mixed.totals.forced, plain.totals.forced),
    ):
        assert structs.astuple(one) == pytest.approx(structs.astuple(other))


def test_the_number_of_kinds_is_bounded() -> None:
    """A kind that this release does not know, as in an old journal, counts as `other`."""
    log = Log()
    for n in range(30):
        decision, outcome = make_events(f"d{n}", "small", "code", None)
        assert isinstance(decision, Decision)
        profile = replace(decision.profile, kind=f"kind {n}")
        log.apply(structs.replace(decision, profile=profile), outcome)
    table = log.figures.table()
    assert set(table.kinds["small"]) == {"other"} <= set(KINDS)
    assert table.of_kind("kind 7") == table.of_kind("other")
    assert table.of_kind("writing") == {}


def test_scores_that_earlier_releases_derived_from_flaws_are_no_scores() -> None:
    """A client's own source of the same name is one."""
    log = Log()
    name = log.answer()
    log.apply(Feedback(name, 0.0, "check", owner=ANY_OWNER))
    assert log.of().scores == 0 and log.totals.routed.feedback == 0
    log.apply(Feedback(log.answer(), 0.0, "check"))
    assert log.of().scores == 1 and log.totals.routed.scores == 1


def test_routed_and_forced_decisions_are_counted_apart() -> None:
    log = Log()
    log.answer(score=1.0)
    log.answer(fallback="hedge")
    log.answer(fallback=FORCED, score=0.0)
    assert log.totals.routed == Counts(2, 1, 2, 1, 1, 1, 2e-3)
    assert log.totals.forced == Counts(1, 0, 1, 1, 1, 1, 1e-3)
    assert log.of().decisions == 3 and log.of().routed == 2
    # a copy does not change with the original
    copy = log.totals.copy()
    log.answer()
    assert copy.routed.decisions == 2 and log.totals.routed.decisions == 3
