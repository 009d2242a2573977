"""The second answer of a pair teaches a policy, and is no traffic for what counts traffic."""

import pytest
from msgspec import structs

from deployments.journal.codec import decode, encode
from policies.coverage import FeedbackCoverage
from policies.evaluation.kind_figures import RecentFigures, Totals
from policies.evaluation.recent_metrics import Window
from policies.evaluation.replay import OUTSIDE, select
from policies.events import (
    ANY_OWNER,
    PAIR,
    ArmEstimate,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
)
from policies.feedback.decision_records import DecisionRecords
from policies.feedback.scoring_rates import ScoringRates
from policies.rollout.reward_sampling import RewardSampler
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"), Arm("huge"))
FIRST = (
    ArmEstimate("small", propensity=1.0),
    ArmEstimate("large"),
    ArmEstimate("huge"),
)
SECOND = (
    ArmEstimate("small", removed_by="it gave the first answer"),
    ArmEstimate("large", propensity=0.3),
    ArmEstimate("huge", propensity=0.7),
)


def pair(n: int, score: float = 1.0) -> tuple[list[Event], list[Event]]:
    """The events of a pair's first and of its second answer."""
    first = Decision(
        f"first {n}",
        "small",
        2 * n,
        "thompson-v1",
        make_profile(),
        Objective(),
        FIRST,
        scored=0,
        owner="key",
        score_chance=0.0,
        pair=f"second {n}",
    )
    second = structs.replace(
        first,
        id=first.pair,
        pair=first.id,
        arm="large",
        sequence=2 * n + 1,
        estimates=SECOND,
        fallback=PAIR,
        owner="",
        score_chance=1.0,
    )
    return _finished(first, score), _finished(second, 0.5)


def _finished(decision: Decision, score: float) -> list[Event]:
    return [
        decision,
        Outcome(decision.id, "ok", 0.0, 0.5, 20, 8, cost_usd=0.5),
        Feedback(decision.id, score, "judge", owner=ANY_OWNER),
    ]


class Given:
    """Gives each event with its record to projections, as the router does."""

    def __init__(self) -> None:
        self.window = Window()
        self.rates = ScoringRates()
        self.figures = RecentFigures()
        self.totals = Totals()
        self.rewards = RewardSampler()
        self.records = DecisionRecords(projection=self)

    def record(self, event: Event, record: Record) -> None:
        self.window.add(event, record)
        self.rates.record(event, record)
        self.figures.record(event, record)
        self.totals.add(event, record)
        self.rewards.record(event, record)

    @property
    def routed(self) -> tuple[object, ...]:
        """Everything that is known of routed requests."""
        return (
            self.window.figures(),
            self.rates.rates(),
            self.figures.table(),
            self.totals.routed,
            self.totals.forced,
            self.rewards.state(),
        )


def test_all_figures_of_traffic_are_those_without_second_answers() -> None:
    """Whether or not 30 requests had a second answer."""
    alone, both = Given(), Given()
    for n in range(30):
        first, second = pair(n, score=n % 2)
        for event in first:
            alone.records.apply(event, None)
        for event in (*first, *second):
            both.records.apply(event, None)
    assert both.routed == alone.routed
    assert (both.totals.paired.decisions, both.totals.paired.scores) == (30, 30)
    assert both.totals.of_all().decisions == 60


def test_a_pair_adds_two_scores_to_what_is_learned() -> None:
    """Of both arms, and to the clock by which scores are forgotten."""
    policy = Thompson(ARMS)
    records = DecisionRecords()
    for event in (e for part in pair(0) for e in part):
        records.apply(event, policy)
    assert records.scored == 2
    assert policy.state()["quality.count"].tolist() == pytest.approx([1, 1, 0])
    assert policy.state()["availability.window"][:, :, 2].sum(axis=1).tolist() == [
        *(1, 1, 0),
    ]


def test_its_events_may_come_in_any_order() -> None:
    """The judge's score may reach the router before the decision, as any score."""
    given = [Given(), Given()]
    events = [e for n in range(5) for part in pair(n) for e in part]
    for event in events:
        given[0].records.apply(event, None)
    for n in range(5):
        first, second = pair(n)
        for event in (second[0], *first, *reversed(second[1:])):
            given[1].records.apply(event, None)
    assert given[0].totals == given[1].totals
    assert given[0].figures.table() == given[1].figures.table()


def test_off_policy_evaluation_leaves_both_answers_out_and_says_why() -> None:
    """The first was not drawn for its score; the second was drawn among the other arms only."""
    given = Given()
    for event in (e for n in range(4) for part in pair(n) for e in part):
        given.records.apply(event, None)
    names = [f"{place} {n}" for n in range(4) for place in ("first", "second")]
    found = select([record for name in names if (record := given.records.get(name))])
    assert found.records == []
    assert found.left_out == {OUTSIDE: 4, "a second answer in the background": 4}


def test_its_answers_are_always_scored_and_tell_nothing_of_the_rate_of_feedback() -> (
    None
):
    """The first answers are counted, with their scores."""
    given = Given()
    for event in (e for n in range(4) for part in pair(n) for e in part):
        given.records.apply(event, None)
    first, second = given.records.get("first 0"), given.records.get("second 0")
    assert first is not None and second is not None
    coverage = FeedbackCoverage.of([first, second])
    assert coverage.overall()[0] == 1.0
    assert coverage.rate(second) == 1.0


def test_the_journal_keeps_the_link() -> None:
    """A decision of an earlier release has none."""
    (first, *_), _ = pair(0)
    assert isinstance(first, Decision)
    kept = decode("decision", encode(first))
    assert isinstance(kept, Decision) and kept.pair == "second 0"
    fields = {k: v for k, v in structs.asdict(first).items() if k != "pair"}
    older = decode("decision", encode(fields))
    assert isinstance(older, Decision) and older.pair == ""
