"""Off-policy evaluation: estimates of one policy's value from the log of another."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.statistics.offpolicy import WORLDS
from benchmarks.statistics.worlds import (
    BETTER,
    CHAMPION,
    CLEAR,
    World,
    collect,
    rule,
)
from policies.evaluation import confidence, offpolicy, outcome_model, overlap
from policies.evaluation.overlap import LoggedDecisions, UnanswerableError
from policies.types import Vector

SEEDS = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)


def random_log(
    seed: int, n: int = 400, arms: int = 3
) -> tuple[LoggedDecisions, Vector]:
    """A log of a policy with at least 10 % for each arm, and a target."""
    rng = np.random.default_rng(seed)
    e = 0.1 + (1 - 0.1 * arms) * rng.dirichlet(np.ones(arms), n)
    chosen = np.minimum((e.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1), arms - 1)
    rewards = (rng.random(n) < 0.2 + 0.6 * chosen / arms).astype(float)
    return LoggedDecisions(chosen, e, rewards, rng.random((n, arms))), rng.dirichlet(
        np.ones(arms), n
    )


@pytest.fixture(scope="module")
def adaptive() -> list[tuple[LoggedDecisions, np.ndarray]]:
    """160 logs of Thompson sampling that learned while it decided."""
    return list(collect(WORLDS["clear"], 160, 1000, seed=11))


@pytest.mark.parametrize(
    "target", [rule(2, 2, 2, 2, noise=0.0), rule(0, 0, 0, 0, noise=1.0), BETTER]
)
def test_intervals_hold_the_truth_on_adaptive_logs(
    adaptive: list[tuple[LoggedDecisions, np.ndarray]], target: Vector
) -> None:
    """The 95 % interval of DR with stabilised weights holds the value of a policy that did not collect the log."""
    truth = WORLDS["clear"].value(target)
    found = [offpolicy.estimate(data, target[kinds]) for data, kinds in adaptive]
    assert 0.90 <= np.mean([e.low <= truth <= e.high for e in found]) <= 0.995
    assert abs(np.mean([e.value for e in found]) - truth) < 0.01


def test_confidence_sequence_holds_at_all_times_at_once(
    adaptive: list[tuple[LoggedDecisions, np.ndarray]],
) -> None:
    """With a look after each decision, fewer than 5 % of all logs mislead, and the final bound is useful."""
    truth = WORLDS["clear"].value(BETTER) - WORLDS["clear"].value(CHAMPION)
    held = []
    widths = []
    for data, kinds in adaptive[:80]:
        low, high = offpolicy.confidence_sequence(data, BETTER[kinds], CHAMPION[kinds])
        held.append(((low <= truth) & (truth <= high)).all())
        widths.append((high - low)[[50, -1]])
    assert np.mean(held) >= 0.95
    early, late = np.mean(widths, axis=0)
    assert late < 0.5 * early < 1.1


def test_missing_feedback_is_not_zero() -> None:
    """With 30, 50 and 70 % of the rewards missing, by arm, the estimate stays at the true value; zeros in their place
    would halve it.
    """
    world = World(CLEAR, feedback=(0.3, 0.5, 0.7))
    found = []
    zeros = []
    for data, kinds in collect(world, 60, 2500, seed=5):
        found.append(offpolicy.estimate(data, BETTER[kinds]).value)
        zeros.append(
            offpolicy.estimate(
                replace(data, rewards=np.nan_to_num(data.rewards)), BETTER[kinds]
            ).value
        )
    assert abs(np.mean(found) - world.value(BETTER)) < 0.02
    assert np.mean(zeros) < world.value(BETTER) - 0.2


@given(SEEDS)
@quick
def test_a_policy_evaluated_on_its_own_log_gets_its_own_mean(seed: int) -> None:
    """If the target is the policy that decided, every weight is 1, and IPS and SNIPS equal the mean reward."""
    data, _ = random_log(seed)
    for kind in ("ips", "snips"):
        found = offpolicy.estimate(data, data.propensities, kind, "uniform")
        assert found.value == pytest.approx(data.rewards.mean())


@given(SEEDS)
@quick
def test_a_difference_is_the_difference_of_the_values(seed: int) -> None:
    """With plain weights, the difference of two targets equals the difference of their values; a policy differs from
    itself by 0.
    """
    data, target = random_log(seed)
    other = data.propensities
    for kind in offpolicy.ESTIMATORS:
        gain = offpolicy.difference(data, other, target, kind, "uniform")
        apart = [
            offpolicy.estimate(data, t, kind, "uniform").value for t in (target, other)
        ]
        assert gain.value == pytest.approx(apart[0] - apart[1], abs=1e-9)
        back = offpolicy.difference(data, target, other, kind)
        assert back.low == pytest.approx(
            -offpolicy.difference(data, other, target, kind).high, abs=1e-9
        )
    none = offpolicy.difference(data, target, target)
    assert none.low == none.value == none.high == 0.0


@given(SEEDS, st.floats(-5, 5), st.floats(0.1, 10))
@quick
def test_units_of_the_reward_do_not_matter(
    seed: int, shift: float, scale: float
) -> None:
    """Rewards in other units give the same DR estimate and confidence sequence in these units."""
    data, target = random_log(seed)
    assert data.predictions is not None
    moved = replace(
        data,
        rewards=data.rewards * scale + shift,
        predictions=data.predictions * scale + shift,
        bounds=(shift - 1e-9, shift + scale + 1e-9),
    )
    one = offpolicy.estimate(data, target)
    two = offpolicy.estimate(moved, target)
    assert two.value == pytest.approx(one.value * scale + shift, abs=1e-6)
    assert two.high - two.low == pytest.approx(scale * (one.high - one.low), rel=1e-6)
    sequences = [offpolicy.confidence_sequence(d, target)[0] for d in (data, moved)]
    np.testing.assert_allclose(sequences[1], sequences[0] * scale + shift, atol=1e-5)


@given(SEEDS)
@quick
def test_names_of_arms_do_not_matter(seed: int) -> None:
    """Columns in another order give the same estimate."""
    data, target = random_log(seed)
    assert data.predictions is not None
    order = np.random.default_rng(seed).permutation(3)
    moved = LoggedDecisions(
        np.argsort(order)[data.chosen],
        data.propensities[:, order],
        data.rewards,
        data.predictions[:, order],
    )
    for kind in offpolicy.ESTIMATORS:
        mine, theirs = (
            offpolicy.estimate(d, t, kind)
            for d, t in ((data, target), (moved, target[:, order]))
        )
        assert mine.as_dict() == pytest.approx(theirs.as_dict())


@given(SEEDS, st.integers(1, 399))
@quick
def test_weights_and_predictions_depend_on_the_past_only(seed: int, now: int) -> None:
    """A change of later rewards leaves the weights and predictions of earlier decisions as they were."""
    data, _ = random_log(seed)
    features = np.column_stack(
        [np.ones(400), np.random.default_rng(seed).random((400, 2))]
    )
    changed = np.where(np.arange(400) >= now, 1 - data.rewards, data.rewards)
    before = outcome_model.fit_predictions(features, data.chosen, data.rewards, 3)
    after = outcome_model.fit_predictions(features, data.chosen, changed, 3)
    np.testing.assert_array_equal(before[: now + 1], after[: now + 1])
    means = [
        overlap.running_means(replace(data, rewards=r), 3)[: now + 1]
        for r in (data.rewards, changed)
    ]
    np.testing.assert_array_equal(*means)
    weights = [offpolicy.stabilisers(r + 1)[: now + 1] for r in (data.rewards, changed)]
    np.testing.assert_array_equal(*weights)


def test_fitted_predictions_narrow_the_interval() -> None:
    """If features predict the reward, DR with a fitted model has a narrower interval than IPS and covers as well."""
    rng = np.random.default_rng(3)
    x = np.column_stack([np.ones(2000), rng.random((2000, 2))])
    chosen = rng.integers(3, size=2000)
    rewards = np.clip(0.2 + 0.6 * x[:, 1] + 0.02 * rng.standard_normal(2000), 0, 1)
    data = LoggedDecisions(
        chosen,
        np.full((2000, 3), 1 / 3),
        rewards,
        outcome_model.fit_predictions(x, chosen, rewards, 3),
    )
    target = np.tile([0.0, 0.0, 1.0], (2000, 1))
    dr, ips = (offpolicy.estimate(data, target, kind) for kind in ("dr", "ips"))
    assert dr.low < 0.5 < dr.high
    assert dr.standard_error < 0.4 * ips.standard_error


def test_the_chosen_propensity_is_enough() -> None:
    """With the propensity of the chosen arm only, estimates with plain weights are the same, and the confidence
    sequence still covers the true value.
    """
    data, kinds = next(collect(WORLDS["clear"], 1, 2000, seed=2))
    alone = replace(data, propensities=data.propensities[np.arange(2000), data.chosen])
    target = BETTER[kinds]
    one, two = (offpolicy.estimate(d, target, "dr", "uniform") for d in (data, alone))
    assert one.value == pytest.approx(two.value)
    low, high = offpolicy.confidence_sequence(alone, target)
    assert (low <= WORLDS["clear"].value(BETTER)).all() and (
        WORLDS["clear"].value(BETTER) <= high
    ).all()


def test_an_untried_arm_widens_the_interval_by_its_whole_share() -> None:
    """A target that chooses an untried arm in 4 % of its decisions is uncertain by at least 4 points in either
    direction.
    """
    data, _ = random_log(1, n=2000)
    e = data.propensities.copy()
    never = np.flatnonzero(data.chosen != 2)[: int(0.04 * 2000)]
    e[never] = e[never] * [1, 1, 0] / e[never, :2].sum(axis=1, keepdims=True)
    target = np.zeros((2000, 3))
    target[:, 2] = 1.0
    found = offpolicy.estimate(replace(data, propensities=e), target, weights="uniform")
    assert overlap.overlap(
        replace(data, propensities=e), target
    ).unsupported == pytest.approx(0.04)
    assert found.high - found.low >= 0.08 + 2 * found.standard_error


def test_an_unanswerable_question_is_refused_with_a_reason() -> None:
    """No overlap, a deterministic log, too little feedback, too few effective samples, and propensities that are no
    probabilities.
    """
    n = 1000
    data, target = random_log(4, n)
    rewards = data.rewards.copy()
    rewards[60:] = np.nan
    with pytest.raises(UnanswerableError, match="60 of 1000 decisions have a reward"):
        offpolicy.estimate(replace(data, rewards=rewards), target)
    certain = replace(data, propensities=np.eye(3)[data.chosen])
    with pytest.raises(UnanswerableError, match="made without chance"):
        offpolicy.estimate(certain, target)
    assert offpolicy.estimate(certain, certain.propensities).value == pytest.approx(
        data.rewards.mean(), abs=0.05
    )
    rare = np.tile([0.98, 0.02, 0.0], (n, 1))
    few = replace(data, propensities=rare, chosen=(np.arange(n) % 50 == 0).astype(int))
    with pytest.raises(UnanswerableError, match="worth 20 of the target's own"):
        offpolicy.estimate(few, np.tile([0.0, 1.0, 0.0], (n, 1)))
    with pytest.raises(UnanswerableError, match="hardly ever tried 100%"):
        offpolicy.estimate(few, np.tile([0.0, 0.0, 1.0], (n, 1)))
    false = replace(
        data, propensities=np.tile([0.2, 0.2, 0.6], (n, 1)), chosen=np.arange(n) % 3
    )
    with pytest.raises(
        UnanswerableError, match="not those with which the arms were chosen"
    ):
        offpolicy.estimate(false, np.tile([1.0, 0.0, 0.0], (n, 1)))


def test_malformed_logs_are_errors() -> None:
    """Each error says what is wrong with the log."""
    data, target = random_log(6)
    for change, message in (
        ({"rewards": data.rewards[1:]}, "shapes"),
        ({"rewards": data.rewards + 3}, "clip them"),
        ({"propensities": data.propensities * 3}, "in \\[0, 1\\]"),
        ({"bounds": (1.0, 0.0)}, "lowest"),
        ({"feedback_rate": np.zeros(400)}, "feedback_rate"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(data, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        offpolicy.estimate(data, target[:, :2])
    with pytest.raises(ValueError, match="sum of at most 1"):
        offpolicy.estimate(data, 2 * target)
    with pytest.raises(ValueError, match="choose one of: ips, snips, dr"):
        offpolicy.estimate(data, target, "magic")


def test_overlap_reports_how_uneven_the_weights_are() -> None:
    """Ten decisions of weight 50 among a thousand have half of all weight, and leave few effective samples."""
    n = 1000
    e = np.tile([0.5, 0.5], (n, 1))
    e[:10] = [0.01, 0.99]
    found = overlap.overlap(
        LoggedDecisions(np.zeros(n, int), e, np.ones(n)), np.tile([0.5, 0.5], (n, 1))
    )
    assert (
        found.largest_weight == pytest.approx(50) and found.smallest_propensity == 0.01
    )
    assert found.top_share == pytest.approx(500 / (500 + 990))
    assert found.ess < found.decisions / 1.2 and found.unsupported == 0.0


@given(st.floats(0, 1e5), st.floats(1e-4, 0.5))
@quick
def test_the_boundary_is_where_the_mixture_reaches_its_threshold(
    variation: float, alpha: float
) -> None:
    """At the boundary the mixture has reached 1/α, and exceeds it by little."""
    u = confidence.boundary(np.array([variation]), alpha)
    assert (
        -1e-9
        <= confidence.log_evidence(u, np.array([variation]))[0] - np.log(1 / alpha)
        < 0.05
    )


@pytest.mark.parametrize("most", [0.5, 40.0, 1e5])
def test_the_boundary_of_a_long_log_is_hardly_above_the_exact_one(most: float) -> None:
    """Between its knots it is never below, so the bounds stay valid."""
    variation = np.linspace(0.0, most, 5001)
    found = confidence.boundary(variation, 0.025)
    exact = np.concatenate(
        [confidence.boundary(part, 0.025) for part in np.array_split(variation, 50)]
    )
    assert (found >= exact - 1e-9).all() and (found / exact - 1).max() < 1e-3


def test_bounds_for_heavy_tails_hold_at_all_times() -> None:
    """Rare values of 50 among zeros, like importance weights: at most 5 % of 300 sequences ever exceed the mean."""
    rng = np.random.default_rng(9)
    wrong = [
        (
            confidence.lower_sequence(50.0 * (rng.random(1500) < 0.01), 0.0, 1.0, 0.05)
            > 0.5
        ).any()
        for _ in range(300)
    ]
    assert np.mean(wrong) <= 0.05
    with pytest.raises(ValueError, match="below the lowest"):
        confidence.lower_sequence(np.array([-1.0]), 0.0, 1.0, 0.05)
