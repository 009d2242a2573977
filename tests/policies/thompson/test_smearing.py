"""The factor by which an arm's answers are longer on the mean than a log-normal model expects."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from policies.events import Decision, Outcome
from policies.thompson.policy import Thompson
from policies.thompson.smearing import LEAST, MOST, Smearing
from policies.types import Arm, Objective, Request
from tests.support.requests import make_profile

ARMS = (Arm("one", context_tokens=1 << 20, output_price_usd=1.0),)
PROFILE = make_profile("Prove that 347 * 586 is even.")
Draw = Callable[[np.random.Generator], int]


def long_tailed(rng: np.random.Generator) -> int:
    """One answer in ten is thirty times as long."""
    usual = 100 * np.exp(0.3 * rng.standard_normal())
    return int(usual * (30 if rng.random() < 0.1 else 1))


def log_normal(rng: np.random.Generator) -> int:
    """The distribution that the model assumes."""
    return int(200 * np.exp(0.8 * rng.standard_normal()))


def answered(
    policy: Thompson, lengths: list[int], limit: int = 0
) -> list[tuple[Decision, Outcome]]:
    """Decisions with outcomes of these lengths, from which the policy has learned."""
    profile = replace(PROFILE, max_output_tokens=limit)
    rng = np.random.default_rng(0)
    events = []
    for n, tokens in enumerate(lengths):
        request = Request(f"d{n}", profile, Objective())
        (decision,) = policy.decide([request], {}, rng, n)
        cut = bool(limit) and tokens >= limit
        outcome = Outcome(
            decision.id,
            "ok",
            0.1,
            0.1 + 0.01 * tokens,
            20,
            min(tokens, limit) if limit else tokens,
            finish_reason="length" if cut else "stop",
        )
        policy.learn(decision, outcome)
        events.append((decision, outcome))
    return events


def length_factor(policy: Thompson) -> float:
    """The factor on the length of the first arm's answers, with all that was learned."""
    policy.latency.smearing.refresh()
    return policy.latency.smearing.factor(0)


@pytest.mark.parametrize("draw", [long_tailed, log_normal])
def test_the_expected_length_is_the_mean_length(draw: Draw) -> None:
    """With a long tail, which alone would be expected 38 % short, as with the distribution that the model assumes."""
    ratios = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        lengths = [draw(rng) for _ in range(1500)]
        events = answered(Thompson(ARMS), lengths)
        expected = [decision.estimate().output_tokens for decision, _ in events[500:]]
        ratios.append(np.mean(expected) / np.mean(lengths))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.08)


def test_latency_and_cost_contain_the_factor() -> None:
    """Both are proportional to the expected length."""
    rng = np.random.default_rng(1)
    events = answered(Thompson(ARMS), [long_tailed(rng) for _ in range(1000)])
    decision, _ = events[-1]
    estimate = decision.estimate()
    assert decision.smearing > 1.2
    assert estimate.cost_usd == pytest.approx(estimate.output_tokens)
    further = (estimate.output_tokens - 1) * estimate.tpot_s
    assert estimate.latency_s == pytest.approx(estimate.ttft_s + further)


def test_the_first_answers_do_not_count() -> None:
    """They were expected before anything was known of the arm's lengths, so they say nothing of its tail."""
    policy = Thompson(ARMS)
    events = answered(policy, [900] * 60)
    assert [decision.smearing for decision, _ in events[:20]] == [0.0] * 20
    assert all(decision.smearing > 0 for decision, _ in events[20:])
    assert length_factor(policy) == pytest.approx(1.0, abs=0.1)


def test_an_expectation_that_a_limit_bounds_teaches_nothing() -> None:
    """What the model would have expected without the limit is not recorded."""
    policy = Thompson(ARMS)
    answered(policy, [900] * 200, limit=30)
    assert length_factor(policy) == pytest.approx(1.0)


def test_the_factor_does_not_depend_on_the_order_of_the_outcomes() -> None:
    """Everything follows from the records of the decisions."""
    rng = np.random.default_rng(2)
    events = answered(Thompson(ARMS), [long_tailed(rng) for _ in range(400)])
    states = []
    for order in (events, events[::-1]):
        policy = Thompson(ARMS)
        policy.advance(400)
        for decision, outcome in order:
            policy.learn(decision, outcome)
        states.append(policy.state())
    for name, array in states[0].items():
        if name.startswith("smearing."):
            assert np.allclose(array, states[1][name], rtol=1e-9)
    assert states[0]["smearing.sums"][0, 0] > 100


def test_a_restored_policy_expects_the_same_and_an_older_state_begins_anew() -> None:
    """The state of an earlier release has no sums of lengths."""
    rng = np.random.default_rng(3)
    policy = Thompson(ARMS)
    answered(policy, [long_tailed(rng) for _ in range(400)])
    twin, older = Thompson(ARMS), Thompson(ARMS)
    twin.restore(policy.state())
    older.restore(
        {n: a for n, a in policy.state().items() if not n.startswith("smearing.")}
    )
    assert length_factor(twin) == length_factor(policy) > 1.2
    assert length_factor(older) == 1.0
    broken = policy.state() | {"smearing.sums": np.zeros((1, 2))}
    with pytest.raises(ValueError, match="policy state, smearing: 'sums'"):
        Thompson(ARMS).restore(broken)


def test_the_factor_is_bounded_and_a_new_revision_keeps_little_of_it() -> None:
    """A few absurd lengths must not price an arm out for ever."""
    smearing = Smearing(np.ones(2), 0.9995)
    for n in range(1000):
        smearing.add(0, 1e6, 1.0, n)
        smearing.add(1, 1.0, 1e6, n)
        smearing.advance(n)
    smearing.refresh()
    assert smearing.factors.tolist() == [MOST, LEAST]
    assert [smearing.factor(arm) for arm in range(2)] == [MOST, LEAST]
    smearing.discount(0, 0.5)
    smearing.discount(1, 0.5)
    smearing.add(0, 100.0, 100.0, 1000)
    assert smearing.state()["sums"][:, 0].max() < 2.0


def test_the_expected_pace_is_right_although_some_streams_arrive_at_once() -> None:
    """Half of the short streams arrive in one piece, so the logarithms scatter; long answers keep their pace."""
    rng = np.random.default_rng(4)
    policy = Thompson(ARMS)
    expected, unsmeared, true = [], [], []
    for n in range(1500):
        (decision,) = policy.decide(
            [Request(f"d{n}", PROFILE, Objective())], {}, rng, n
        )
        tokens = 80 if rng.random() < 0.3 else 5
        at_once = tokens == 5 and rng.random() < 0.5
        after_s = (tokens - 1) * (0.0001 if at_once else 0.015)
        outcome = Outcome(
            decision.id, "ok", 0.1, 0.1 + after_s, 20, tokens, streamed=True
        )
        policy.learn(decision, outcome)
        if n >= 500:
            expected.append((tokens - 1) * decision.estimate().tpot_s)
            unsmeared.append(expected[-1] / decision.pace_smearing)
            true.append(after_s)
    assert np.mean(expected) == pytest.approx(np.mean(true), rel=0.15)
    assert np.mean(unsmeared) > 1.5 * np.mean(true)
