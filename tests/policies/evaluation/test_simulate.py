"""Offline simulation of a policy on a recorded stream."""

from dataclasses import replace

import numpy as np
import pytest

from policies.evaluation.simulate import FeedbackPlan, Stream, simulate
from policies.registry import make_policy
from policies.types import Objective
from tests.support.requests import make_profile

N = 400


@pytest.fixture
def stream() -> Stream:
    """Questions that `good` answers rightly nine times in ten and `bad` once; `good` costs ten times as much."""
    rng = np.random.default_rng(2)
    profiles = [
        replace(make_profile(f"What is {i} plus {i + 1}?"), max_output_tokens=1)
        for i in range(N)
    ]
    scores = (rng.random((N, 2)) < (0.1, 0.9)).astype(float)
    return Stream(profiles, ("bad", "good"), scores, np.tile([0.1, 1.0], (N, 1)))


def test_the_same_seed_gives_the_same_result(stream: Stream) -> None:
    """A simulation uses no global state; its random numbers are an argument."""
    one, other = (
        simulate(
            make_policy("thompson", stream.arms_at(0)),
            stream,
            Objective(),
            np.random.default_rng(4),
        )
        for _ in range(2)
    )
    assert (one.chosen == other.chosen).all() and (
        one.propensity == other.propensity
    ).all()


def test_a_policy_learns_which_arm_is_worth_its_price(stream: Stream) -> None:
    """A good answer is worth 0.8 more: with a small cost weight the policy chooses `good`, with a large one `bad`."""
    for cost_weight, wanted in ((0.1, 1), (2.0, 0)):
        policy = make_policy("thompson", stream.arms_at(0))
        trace = simulate(
            policy, stream, Objective(cost_weight=cost_weight), np.random.default_rng(5)
        )
        assert (trace.chosen[N // 2 :] == wanted).mean() > 0.9
        assert trace.utility == pytest.approx(
            trace.score - cost_weight * trace.cost_usd
        )


def test_late_and_missing_scores_still_teach(stream: Stream) -> None:
    """The policy learns from scores that come 50 requests later, and for every second answer only."""
    policy = make_policy("thompson", stream.arms_at(0))
    trace = simulate(
        policy,
        stream,
        Objective(),
        np.random.default_rng(6),
        FeedbackPlan(coverage=0.5, delay=50),
    )
    assert (trace.chosen[N // 2 :] == 1).mean() > 0.85


def test_a_new_price_takes_effect_at_the_next_decision(stream: Stream) -> None:
    """After a change of price the policy keeps what it learned of quality, and needs no new scores."""

    def cheaper(policy):  # type: ignore[no-untyped-def]
        after = make_policy(
            "thompson", [replace(arm, output_price_usd=0.1) for arm in policy.arms]
        )
        after.restore(policy.state())
        return after

    trace = simulate(
        make_policy("thompson", stream.arms_at(0)),
        stream,
        Objective(cost_weight=2.0),
        np.random.default_rng(7),
        interventions={N // 2: cheaper},
    )
    assert (trace.chosen[N // 4 : N // 2] == 0).mean() > 0.9
    assert (trace.chosen[N // 2 : N // 2 + 20] == 1).mean() > 0.5
