"""The measured difference between a rule and a policy, in simulated worlds with a known truth."""

from dataclasses import replace

import numpy as np
import pytest

from policies.events import Decision, Outcome, Record
from policies.rollout.comparison import RandomisedComparison
from policies.types import Objective
from tests.support.requests import make_profile

KINDS = ("chat", "code")
PROFILES = {kind: replace(make_profile(), kind=kind) for kind in KINDS}
# by kind: probability that `large` and `small` answer well, and that a good answer of the kind is scored
RIGHT = {"chat": (0.6, 0.9), "code": (0.9, 0.3)}
SCORED = {"chat": 0.5, "code": 0.1}
FLAWED = {"large": 0.0, "small": 0.08}
SHARE = 0.2  # of the policy


def gain(kind: str) -> float:
    """The rule takes `large`, and the policy `small` for every kind: the true gain of the policy for this kind."""
    large, small = RIGHT[kind]
    return (1 - FLAWED["small"]) * small - large


def record(kind: str, arm: str, flawed: bool) -> Record:
    decision = Decision("d", arm, 0, "", PROFILES[kind], Objective())
    return Record(decision, Outcome("d", "error" if flawed else "ok"))


def play(
    rng: np.random.Generator, requests: int, alike: float = 0.0
) -> RandomisedComparison:
    """Requests of both kinds; the policy chooses as the rule does for the share `alike` of them."""
    comparison = RandomisedComparison()
    for _ in range(requests):
        differs = rng.random() >= alike
        comparison.add_request(differs)
        if not differs:
            continue
        kind = KINDS[int(rng.random() < 0.5)]
        tried = rng.random() < SHARE
        arm = "small" if tried else "large"
        answer = record(kind, arm, rng.random() < FLAWED[arm])
        comparison.add_answer(answer, tried)
        if answer.flaw:
            comparison.add_reward(answer, tried, 0.0)
        elif rng.random() < SCORED[kind]:
            right = rng.random() < RIGHT[kind][int(tried)]
            comparison.add_reward(answer, tried, float(right))
    return comparison


TRUE_GAIN = 0.5 * (gain("chat") + gain("code"))


@pytest.mark.parametrize(("repeated", "least"), [(False, 0.91), (True, 0.97)])
def test_the_interval_contains_the_true_gain(repeated: bool, least: float) -> None:
    """Although flaws are always seen, and scores are five times as frequent for the kind that the policy does well."""
    inside = 0
    values = []
    for seed in range(200):
        found = play(np.random.default_rng(seed), 1500).difference(0.95, repeated)
        assert found.value is not None
        values.append(found.value)
        inside += found.lower <= TRUE_GAIN <= found.upper
    print(
        f"{inside} of 200 intervals hold, mean {np.mean(values):.3f}, {TRUE_GAIN:.3f}"
    )
    assert inside >= 200 * least
    assert np.mean(values) == pytest.approx(TRUE_GAIN, abs=0.01)


def test_choices_that_are_alike_shrink_the_gain_and_the_interval() -> None:
    """Where both choose the same arm the coin changes nothing, so the gain per request shrinks with their share."""
    apart = play(np.random.default_rng(1), 4000).difference()
    alike = play(np.random.default_rng(1), 20_000, alike=0.8).difference()
    assert apart.value is not None and alike.value is not None
    assert alike.differed == pytest.approx(0.2, abs=0.01)
    assert alike.value == pytest.approx(0.2 * TRUE_GAIN, abs=0.02)
    width = apart.upper - apart.lower
    assert alike.upper - alike.lower == pytest.approx(0.2 * width, rel=0.2)


def test_without_rewards_only_the_share_of_differing_choices_is_known() -> None:
    """The difference is unknown and bounded: a policy that decides as the rule does cannot lose anything."""
    comparison = RandomisedComparison()
    nothing = comparison.difference()
    assert nothing.value is None and nothing.differed is None
    assert (nothing.lower, nothing.upper) == (-2.0, 2.0)
    for _ in range(600):
        comparison.add_request(differs=False)
    alike = comparison.difference()
    assert alike.value is None and alike.upper == -alike.lower == pytest.approx(0.01)


def test_flaws_alone_do_not_tell_what_the_other_answers_are_worth() -> None:
    """Five failures beside fifty answers without a score are no mean of 0."""
    comparison = RandomisedComparison()
    for tried in (True, False):
        for number in range(55):
            comparison.add_request(differs=True)
            answer = record("chat", "small", flawed=number < 5)
            comparison.add_answer(answer, tried)
            if answer.flaw:
                comparison.add_reward(answer, tried, 0.0)
    assert comparison.rewards(True) == 5
    assert comparison.difference().value is None


def test_equal_rewards_do_not_make_an_interval_without_width() -> None:
    """Two rewards of 1 on either side prove little."""
    comparison = RandomisedComparison()
    for tried in (True, False):
        for _ in range(2):
            comparison.add_request(differs=True)
            answer = record("chat", "small", flawed=False)
            comparison.add_answer(answer, tried)
            comparison.add_reward(answer, tried, 1.0)
    found = comparison.difference()
    assert found.value == 0.0 and found.upper - found.lower > 0.5


def test_a_comparison_is_restored() -> None:
    """And continues: the same events give the same difference."""
    rng = np.random.default_rng(4)
    comparison = play(rng, 500)
    again = RandomisedComparison()
    again.restore(comparison.requests, comparison.differed, comparison.state())
    assert again.difference() == comparison.difference()
