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
    """Decisions by chance, each with its outcome and a score that favours `large`, in the order of a busy router."""
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
    """All events folded into them."""
    forward = Prequential({str(i): policy for i, policy in enumerate(policies)}, NAMES)
    ledger = DecisionRecords(applied=forward.note)
    for event in events:
        ledger.apply(event, forward)
    found = [ledger.get(str(i)) for i in range(len(events) // 3)]
    return forward, [record for record in found if record is not None]


def test_nothing_that_came_later_counts() -> None:
    """What would have been chosen is the same, whether the log goes on or not, and whatever came of it."""
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


def test_it_learns_on_the_way_and_a_rule_does_not() -> None:
    """The last block is judged by what the others taught; Static stays what it was."""
    forward, records = walk(make_log(10 * BLOCK), Thompson(ARMS), Static(ARMS))
    learner = forward.probabilities("0", records)
    assert learner[-BLOCK:, 1].mean() > 0.9 > 0.6 > learner[:BLOCK, 1].mean()
    assert np.array_equal(
        forward.probabilities("1", records),
        target_probabilities(records, Static(ARMS), NAMES),
    )


def test_at_the_end_it_knows_all_that_a_policy_would() -> None:
    """Taught in blocks, each event once."""
    events = make_log(3 * BLOCK + 5)
    one = Thompson(ARMS)
    other = Thompson(ARMS)
    forward, records = walk(events, one)
    forward.probabilities("0", records)
    ledger = DecisionRecords()
    for event in events:
        ledger.apply(event, other)
    for policy in (one, other):
        policy.advance(10_000)
    assert all(
        np.allclose(one.state()[key], value, rtol=1e-9)
        for key, value in other.state().items()
    )
