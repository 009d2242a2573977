"""Every event counts exactly once, however often and in whatever order it comes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.events import (
    ACCEPTED,
    DUPLICATE,
    IMPLICIT,
    PENDING,
    REPEATED,
    UNKNOWN,
    Feedback,
    Outcome,
)
from policies.feedback.decision_records import DecisionRecords, History
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))


def decisions(count: int) -> list:
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    requests = [
        Request(f"d{i}", make_profile(f"What is {i} plus {i * 7}?"), Objective())
        for i in range(count)
    ]
    return policy.decide(requests, {}, rng, 0)


def test_feedback_for_a_missing_decision_is_unknown() -> None:
    """Such feedback changes nothing."""
    policy = Thompson(ARMS)
    assert DecisionRecords().apply(Feedback("d9", 1.0), policy) == UNKNOWN
    assert not policy.state()["quality.count"].any()


def test_a_second_score_of_the_same_source_replaces_the_first() -> None:
    """One vote per decision and source; another source has a vote of its own."""
    (decision,) = decisions(1)
    policy = Thompson(ARMS)
    decision_records = DecisionRecords()
    once = Thompson(ARMS)
    decision_records.apply(decision, policy)
    assert decision_records.apply(Feedback("d0", 1.0, "user"), policy) == ACCEPTED
    assert decision_records.apply(Feedback("d0", 1.0, "user"), policy) == DUPLICATE
    assert decision_records.apply(Feedback("d0", 0.0, "user"), policy) == ACCEPTED
    assert decision_records.apply(Feedback("d0", 0.5, "judge"), policy) == ACCEPTED
    once.score(decision, 0.0)
    once.score(decision, 0.5)
    for name, value in once.state().items():
        # the watch for change heard the first one
        assert name in ("drift.better", "drift.worse") or np.allclose(
            value, policy.state()[name], atol=1e-12
        ), name


def test_corrections_of_one_score_are_no_change_of_the_arm() -> None:
    """The drift test counts one vote once; twenty new bad votes in a row would be an alarm."""
    (decision,) = decisions(1)
    policy = Thompson(ARMS)
    decision_records = DecisionRecords()
    decision_records.apply(decision, policy)
    decision_records.apply(Feedback("d0", 1.0), policy)
    before = policy.drift.state()
    for i in range(40):
        assert (
            decision_records.apply(
                Feedback("d0", 0.01 * (i % 2), time_s=1.0 + i), policy
            )
            == ACCEPTED
        )
    assert all(
        np.array_equal(value, before[name])
        for name, value in policy.drift.state().items()
    )
    assert policy.drift.known[policy._names.index(decision.arm)] == 1


def test_events_before_their_decision_are_pending() -> None:
    """An event is kept once and learned when its decision arrives, if that decision may still arrive."""
    (decision,) = decisions(1)
    policy = Thompson(ARMS)
    decision_records = DecisionRecords(history=History(keeps_unknown=True))
    once = Thompson(ARMS)
    early = [
        Feedback("d0", 0.2, time_s=1.0),
        Feedback("d0", 0.9, time_s=2.0),
        Outcome("d0", "ok", 0.1, 0.3, 20, 5),
    ]
    assert [decision_records.apply(event, policy) for event in early] == [
        PENDING,
        PENDING,
        PENDING,
    ]
    assert [decision_records.apply(event, policy) for event in early] == [DUPLICATE] * 3
    assert (
        decision_records.pending == ("d0",)
        and not policy.state()["quality.count"].any()
    )
    assert (
        decision_records.apply(decision, policy) == ACCEPTED
        and decision_records.pending == ()
    )
    once.learn(decision, early[2])
    once.score(decision, 0.9)
    for name, value in once.state().items():
        assert np.allclose(value, policy.state()[name], atol=1e-12)


def test_an_implicit_score_has_a_small_weight_and_is_replaced() -> None:
    """An implicit score has a weight of a quarter until an explicit score arrives, which replaces it."""
    (decision,) = decisions(1)
    policy = Thompson(ARMS)
    decision_records = DecisionRecords()
    decision_records.apply(decision, policy)
    decision_records.apply(Feedback("d0", 0.0, IMPLICIT), policy)
    assert policy.state()["quality.count"].sum() == pytest.approx(0.25)
    decision_records.apply(Feedback("d0", 1.0, "user"), policy)
    state = policy.state()
    assert (
        state["quality.count"].sum()
        == pytest.approx(1)
        == state["quality.moment"][:, 0].sum()
    )


def test_a_score_given_again_later_outlives_an_older_correction() -> None:
    """1, then 0, then 1 again: the 0 changes nothing if it comes last."""
    (decision,) = decisions(1)
    decision_records = DecisionRecords()
    decision_records.apply(decision, None)
    first, other, again = (
        Feedback("d0", score, time_s=t) for t, score in enumerate((1.0, 0.0, 1.0))
    )
    assert [decision_records.apply(event, None) for event in (first, again, other)] == [
        ACCEPTED,
        REPEATED,
        DUPLICATE,
    ]
    record = decision_records.get("d0")
    assert record is not None and record.scores == {"user": 1.0}


def counted_once(made: list, events: list) -> Thompson:
    """What a policy should learn: each outcome, and the last vote of each source."""
    policy = Thompson(ARMS)
    for decision in made:
        outcome = next(
            (
                e
                for e in events
                if isinstance(e, Outcome) and e.decision_id == decision.id
            ),
            None,
        )
        if outcome is not None:
            policy.learn(decision, outcome)
        given = [
            e
            for e in events
            if isinstance(e, Feedback) and e.decision_id == decision.id
        ]
        last = {e.source: e for e in sorted(given, key=lambda e: e.time_s)}
        if len(last) > 1:
            last.pop(IMPLICIT, None)
        for source, vote in last.items():
            policy.score(
                decision, vote.score, weight=0.25 if source == IMPLICIT else 1.0
            )
    return policy


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_order_and_repetition_gives_the_same_posterior(data: st.DataObject) -> None:
    """Decisions late or early, outcomes, several sources, corrections, implicit scores: each counts exactly once."""
    made = decisions(5)
    sources = st.sampled_from(["user", "judge", IMPLICIT])
    events: list = [
        Outcome(
            d.id,
            "ok",
            0.1,
            0.3 + i / 10,
            20,
            5 + 70 * i,
            finish_reason="stop" if i % 3 else "length",
        )
        for i, d in enumerate(made)
        if i != 2
    ]
    for clock, (i, source, score) in enumerate(
        data.draw(
            st.lists(
                st.tuples(
                    st.integers(0, 4), sources, st.sampled_from([0.0, 0.3, 0.7, 1.0])
                ),
                max_size=14,
            )
        )
    ):
        events.append(Feedback(made[i].id, score, source, float(clock)))
    again = data.draw(st.lists(st.sampled_from([*made, *events]), max_size=8))
    policy = Thompson(ARMS)
    decision_records = DecisionRecords(history=History(keeps_unknown=True))
    for event in data.draw(st.permutations([*made, *events, *again])):
        decision_records.apply(event, policy)
    wanted = counted_once(made, events).state()
    for name, value in policy.state().items():
        # the watch for change is a sequential test: it goes by the order
        assert name.startswith("drift.") or np.allclose(
            value, wanted[name], rtol=1e-9, atol=1e-9
        ), name
