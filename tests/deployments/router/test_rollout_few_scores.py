"""The regression watch in a router's rollout, where few answers are scored and failures are always seen."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.statistics.regression import (
    BY_KIND,
    FLAKY,
    OFTEN,
    SLOW,
    STEADY,
    TALKER,
    Arm,
    Promotion,
    Trial,
)
from policies.events import Record
from policies.rollout.reward_sampling import RewardSampler

RUNS = 12
REQUESTS = 8000


def rolled_back(world: Promotion, runs: int = RUNS, requests: int = REQUESTS) -> int:
    """Number of runs in which the promoted policy is rolled back."""
    ends = [Trial(world, np.random.default_rng(i)).run(requests) for i in range(runs)]
    return sum(end > 0 for end in ends)


@pytest.mark.parametrize("judged", [False, True])
def test_a_better_policy_with_failures_stays(judged: bool) -> None:
    """It has 3 % failures, all of which are seen, and 0.95 quality, of which 5 % are seen. Alpha is 5 %."""
    assert rolled_back(Promotion(FLAKY, STEADY, judged=judged)) <= 2


def test_it_would_not_stay_if_all_that_is_seen_counted_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The world is one in which the mistake shows."""
    monkeypatch.setattr(RewardSampler, "probability", take_all)
    worst = replace(FLAKY, failures=0.06)
    assert rolled_back(Promotion(worst, STEADY), 6, 30_000) >= 5


def take_all(sampler: RewardSampler, record: Record) -> float:
    return 1.0


@pytest.mark.parametrize("judged", [False, True])
def test_a_worse_policy_is_found(judged: bool) -> None:
    """Also with few scores: 0.55 after 0.95, and one that fails in 40 %."""
    poor = Arm((0.55, 0.55), scored=(0.2, 0.2))
    good = Arm((0.95, 0.95), scored=(0.2, 0.2))
    failing = replace(good, failures=0.4)
    for worse in (poor, failing):
        world = Promotion(worse, good, judged=judged)
        assert rolled_back(world, 8) >= 7


def test_a_policy_that_is_scored_more_often_is_not_blamed() -> None:
    """The rates differ by arm, and both fail in 10 %."""
    often, seldom = (replace(arm, failures=0.1) for arm in (OFTEN, STEADY))
    assert rolled_back(Promotion(often, seldom)) <= 2
    assert rolled_back(Promotion(seldom, often)) <= 2


def test_rates_by_kind_do_not_hide_the_kind_that_is_seldom_scored() -> None:
    """Better on the mean of both kinds, and worse by 0.3 where most scores are."""
    much_better = replace(TALKER, quality=(0.55, 0.95))
    coder = Arm((0.85, 0.10), scored=BY_KIND)
    assert rolled_back(Promotion(much_better, coder)) <= 2


def test_a_slow_policy_does_not_lose_its_slow_answers_to_hedges() -> None:
    """Half of its requests are answered by a hedge 4 s later, which costs 0.4 each."""
    slow, steady = (replace(arm, scored=(0.5, 0.5)) for arm in (SLOW, STEADY))
    assert rolled_back(Promotion(slow, steady), 8) >= 7
    fine = replace(slow, slow=0.0)
    assert rolled_back(Promotion(fine, steady), 8) <= 2
