"""Which rewards the regression watch takes, so that they represent all answers."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from policies.coverage import FeedbackCoverage
from policies.events import (
    ArmEstimate,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
)
from policies.feedback.decision_records import DecisionRecords, History
from policies.rollout.reward_sampling import RewardSampler, SamplingState
from policies.types import Objective, TaskProfile

PROFILES = {
    kind: TaskProfile(np.ones(1), "chat", kind, 20) for kind in ("code", "chat")
}


class Collector:
    """A projection that gives events to a sampler, and keeps what each request got."""

    def __init__(self) -> None:
        self.sampler = RewardSampler()
        self.requests: dict[str, Record] = {}

    def record(self, event: Event, record: Record) -> None:
        """See EventProjection."""
        request = self.sampler.record(event, record)
        if request is not None:
            self.requests[request.decision.id] = request


def decision(
    name: str, kind: str = "code", arm: str = "a", chance: float = 0.5, first: str = ""
) -> Decision:
    return Decision(
        name,
        arm,
        0,
        "",
        PROFILES[kind],
        Objective(),
        (ArmEstimate("a"), ArmEstimate("b")),
        fallback="hedge" if first else "",
        time_s=4.0 if first else 0.0,
        score_chance=chance,
        retry_of=first,
    )


def play(events: Sequence[Event]) -> Collector:
    collector = Collector()
    records = DecisionRecords(history=History(keeps_unknown=True), projection=collector)
    for event in events:
        records.apply(event, None)
    return collector


def answers(
    count: int, scored: int, kind: str = "code", chance: float = 0.5
) -> list[Event]:
    """So many answers without a flaw, of which some have a score."""
    events: list[Event] = []
    for n in range(count):
        name = f"{kind} {chance} {n}"
        events += [decision(name, kind, chance=chance), Outcome(name)]
        if n < scored:
            events.append(Feedback(name, 1.0))
    return events


def record(kind: str, status: str = "ok", chance: float = 0.5) -> Record:
    return Record(decision("x", kind, chance=chance), Outcome("x", status))


def test_flaws_and_scores_of_all_kinds_are_taken_at_one_rate() -> None:
    """Of 1,000 requests with a flaw as many are taken as of 1,000 without one, of each kind."""
    events = answers(1000, 200) + answers(1000, 20, "chat")
    sampler = play(events).sampler
    taken = {
        kind: rate * sampler.probability(record(kind))
        for kind, rate in (("code", 0.2), ("chat", 0.02))
    }
    flaws = [sampler.probability(record(kind, "error")) for kind in PROFILES]
    assert taken["code"] == pytest.approx(taken["chat"], rel=0.2)
    assert flaws == pytest.approx(list(taken.values()), rel=0.2)
    assert sampler.probability(record("chat")) == pytest.approx(1.0)


def test_a_kind_that_is_hardly_ever_scored_does_not_stop_the_watch() -> None:
    """Its flaws are as rare in the sample as its scores; all scores of the other kind are taken."""
    sampler = play(answers(1000, 300) + answers(1000, 0, "chat")).sampler
    assert sampler.probability(record("code")) == pytest.approx(1.0)
    assert sampler.probability(record("chat", "error")) < 0.005


def test_with_a_judge_s_sample_only_its_decisions_are_taken() -> None:
    """Their rate is 1 whatever the answer; users' scores of other decisions may depend on it."""
    events = answers(100, 98, chance=1.0) + answers(1000, 30, chance=0.03)
    sampler = play(events).sampler
    assert sampler.probability(record("code", chance=1.0)) > 0.95
    assert sampler.probability(record("code", "error", chance=1.0)) > 0.9
    assert sampler.probability(record("code", chance=0.03)) == 0.0
    assert sampler.probability(record("code", "error", chance=0.03)) == 0.0


def test_new_keys_are_no_judge_s_sample() -> None:
    """A key that is taken to score, and does not, leaves the rate to be estimated."""
    events = answers(100, 3, chance=1.0) + answers(1000, 30, chance=0.03)
    sampler = play(events).sampler
    assert sampler.probability(record("code", chance=0.03)) > 0.9


@pytest.mark.parametrize("order", ["hedge first", "first first", "score first"])
def test_a_hedged_request_has_one_reward(order: str) -> None:
    """In whatever order its events arrive: the answer of the hedge, with the time since the first decision."""
    lost = [decision("r"), Outcome("r", "disconnected", latency_s=4.0)]
    hedge = [decision("h", arm="b", first="r"), Outcome("h", latency_s=1.0)]
    score = Feedback("h", 0.5)
    orders: dict[str, list[Event]] = {
        "hedge first": [*hedge, *lost, score],
        "first first": [*lost, *hedge, score],
        "score first": [hedge[0], score, hedge[1], *lost],
    }
    collector = play(orders[order])
    assert list(collector.requests) == ["r"]
    request = collector.requests["r"]
    assert request.outcome is not None and request.outcome.latency_s == 5.0
    assert request.mean_score == 0.5 and request.answered_by == "b"
    assert request.decision.arm == "a"
    state = collector.sampler.state()
    assert ("b", "code", 1.0, 1.0) in state.all_answers


def test_a_request_whose_first_model_won_has_the_reward_of_that() -> None:
    """The hedge was cancelled, and is no request."""
    events = [
        decision("r"),
        decision("h", arm="b", first="r"),
        Outcome("r", latency_s=6.0),
        Outcome("h", "disconnected", latency_s=2.0),
        Feedback("r", 1.0),
    ]
    collector = play(events)
    assert list(collector.requests) == ["r"]
    assert collector.requests["r"].answered_by == ""


def test_each_answer_and_each_score_counts_once() -> None:
    """Corrected scores, further sources, scores before outcomes, and events that arrive twice."""
    events: list[Event] = [decision("a"), Outcome("a"), Feedback("a", 1.0)]
    events += [Feedback("a", 0.0, time_s=1.0), Feedback("a", 1.0, "judge")]
    events += [Feedback("b", 1.0), Outcome("b"), decision("b"), Outcome("b")]
    events += [decision("c"), Outcome("c", "error"), Feedback("c", 1.0)]
    state = play(events).sampler.state()
    assert ("a", "code", 2.0, 2.0) in state.all_answers


def test_the_counts_survive_a_restart() -> None:
    """Through plain data, with the decisions whose scores were counted."""
    sampler = play(answers(50, 10)).sampler
    plain = msgspec.to_builtins(sampler.state())
    again = RewardSampler()
    again.restore(msgspec.convert(plain, SamplingState))
    assert again.state() == sampler.state()
    one, two = (s.probability(record("code", "error")) for s in (sampler, again))
    assert one == two


def test_a_rate_of_few_answers_shrinks_to_that_of_its_kind() -> None:
    """One answer without a score says little; a hundred say much."""
    coverage = FeedbackCoverage()
    big = record("code")
    for n in range(1000):
        coverage.add_answer(big)
        if n % 10 == 0:
            coverage.add_score(big)
    other = Record(decision("x", arm="b"), Outcome("x"))
    assert coverage.rate(other) == pytest.approx(0.1, rel=0.05)
    coverage.add_answer(other)
    assert coverage.rate(other) > 0.09
    for _ in range(200):
        coverage.add_answer(other)
    assert coverage.rate(other) < 0.02
