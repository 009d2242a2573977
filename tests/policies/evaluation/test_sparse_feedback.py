"""Off-policy evaluation where few answers are scored, failures are always seen, and hedges answer.

Each world is a small version of one in benchmarks/statistics/sparse.py. 100 intervals of 95 % hold the truth in 88 to
100 cases with a probability of 99.9 %.
"""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.statistics.worlds import (
    ALWAYS,
    BETTER,
    BY_KIND,
    CHAMPION,
    CLEAR,
    FLAKY,
    SIZES,
    Log,
    World,
    collect_logs,
)
from policies.evaluation import replay
from policies.evaluation.offpolicy import (
    Estimate,
    confidence_sequence,
    difference,
    estimate,
)
from policies.evaluation.overlap import overlap
from policies.rollout.promotion_gate import may_promote
from policies.types import Vector

LOGS = 100
RATES_BY_KIND = ((0.4,) * 3,) * 2 + ((0.04,) * 3,) * 2
RATES_BY_BOTH = ((0.4, 0.2, 0.1),) * 2 + ((0.1, 0.2, 0.08),) * 2
HEDGED = World(
    CLEAR,
    floor=0.3,
    feedback=RATES_BY_BOTH,
    failures=(0.03, 0.1, 0.3),
    slow=(0.4, 0.1, 0.0),
)


def holds(found: list[Estimate], truth: float) -> float:
    return float(np.mean([e.low <= truth <= e.high for e in found]))


def bias(found: list[Estimate], truth: float) -> float:
    return float(np.mean([e.value for e in found])) - truth


@pytest.mark.parametrize("world", [HEDGED, replace(HEDGED, sample=0.05)])
def test_records_and_the_benchmark_s_arrays_are_the_same(world: World) -> None:
    """So what the benchmark shows for its arrays holds for the records of a journal."""
    (log,) = collect_logs(replace(world, feedback=(0.9,) * 3), 1, 300, seed=4)
    selected = replay.select(log.records(world.sample))
    data = replay.to_log(selected.records, SIZES, replay.score)
    wanted = log.logged()
    for name in ("chosen", "rewards", "always_seen", "answered_by"):
        np.testing.assert_array_equal(getattr(data, name), getattr(wanted, name))
    for name in ("propensities", "predictions", "answers"):
        np.testing.assert_allclose(getattr(data, name), getattr(wanted, name))
    hedges = int((log.answered_by != log.chosen).sum())
    outside = 0 if world.sample == 1.0 else 300 * 19
    expected = {"a second attempt": hedges, replay.OUTSIDE: outside}
    assert selected.left_out == {k: n for k, n in expected.items() if n}
    one, two = (estimate(d, CHAMPION[log.kinds]) for d in (data, wanted))
    assert one.as_dict() == pytest.approx(two.as_dict())


def test_failures_that_are_always_seen_do_not_count_more_than_scores() -> None:
    """An arm with 0.95 quality and 3 % failures has 0.921, although 5 % of its good answers are seen."""
    world = World(FLAKY, floor=0.2, feedback=(0.05,) * 3, failures=(0.03, 0.0, 0.0))
    found = []
    as_scored = []
    for log in collect_logs(world, LOGS, 5000, seed=1):
        data = log.logged()
        found.append(estimate(data, ALWAYS[0][log.kinds]))
        wrong = replace(data, always_seen=None, answers=None)
        as_scored.append(estimate(wrong, ALWAYS[0][log.kinds]))
    truth = world.value(ALWAYS[0])
    assert truth == pytest.approx(0.9215)
    assert holds(found, truth) >= 0.88 and abs(bias(found, truth)) < 0.01
    assert holds(as_scored, truth) < 0.1 and bias(as_scored, truth) < -0.2


def test_rates_by_kind_do_not_promote_the_worse_policy() -> None:
    """Most scores are of code, at which the worse policy is better."""
    world = World(BY_KIND, floor=0.3, feedback=RATES_BY_KIND)
    found = []
    by_size = []
    promoted = 0
    for log in collect_logs(world, LOGS, 8000, seed=2):
        a, b = (target[log.kinds] for target in ALWAYS[:2])
        data = log.logged()
        found.append(difference(data, b, a))
        without = replace(log.naive(), predictions=np.full((8000, 3), 0.5))
        by_size.append(difference(without, b, a))
        promoted += bool(may_promote(data, b, a)["promote"])
    truth = world.value(ALWAYS[0]) - world.value(ALWAYS[1])
    assert truth == pytest.approx(-0.05)
    assert holds(found, truth) >= 0.88 and abs(bias(found, truth)) < 0.03
    assert promoted <= 3
    assert bias(by_size, truth) > 0.15


def test_a_hedged_request_has_its_reward() -> None:
    """Without it the slow answers, which hedges gave, drop out; they are scored at the hedge's rate."""
    found = []
    lost = []
    held = []
    truth = HEDGED.value(ALWAYS[0])
    for log in collect_logs(HEDGED, LOGS, 5000, seed=13):
        target = ALWAYS[0][log.kinds]
        data = log.logged()
        found.append(estimate(data, target))
        without = replace(log.naive(), predictions=np.full((5000, 3), 0.5))
        lost.append(estimate(without, target))
        low, high = confidence_sequence(data, target)
        held.append(((low <= truth) & (truth <= high)).all())
    assert holds(found, truth) >= 0.88 and abs(bias(found, truth)) < 0.012
    assert abs(bias(lost, truth)) > 0.03
    assert np.mean(held) >= 0.94


@pytest.mark.parametrize("estimator", ["ips", "snips", "dr"])
def test_intervals_are_as_wide_as_the_estimates_vary(estimator: str) -> None:
    """Also for IPS, which estimated rates make more exact than known ones would."""
    world = World(np.full((4, 3), 0.8), floor=0.3, feedback=RATES_BY_BOTH)
    found = []
    for log in collect_logs(world, 200, 4500, seed=6):
        found.append(estimate(log.logged(), CHAMPION[log.kinds], estimator))
    spread = np.std([e.value for e in found])
    claimed = np.sqrt(np.mean([e.standard_error**2 for e in found]))
    assert 0.85 < claimed / spread < 1.18


def test_an_estimated_rate_is_no_less_exact_than_a_known_one() -> None:
    """IPS divides by the share that happened to be scored; a known rate does not correct for chance."""
    world = World(np.full((4, 3), 0.8), floor=0.25, feedback=(0.1,) * 3)
    found: dict[bool, list[Estimate]] = {True: [], False: []}
    for log in collect_logs(world, 100, 2500, seed=7):
        for known in found:
            rate = np.full(2500, 0.1) if known else None
            data = replace(log.logged(), feedback_rate=rate)
            found[known].append(estimate(data, CHAMPION[log.kinds], "ips"))
    spread = {known: np.std([e.value for e in all_]) for known, all_ in found.items()}
    error = {
        known: np.mean([e.standard_error for e in v]) for known, v in found.items()
    }
    assert spread[False] < 0.8 * spread[True] and error[False] < 0.8 * error[True]


def test_an_arm_and_kind_without_scores_widens_the_interval() -> None:
    """Its value may be anything, so the interval holds the truth, and is wider by twice the target's share of it."""
    never = ((0.2,) * 3,) * 2 + ((0.0, 0.2, 0.2),) * 2
    world = World(BY_KIND, floor=0.2, feedback=never)
    target = ALWAYS[1].copy()
    target[2:] = [0.08, 0.92, 0.0]
    truth = world.value(target)
    held = []
    for log in collect_logs(world, 40, 3000, seed=8):
        found = estimate(log.logged(), target[log.kinds])
        share = overlap(log.logged(), target[log.kinds]).unsupported
        assert share == pytest.approx(0.04, abs=0.004)
        assert found.high - found.low >= 0.07 + 3.8 * found.standard_error
        held.append(found.low <= truth <= found.high)
    assert np.mean(held) >= 0.95
    always = ALWAYS[0]
    (log,) = collect_logs(world, 1, 3000, seed=9)
    report = may_promote(log.logged(), ALWAYS[1][log.kinds], always[log.kinds])
    assert "has no scores of it" in str(report["reason"]) and not report["promote"]


def test_a_hedge_whose_answers_have_no_scores_widens_the_interval() -> None:
    """Size 1 answers a twentieth of the requests of size 0, and is never scored."""
    world = World(CLEAR, floor=0.2, slow=(0.05, 0.0, 0.0), feedback=(0.3, 0.0, 0.3))
    (log,) = collect_logs(world, 1, 4000, seed=12)
    target = ALWAYS[0][log.kinds]
    assert overlap(log.logged(), target).unsupported == pytest.approx(0.05, abs=0.02)
    found = estimate(log.logged(), target)
    assert found.low <= world.value(ALWAYS[0]) <= found.high
    assert found.high - found.low > 0.06 + 3.8 * found.standard_error


def test_no_estimate_undoes_scores_that_depend_on_the_quality() -> None:
    """Users who score bad answers three times as often make every value too low. A judge's sample does not."""
    by_users = World(CLEAR, floor=0.2, feedback=(0.3,) * 3, good_scored=1 / 3)
    by_judge = replace(by_users, feedback=(0.1,) * 3, good_scored=1.0)
    for world, right in ((by_users, False), (by_judge, True)):
        found = values(world, BETTER)
        assert (holds(found, world.value(BETTER)) >= 0.85) is right
        assert (bias(found, world.value(BETTER)) < -0.1) is not right


def values(world: World, target: Vector) -> list[Estimate]:
    logs: list[Log] = list(collect_logs(world, 40, 4000, seed=10))
    return [estimate(log.logged(), target[log.kinds]) for log in logs]
