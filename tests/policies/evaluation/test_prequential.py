"""Prequential evaluation: the choices of a policy along a log, with only the earlier events known."""

import numpy as np
from msgspec import structs

from policies.baselines import Static
from policies.evaluation.prequential import BLOCK, Prequential
from policies.evaluation.replay import target_probabilities
from policies.events import Event, Feedback, Outcome, Record
from policies.feedback.decision_records import DecisionRecords
from policies.thompson.policy import Thompson
from policies.types import Arm
from tests.support.requests import make_request

ARMS = (Arm("small"), Arm("large"))
NAMES = ["small", "large"]


def make_log(count: int, seed: int = 0) -> list[Event]:
    """Random decisions, each with its outcome and a score that favours `large`, in the order in which a busy router
    gets them.
    """
    rng = np.random.default_rng(seed)
    events = list[Event]()
    for i in range(count):
        decision = Thompson(ARMS).decide(
            [make_request(f"What is {i} plus {i}?")], {}, rng, i
        )[0]
        decision = structs.replace(decision, id=str(i))
        events += [decision, Outcome(decision.id, "ok", 0.1, 0.3, 20, 9)]
        events.append(
            Feedback(decision.id, float(decision.arm == "large"), time_s=float(i))
        )
    return events


def walk(
    events: list[Event], *policies: Thompson | Static
) -> tuple[Prequential, list[Record]]:
    """Replay all events to these policies."""
    forward = Prequential({str(i): policy for i, policy in enumerate(policies)}, NAMES)
    decision_records = DecisionRecords(projection=forward)
    for event in events:
        decision_records.apply(event, forward)
    found = [decision_records.get(str(i)) for i in range(len(events) // 3)]
    return forward, [record for record in found if record is not None]


def test_probabilities_do_not_depend_on_later_events() -> None:
    """The probabilities of a decision are the same whatever events follow it in the log."""
    events = make_log(4 * BLOCK)
    long, records = walk(events, Thompson(ARMS))
    cut = 2 * BLOCK
    other = [
        Feedback(e.decision_id, 1 - e.score) if isinstance(e, Feedback) else e
        for e in events[3 * cut :]
    ]
    changed, _ = walk(events[: 3 * cut] + other, Thompson(ARMS))
    before = records[: cut + BLOCK]
    after = records[cut + BLOCK :]
    assert np.array_equal(
        long.probabilities("0", before), changed.probabilities("0", before)
    )
    assert not np.allclose(
        long.probabilities("0", after), changed.probabilities("0", after)
    )


def test_a_policy_learns_along_the_log_and_a_rule_does_not() -> None:
    """The last block is evaluated with what the earlier blocks taught; Static stays as it was."""
    forward, records = walk(make_log(10 * BLOCK), Thompson(ARMS), Static(ARMS))
    learner = forward.probabilities("0", records)
    assert learner[-BLOCK:, 1].mean() > 0.9 > 0.6 > learner[:BLOCK, 1].mean()
    assert np.array_equal(
        forward.probabilities("1", records),
        target_probabilities(records, Static(ARMS), NAMES),
    )


def test_a_replay_in_blocks_teaches_the_same_as_one_event_at_a_time() -> None:
    """At the end of the log a policy has learned each event once."""
    events = make_log(3 * BLOCK + 5)
    one = Thompson(ARMS)
    other = Thompson(ARMS)
    forward, records = walk(events, one)
    forward.probabilities("0", records)
    decision_records = DecisionRecords()
    for event in events:
        decision_records.apply(event, other)
    for policy in (one, other):
        policy.advance(10_000)
    assert all(
        np.allclose(one.state()[key], value, rtol=1e-9)
        for key, value in other.state().items()
    )


def test_a_policy_is_judged_by_what_it_serves_outside_of_a_judge_s_sample_too() -> None:
    """One decision of ten is in the sample; there the probabilities are nine tenths those of the best estimate."""
    arms = (Arm("small", prior_quality=0.45), Arm("large", prior_quality=0.55))
    rng = np.random.default_rng(0)
    decisions = [
        structs.replace(
            Thompson(arms).decide([make_request()], {}, rng, n)[0],
            id=str(n),
            score_chance=float(n % 10 == 9),
        )
        for n in range(10 * BLOCK)
    ]
    forward, records = walk([e for d in decisions for e in (d, d, d)], Thompson(arms))
    found = forward.probabilities("0", records)
    explored, served = (
        target_probabilities(records, Thompson(arms), NAMES, chance)
        for chance in (1.0, 0.0)
    )
    judged = np.arange(len(records)) % 10 == 9
    assert np.allclose(found[~judged], served[~judged]) and served[0, 1] > 0.99
    expected = 0.1 * explored[judged][-1] + 0.9 * served[judged][-1]
    assert np.allclose(found[judged][-1], expected, atol=0.005)
    assert explored[-1, 1] < 0.95
