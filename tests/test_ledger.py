"""Every event counts exactly once, however often and in whatever order it comes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.ledger import ACCEPTED, DUPLICATE, UNKNOWN, Ledger
from policies.thompson import Thompson
from policies.types import Arm, Feedback, Objective, Outcome, Request
from tests.helpers import make_profile

ARMS = (Arm("small"), Arm("large"))


def decisions(count: int) -> list:
    policy, rng = Thompson(ARMS), np.random.default_rng(0)
    requests = [Request(f"d{i}", make_profile(f"What is {i} plus {i * 7}?"), Objective()) for i in range(count)]
    return policy.decide(requests, {}, rng, 0)


def test_feedback_for_a_decision_that_nobody_made_is_unknown() -> None:
    """It changes nothing."""
    policy = Thompson(ARMS)
    assert Ledger().apply(Feedback("d9", 1.0), policy) == UNKNOWN
    assert not policy.quality.count.any()


def test_a_second_score_of_the_same_source_replaces_the_first() -> None:
    """One vote per decision and source; another source has a vote of its own."""
    (decision,) = decisions(1)
    policy, ledger, once = Thompson(ARMS), Ledger(), Thompson(ARMS)
    ledger.apply(decision, policy)
    assert ledger.apply(Feedback("d0", 1.0, "user"), policy) == ACCEPTED
    assert ledger.apply(Feedback("d0", 1.0, "user"), policy) == DUPLICATE
    assert ledger.apply(Feedback("d0", 0.0, "user"), policy) == ACCEPTED
    assert ledger.apply(Feedback("d0", 0.5, "judge"), policy) == ACCEPTED
    once.score(decision, 0.0)
    once.score(decision, 0.5)
    for name, value in once.state().items():
        assert np.allclose(value, policy.state()[name], atol=1e-12)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_repeated_and_reordered_events_give_the_same_posterior(data: st.DataObject) -> None:
    """The posterior of any shuffle with repetitions is that of each event once."""
    made = decisions(6)
    events = [Outcome(d.id, "ok", 0.1, 0.3 + i / 10, 20, 5 + i) for i, d in enumerate(made)]
    events += [Feedback(d.id, i / 6, "user") for i, d in enumerate(made)]
    shuffled = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=8))))
    policy, ledger, reference = Thompson(ARMS), Ledger(), Thompson(ARMS)
    for event in (*made, *shuffled):
        ledger.apply(event, policy)
    for decision, event in zip(made + made, events, strict=True):
        if isinstance(event, Outcome):
            reference.learn(decision, event)
        else:
            reference.score(decision, event.score)
    for name, value in reference.state().items():
        assert np.allclose(value, policy.state()[name], rtol=1e-9, atol=1e-12), name
