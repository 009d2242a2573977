"""Every event counts exactly once, however often and in whatever order it comes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from policies.events import (
    ACCEPTED,
    ANY_OWNER,
    DUPLICATE,
    MAX_SOURCES,
    PENDING,
    REPEATED,
    TOO_MANY_SOURCES,
    UNANSWERED,
    UNKNOWN,
    Feedback,
    Outcome,
    visible_flaw,
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
    """One score per source. Several sources have one vote together, the mean of their scores."""
    (decision,) = decisions(1)
    policy = Thompson(ARMS)
    decision_records = DecisionRecords()
    once = Thompson(ARMS)
    decision_records.apply(decision, policy)
    assert decision_records.apply(Feedback("d0", 1.0, "user"), policy) == ACCEPTED
    assert decision_records.apply(Feedback("d0", 1.0, "user"), policy) == DUPLICATE
    assert decision_records.apply(Feedback("d0", 0.0, "user"), policy) == ACCEPTED
    assert decision_records.apply(Feedback("d0", 0.5, "judge"), policy) == ACCEPTED
    once.score(decision, 0.25)
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


@pytest.mark.parametrize("score_first", [False, True])
@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("d0", "error"),
        Outcome("d0", flaw="empty"),
        Outcome("d0", flaw="invalid_json"),
        Outcome("d0", finish_reason="length"),
    ],
)
def test_the_score_of_an_answer_with_a_visible_flaw_does_not_teach_quality(
    outcome: Outcome, score_first: bool
) -> None:
    """Quality is that of unflawed answers, also if the score arrives before the outcome that shows the flaw."""
    (decision,) = decisions(1)
    policy = Thompson(ARMS)
    decision_records = DecisionRecords()
    decision_records.apply(decision, policy)
    events = [outcome, Feedback("d0", 0.0)]
    for event in reversed(events) if score_first else events:
        assert decision_records.apply(event, policy) == ACCEPTED
    assert policy.state()["quality.count"].sum() == pytest.approx(0.0, abs=1e-12)
    assert policy.availability.predict()[0].min() < 0.96
    assert decision_records.scored == 1


def test_the_zero_that_an_earlier_release_derived_from_a_flaw_does_not_count() -> None:
    """Old journals hold zeros of the sources `check` and `implicit`; a client's own source of that name counts."""
    (decision,) = decisions(1)
    decision_records = DecisionRecords()
    decision_records.apply(decision, None)
    decision_records.apply(Feedback("d0", 0.0, "check", owner=ANY_OWNER), None)
    record = decision_records.get("d0")
    assert record is not None and record.explicit_scores() == {}
    decision_records.apply(Feedback("d0", 1.0, "implicit"), None)
    assert record.explicit_scores() == {"implicit": 1.0}


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


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("order", [(0.2, 0.9), (0.9, 0.2)])
def test_of_two_scores_at_the_same_time_the_lower_one_counts(
    order: tuple[float, float], pending: bool
) -> None:
    """In either order, whether their decision is known already or not."""
    (decision,) = decisions(1)
    records = DecisionRecords(history=History(keeps_unknown=True))
    events: list = [Feedback("d0", score, time_s=5.0) for score in order]
    events.insert(2 if pending else 0, decision)
    for event in events:
        records.apply(event, None)
    record = records.get("d0")
    assert record is not None and record.scores == {"user": 0.2}
    assert records.apply(Feedback("d0", 0.9, time_s=5.0), None) == DUPLICATE
    assert records.apply(Feedback("d0", 0.9, time_s=5.1), None) == ACCEPTED


@pytest.mark.parametrize("pending", [False, True])
def test_of_nine_sources_the_first_eight_count(pending: bool) -> None:
    """The ninth is refused, also before its decision is known; the others may still correct their scores."""
    (decision,) = decisions(1)
    records = DecisionRecords(history=History(keeps_unknown=True))
    if not pending:
        records.apply(decision, None)
    statuses = [
        records.apply(Feedback("d0", 1.0, f"s{i}", time_s=float(i)), None)
        for i in range(9)
    ]
    accepted = PENDING if pending else ACCEPTED
    assert statuses == [accepted] * 8 + [TOO_MANY_SOURCES]
    if pending:
        records.apply(decision, None)
    again = Feedback("d0", 0.0, "s0", time_s=20.0)
    assert records.apply(again, None) == ACCEPTED
    record = records.get("d0")
    assert record is not None
    assert record.scores == {"s0": 0.0} | {f"s{i}": 1.0 for i in range(1, 8)}
    assert records.apply(Feedback("d0", 1.0, "s8"), None) == TOO_MANY_SOURCES


def counted_once(made: list, events: list) -> Thompson:
    """What a policy should learn: each outcome, and one vote per decision, the mean of its sources' last scores."""
    policy = Thompson(ARMS)
    for decision in made:
        mine = [e for e in events if getattr(e, "decision_id", "") == decision.id]
        outcome = next((e for e in mine if isinstance(e, Outcome)), None)
        if outcome is not None:
            policy.learn(decision, outcome)
        given = [e for e in mine if isinstance(e, Feedback)]
        last = {e.source: e.score for e in sorted(given, key=lambda e: e.time_s)}
        if last and not (outcome and visible_flaw(decision, outcome)):
            policy.score(decision, sum(last.values()) / len(last))
    return policy


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_order_and_repetition_gives_the_same_posterior(data: st.DataObject) -> None:
    """Decisions late or early, outcomes, flaws, several sources, corrections: each counts exactly once."""
    made = decisions(5)
    sources = st.sampled_from(["user", "judge", "tool"])
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
        # The drift test is sequential, so it depends on the order. A vote that a later flaw withdrew stays the latest.
        ordered = name.startswith("drift.") or name == "quality.latest"
        assert ordered or np.allclose(value, wanted[name], rtol=1e-9, atol=1e-9), name


def held(decision_records: DecisionRecords, *items: Feedback) -> list[str]:
    """The statuses of scores that come before their decision."""
    return [decision_records.apply(item, None) for item in items]


@pytest.mark.parametrize("others_first", [False, True])
def test_an_early_score_of_another_key_displaces_nothing(others_first: bool) -> None:
    """Which key owns a decision is known only when it arrives; the other's scores are dropped then."""
    (decision,) = decisions(1)
    decision = structs.replace(decision, owner="alice")
    records = DecisionRecords(history=History(keeps_unknown=True))
    own = Feedback("d0", 1.0, "user", 5.0, "alice")
    foreign = [Feedback("d0", 0.0, "user", 6.0, "bob")]
    foreign += [
        Feedback("d0", 0.0, f"s{i}", 6.0, "bob") for i in range(MAX_SOURCES - 1)
    ]
    items = [*foreign, own] if others_first else [own, *foreign]
    assert held(records, *items) == [PENDING] * (MAX_SOURCES + 1)
    ninth = Feedback("d0", 0.0, "ninth", 6.0, "bob")
    assert held(records, ninth) == [TOO_MANY_SOURCES]
    # the owner's other sources, and a correction
    assert held(records, Feedback("d0", 0.5, "user", 7.0, "alice")) == [PENDING]
    assert held(records, Feedback("d0", 0.8, "program", 7.0, "alice")) == [PENDING]
    assert records.pending_scores == MAX_SOURCES + 2
    assert records.apply(Outcome("d0", "ok", 0.1, 0.5, 20, 9), None) == PENDING
    records.apply(decision, Thompson(ARMS))
    record = records.get("d0")
    assert record is not None and record.outcome is not None
    assert record.scores == {"user": 0.5, "program": 0.8}
    assert records.pending_scores == 0


def test_an_operators_early_score_counts_beside_the_owners() -> None:
    """The later one of a source counts, in whatever order they came."""
    (decision,) = decisions(1)
    decision = structs.replace(decision, owner="alice")
    for order in (1, -1):
        records = DecisionRecords(history=History(keeps_unknown=True))
        items = [
            Feedback("d0", 0.2, "user", 6.0, ANY_OWNER),
            Feedback("d0", 1.0, "user", 5.0, "alice"),
        ][::order]
        assert held(records, *items) == [PENDING] * 2
        records.apply(decision, None)
        record = records.get("d0")
        assert record is not None and record.scores == {"user": 0.2}


def test_a_score_of_a_refused_request_teaches_nothing() -> None:
    """After the outcome it is refused; before the outcome it is kept, and withdrawn when the outcome arrives."""
    (decision,) = decisions(1)
    for late in (False, True):
        policy = Thompson(ARMS)
        records = DecisionRecords()
        records.apply(decision, policy)
        events = [Feedback("d0", 1.0), Outcome("d0", "rejected")]
        first, second = [
            records.apply(event, policy) for event in (events[::-1] if late else events)
        ]
        assert first == ACCEPTED
        assert second == (UNANSWERED if late else ACCEPTED)
        record = records.get("d0")
        assert record is not None and record.refused and record.vote is None
        fresh = Thompson(ARMS).state()
        for name, value in policy.state().items():
            # the clock of what was learned has seen the score, and nothing else has
            if name.startswith("quality.") and name != "quality.latest":
                assert np.allclose(value, fresh[name], atol=1e-12), name
