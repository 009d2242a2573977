"""Drift detection: a changed arm raises an alarm, and its past is discounted."""

import numpy as np
import pytest

from policies.events import Decision
from policies.thompson.drift import Drift
from policies.thompson.kernels import exploration_factor
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.thompson.posterior import DISCOUNTS
from policies.types import Vector
from tests.policies.thompson.test_policy import ARMS
from tests.support.requests import make_request


def until_alarm(
    drift: Drift, rng: np.random.Generator, expected: float, true: float, at_most: int
) -> int:
    """Scores until it is noticed; `at_most` if it is not."""
    return next(
        (
            n
            for n in range(at_most)
            if drift.observe(0, expected, float(rng.random() < true), n)
        ),
        at_most,
    )


@pytest.mark.parametrize(("expected", "true"), [(0.8, 0.4), (0.4, 0.8), (0.9, 0.6)])
def test_a_shift_raises_an_alarm_soon(
    expected: float, true: float, rng: np.random.Generator
) -> None:
    """Worse or better: within 60 scores in the median of 50."""
    assert (
        np.median([until_alarm(Drift(1), rng, expected, true, 500) for _ in range(50)])
        < 60
    )


@pytest.mark.parametrize("expected", [0.1, 0.5, 0.9, 0.99])
def test_alarms_without_a_shift_are_rare(
    expected: float, rng: np.random.Generator
) -> None:
    """The mean number of scores until a false alarm exceeds the 10,000 that the theory gives for both sides."""
    streams = [
        until_alarm(Drift(1), rng, expected, expected, 20_000) for _ in range(12)
    ]
    assert np.mean(streams) > 10_000


def test_drift_sums_are_separate_for_each_arm_and_can_be_restored() -> None:
    """One arm's scores do not change the other's sums; a restored test continues from its state."""
    drift = Drift(2)
    for _ in range(9):
        drift.observe(1, 0.9, 0.0, drift.known[1])
    other = Drift(2)
    other.restore(drift.state())
    assert drift.worse[0] == 0 and drift.worse[1] > 5
    assert other.known == drift.known == [0, 9]
    worse = other.worse[1]
    assert (
        not other.observe(1, 0.9, 0.0, 4) and other.worse[1] == worse
    )  # much was learned since
    assert (
        not other.observe(1, 0.9, 0.0, 99) and other.worse[1] == worse
    )  # it has changed since
    assert (
        not other.observe(1, 0.9, 0.0, -1) and other.worse[1] > worse
    )  # an old log does not tell
    other.restore(drift.state())
    assert [drift.observe(1, 0.9, 0.0, 9) for _ in range(9)] == [
        other.observe(1, 0.9, 0.0, 9) for _ in range(9)
    ]
    with pytest.raises(ValueError, match="'better' must be 3 finite numbers"):
        Drift(3).restore(drift.state())


def stream(
    policy: Thompson, scores: list[float], rng: np.random.Generator, start: int = 0
) -> list[Decision]:
    """Decisions that are given these scores, whichever arm it is."""
    made = []
    for i, score in enumerate(scores, start):
        (decision,) = policy.decide([make_request()], {}, rng, i)
        policy.score(decision, score)
        made.append(decision)
    return made


def test_the_past_of_a_changed_arm_is_discounted_at_once(
    rng: np.random.Generator,
) -> None:
    """After 1,000 good answers, 60 bad ones suffice to expect a bad one; without the drift test they do not."""
    expected = {}
    for keep in (ThompsonSettings().keep, 1e9):
        policy = Thompson(ARMS[:1], ThompsonSettings(keep=keep))
        stream(policy, [1.0] * 1000, rng)
        stream(policy, [0.0] * 60, rng, 1000)
        expected[keep] = (
            policy.decide([make_request()], {}, rng, 1060)[0].estimates[0].quality
        )
    assert expected[ThompsonSettings().keep] < 0.2 < 0.7 < expected[1e9]


def test_an_arm_that_has_changed_is_explored_again(rng: np.random.Generator) -> None:
    """Its exploration factor rises to nearly that of a new arm; the other arm's does not change."""
    policy = Thompson(ARMS, ThompsonSettings())
    stream(policy, [1.0] * 600, rng)

    def exploration() -> Vector:
        return exploration_factor(
            policy.settings.exploration,
            policy.settings.fade,
            policy.quality.total_scores,
        )

    faded = exploration()
    policy.quality.discount(0, 10.0)
    now = exploration()
    assert now[0] > 1.3 * faded[0] and now[1] == faded[1]


def test_a_replay_finds_the_same_change_whatever_comes_together(
    rng: np.random.Generator,
) -> None:
    """Events folded without decisions in between, as after a restart, give the same sums to 1e-9."""
    policy = Thompson(ARMS, ThompsonSettings())
    made = stream(policy, [1.0] * 300 + [0.0] * 80 + [1.0] * 50, rng)
    assert policy.state()["quality.cuts"][:, 0, 1].min() < 1.0  # there was an alarm
    again = Thompson(ARMS, ThompsonSettings())
    for i, decision in enumerate(made):
        if i % 97 == 0:
            again.advance(i)
        again.score(decision, 1.0 if i < 300 or i >= 380 else 0.0)
    policy.advance(1000)
    again.advance(1000)
    for name, sums in policy.state().items():
        assert np.allclose(sums, again.state()[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("late", [0, 50, 200])
def test_late_scores_report_one_change_only_once(
    late: int, rng: np.random.Generator
) -> None:
    """Late scores of decisions from the start, or from before the change, are ignored: they expected other values."""
    policy = Thompson(ARMS[:1])
    waiting = list[tuple[Decision, float]]()
    alarms = list[int]()
    for i in range(2000):
        (decision,) = policy.decide([make_request()], {}, rng, i)
        waiting.append((decision, float(rng.random() < (0.9 if i < 1200 else 0.3))))
        if len(waiting) > late:
            before = policy.drift.known[0]
            policy.score(*waiting.pop(0))
            alarms += [i] if policy.drift.known[0] < before else []
    assert len(alarms) == 1 and 1200 + late < alarms[0] < 1240 + late


def test_withdrawn_and_restored_votes_are_no_evidence_of_drift(
    rng: np.random.Generator,
) -> None:
    """The drift test counts each score once; an alarm would need 20 of these."""
    policy = Thompson(ARMS[:1])
    made = stream(policy, [1.0] * 300, rng)
    before = policy.drift.state()
    for _ in range(20):
        for decision in made[-20:]:
            policy.score(decision, 1.0, weight=-1.0)
        for decision in made[-20:]:
            policy.score(decision, 1.0, again=True)
    assert all(
        np.array_equal(value, before[name])
        for name, value in policy.drift.state().items()
    )


def test_votes_can_be_withdrawn_after_any_number_of_changes(
    rng: np.random.Generator,
) -> None:
    """More than are remembered; the oldest scores then count for less when they go, never for more than they gave."""
    policy = Thompson(ARMS[:1], ThompsonSettings(forgetting=1.0))
    made = stream(policy, [1.0] * 300, rng)
    for _ in range(DISCOUNTS + 3):
        policy.quality.discount(0, 10.0)
        made += stream(policy, [1.0] * 30, rng, len(made))
    for decision in made:
        policy.score(decision, 1.0, weight=-1.0)
    assert -1e-9 < policy.quality.state()["count"][0] < 10.0
    assert np.linalg.eigvalsh(policy.quality.precision[0]).min() > -1e-9


def test_a_correction_after_the_change_is_exact(rng: np.random.Generator) -> None:
    """Withdrawing an old score subtracts exactly the weight that it still had."""
    policy = Thompson(ARMS, ThompsonSettings(forgetting=1.0))
    without = Thompson(ARMS, ThompsonSettings(forgetting=1.0))
    made = stream(policy, [1.0] * 300, rng)
    for i, decision in enumerate(made):
        if i != 5:
            without.score(decision, 1.0)
    for one in (policy, without):
        one.quality.discount(0, 10.0)
        one.quality.discount(1, 10.0)
    policy.score(made[5], 1.0, weight=-1.0)
    arm = policy._names.index(made[5].arm)
    mine, theirs = (
        p.quality.state()["count"][arm] / p.quality.state()["cuts"][arm, 0, 1]
        for p in (policy, without)
    )
    assert mine == pytest.approx(theirs)
