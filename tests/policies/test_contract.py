"""The contract that every policy keeps."""

from dataclasses import replace

import numpy as np
import pytest

from policies.base import Policy
from policies.events import Outcome
from policies.registry import POLICIES, make_policy, rearm
from policies.types import Arm, ModelState, Objective
from tests.support.requests import make_request


@pytest.fixture(params=sorted(POLICIES))
def policy(request: pytest.FixtureRequest, arms: tuple[Arm, ...]) -> Policy:
    return make_policy(request.param, arms)


def teach(policy: Policy, count: int = 30) -> None:
    rng = np.random.default_rng(1)
    for i in range(count):
        (decision,) = policy.decide(
            [make_request(f"What is {i} plus {i}?")], {}, rng, i
        )
        policy.learn(
            decision,
            Outcome(decision.id, "ok", 0.1, 0.2 + 0.01 * (i % 3), 20, 5 + i % 4),
        )
        policy.score(decision, float(i % 2))


def test_same_seed_same_decisions(policy: Policy) -> None:
    """Nothing but the arguments and the state decides."""
    requests = [
        make_request(text)
        for text in ("Sort 3 1 2", "Explain why, and then prove it.", "hi")
    ]
    one = policy.decide(requests, {}, np.random.default_rng(3), 0)
    other = policy.decide(requests, {}, np.random.default_rng(3), 0)
    assert [d.arm for d in one] == [d.arm for d in other]


def test_restored_state_decides_alike(policy: Policy, arms: tuple[Arm, ...]) -> None:
    """restore(state()) carries all that was learned."""
    teach(policy)
    twin = make_policy(policy.name, arms)
    twin.restore(policy.state())
    requests = [make_request("What is 30 plus 12?")]
    one = policy.decide(requests, {}, np.random.default_rng(3), 30)[0]
    other = twin.decide(requests, {}, np.random.default_rng(3), 30)[0]
    assert one.arm == other.arm
    for mine, its in zip(one.estimates, other.estimates, strict=True):
        for a, b in zip(mine, its, strict=True):
            assert a == b if isinstance(a, str) else a == pytest.approx(b, rel=1e-9)


def test_propensities_are_a_distribution_over_the_eligible(policy: Policy) -> None:
    """They sum to one, and the arm that cannot chat has none."""
    teach(policy)
    (decision,) = policy.decide([make_request()], {}, np.random.default_rng(0), 30)
    assert sum(e.propensity for e in decision.estimates) == pytest.approx(1.0, abs=1e-6)
    assert decision.estimate("embedder").propensity == 0
    assert decision.estimate().propensity > 0


@pytest.mark.parametrize(
    ("objective", "tokens", "states", "left"),
    [
        (Objective(models=("small",)), 20, {}, "small"),
        (Objective(), 2000, {}, "large"),
        (Objective(), 20, {"large": ModelState(healthy=False)}, "small"),
        (Objective(models=("embedder",)), 20, {}, ""),
        (Objective(), 9999, {}, ""),
    ],
)
def test_hard_limits_hold(
    policy: Policy,
    objective: Objective,
    tokens: int,
    states: dict[str, ModelState],
    left: str,
) -> None:
    """Allowed models, context, task and health leave one arm or none, at every draw, and each removal is explained."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        (decision,) = policy.decide(
            [make_request(objective=objective, tokens=tokens)], states, rng, 0
        )
        assert decision.arm == left
    assert all(e.removed_by for e in decision.estimates if e.arm != left)


def test_learning_about_one_arm_does_not_change_the_others(policy: Policy) -> None:
    """Forced decisions for `small` do not change the estimates of `large`."""
    request = make_request(objective=Objective(models=("small",)))
    rng = np.random.default_rng(0)
    before = policy.decide([make_request()], {}, rng, 0)[0].estimate("large")
    for _ in range(20):
        (decision,) = policy.decide([request], {}, rng, 0)
        policy.learn(decision, Outcome(decision.id, "ok", 0.5, 1.0, 20, 9))
        policy.score(decision, 0.0)
    after = policy.decide([make_request()], {}, rng, 0)[0].estimate("large")
    assert before.latency_s == after.latency_s
    if (
        policy.name == "thompson"
    ):  # its arms share how hard requests are, so bad news of one is news of all
        assert 0 < after.quality < before.quality
    else:
        assert before.quality == after.quality


@pytest.mark.parametrize("count", [1, 2])
def test_an_arm_in_anothers_place_starts_afresh(
    policy: Policy, arms: tuple[Arm, ...], count: int
) -> None:
    """Alone or not: nothing but the clock goes on."""
    known = arms[:count]
    others = tuple(replace(arm, name=f"new {arm.name}") for arm in arms[:count])
    taught = make_policy(policy.name, known)
    fresh = make_policy(policy.name, others)
    teach(taught)
    after = rearm(taught, others)
    for name, value in after.state().items():
        wanted = taught if name.endswith((".reference", ".latest")) else fresh
        assert np.array_equal(value, wanted.state()[name]), name


def test_the_context_is_not_written_to(policy: Policy) -> None:
    """Features arrive read-only from another process; every policy accepts them."""
    request = make_request()
    features = request.profile.features.copy()
    features.setflags(write=False)
    frozen = replace(request, profile=replace(request.profile, features=features))
    (decision,) = policy.decide([frozen], {}, np.random.default_rng(0), 0)
    policy.learn(decision, Outcome(decision.id, "ok", 0.1, 0.2, 20, 5))
    policy.score(decision, 1.0)


def test_always_without_a_name_takes_the_largest_that_can(
    arms: tuple[Arm, ...],
) -> None:
    """The last arm does embeddings only; if a limit excludes the named arm, the first eligible arm is chosen."""
    rng = np.random.default_rng(0)
    largest = make_policy("always", arms)
    embedder = make_policy("always", arms, {"arm": "embedder"})
    assert [
        policy.decide([make_request()], {}, rng, 0)[0].arm
        for policy in (largest, embedder)
    ] == ["large", "small"]
    assert largest.decide([make_request(task="embed")], {}, rng, 0)[0].arm == "embedder"


def test_an_unknown_policy_names_the_known_ones(arms: tuple[Arm, ...]) -> None:
    """A typo in the config says what to write instead."""
    with pytest.raises(
        ValueError,
        match=f"unknown policy 'tompson'; choose one of: {', '.join(POLICIES)}",
    ):
        make_policy("tompson", arms)
    with pytest.raises(ValueError, match="does not take these options"):
        make_policy("thompson", arms, {"explore": 1})
