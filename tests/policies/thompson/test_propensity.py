"""The propensities that are logged with each decision."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from deployments.settings import PolicySettings
from policies.events import Outcome
from policies.registry import make_policy
from policies.thompson.propensity import normal_cdf, probability_best
from policies.types import Arm, Objective, Request, Vector
from tests.support.requests import make_request


def test_normal_cdf_is_the_error_function() -> None:
    """The table's value is within half a step of the exact Φ."""
    x = np.linspace(-6, 6, 401)
    exact = [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert np.abs(normal_cdf(x) - exact).max() < 2e-4


def test_two_arms_have_a_closed_form() -> None:
    """P(first) = Φ((μ1 - μ2) / √(σ1² + σ2²))."""
    mean = np.array([[0.6, 0.5]])
    deviation = np.array([[0.2, 0.1]])
    expected = normal_cdf(np.array([0.1 / math.hypot(0.2, 0.1)]))[0]
    assert (
        abs(probability_best(mean, deviation, np.ones((1, 2), bool))[0, 0] - expected)
        < 1e-4
    )


Z = np.linspace(-10, 10, 200_001)
DENSITY = np.exp(-0.5 * Z**2) / math.sqrt(2 * math.pi)
CDF = np.concatenate([[0.0], np.cumsum((DENSITY[1:] + DENSITY[:-1]) / 2)]) * 1e-4


def exact(mean: Vector, deviation: Vector) -> Vector:
    """[K] the probabilities by Gauss-Legendre integration over 300 panels for each arm."""
    points, shares = np.polynomial.legendre.leggauss(4)
    edges = np.unique(mean + np.outer(np.linspace(-9, 9, 301), deviation))
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (1 + points)).ravel()
    weights = (half * shares).ravel()
    z = (x - mean[:, None]) / deviation[:, None]  # [K, nodes]
    below = np.interp(z, Z, CDF, left=0.0, right=1.0)
    densities = np.interp(z, Z, DENSITY, left=0.0, right=0.0) / deviation[:, None]
    return np.array(
        [
            (densities[k] * np.delete(below, k, axis=0).prod(axis=0) * weights).sum()
            for k in range(len(mean))
        ]
    )


@pytest.mark.parametrize("ratio", [1, 3, 10, 30, 100])
@pytest.mark.parametrize("arms", [2, 3, 5, 9, 14])
def test_propensities_of_rare_arms_are_exact(ratio: float, arms: int) -> None:
    """Within 1 % for all probabilities from 0.001 on, however much the deviations of the arms differ."""
    rng = np.random.default_rng((round(ratio), arms))
    worst = 0.0
    smallest = 1.0
    for spread in np.repeat([0.3, 1.0, 2.0, 3.0], 10):
        deviation = 0.02 * ratio ** rng.random(arms)
        deviation[:2] = (0.02, 0.02 * ratio)
        mean = spread * deviation * rng.standard_normal(arms)
        expected = exact(mean, deviation)
        assert expected.sum() == pytest.approx(1.0, abs=1e-6)
        found = probability_best(mean[None], deviation[None], np.ones((1, arms), bool))
        likely = expected >= 0.001
        worst = max(worst, float(np.abs(found[0] / expected - 1)[likely].max()))
        smallest = min(smallest, float(expected[likely].min()))
    assert worst < 0.01 and smallest < 0.2


@pytest.mark.parametrize("ratio", [10.0, 20.0, 40.0, 100.0])
def test_a_wide_arm_that_is_rarely_best_has_its_closed_form(ratio: float) -> None:
    """Two arms: P(wide) = Φ((μ1 - μ2) / √(σ1² + σ2²)), also where its plain nodes would miss the narrow arm's step."""
    deviation = np.array([ratio, 1.0])
    for z in np.linspace(-3.0, 0.0, 31):
        mean = np.array([z * math.hypot(*deviation), 0.0])
        found = probability_best(mean[None], deviation[None], np.ones((1, 2), bool))
        assert found[0, 0] == pytest.approx(
            0.5 * math.erfc(-z / math.sqrt(2)), rel=0.01
        )


def test_propensities_match_how_often_each_arm_is_drawn(
    rng: np.random.Generator,
) -> None:
    """χ² over 10⁵ draws of five arms with very different spreads; one of them is not eligible."""
    mean = np.array([[0.7, 0.72, 0.5, 0.9, 0.65]])
    deviation = np.array([[0.02, 0.3, 0.15, 0.1, 0.08]])
    eligible = np.array([[True, True, True, False, True]])
    propensity = probability_best(mean, deviation, eligible)[0]
    draws = np.where(
        eligible, mean + deviation * rng.standard_normal((100_000, 5)), -np.inf
    )
    counts = np.bincount(draws.argmax(axis=1), minlength=5)
    expected = 100_000 * propensity
    some = expected > 0
    assert propensity[3] == 0 and counts[3] == 0
    assert abs(propensity.sum() - 1) < 1e-9
    assert (
        np.sum((counts[some] - expected[some]) ** 2 / expected[some]) < 16.3
    )  # 99.9 % at 3 degrees of freedom


def test_propensities_are_zero_if_no_arm_is_eligible() -> None:
    """A row without any eligible arm has no propensities, and no warning."""
    assert not probability_best(
        np.zeros((1, 3)), np.ones((1, 3)), np.zeros((1, 3), bool)
    ).any()


DECISIONS = 100_000
BATCH = 64
TEXTS = (
    "What is 347 plus 586?",
    "Prove step by step that the root of two is irrational, and write a function for it.",
)


@dataclass
class Situation:
    """One request that is decided many times: how often each arm was chosen, and with what propensities.

    logged: [K] by the policy. narrower: [K] by one with 0.8 of its exploration, that has learned the same.
    """

    counts: NDArray[np.int64]
    logged: Vector
    narrower: Vector


def taught(arms: tuple[Arm, ...], scores: int) -> tuple[object, object]:
    """The default policy after so many answers, of which the larger arms' are better and slower; and a narrower one."""
    name = PolicySettings().name
    rng = np.random.default_rng((len(arms), scores))
    policy = make_policy(name, arms)
    for i in range(scores):
        (decision,) = policy.decide([make_request(TEXTS[i % 2])], {}, rng, i)
        k = [arm.name for arm in arms].index(decision.arm)
        policy.learn(
            decision, Outcome(decision.id, "ok", 0.1 * (k + 1), 0.2 * (k + 1), 20, 10)
        )
        policy.score(decision, float(rng.random() < 0.5 + 0.08 * k))
    narrower = make_policy(
        name, arms, {"exploration": 0.8 * policy.settings.exploration}
    )  # type: ignore[attr-defined]
    narrower.restore(policy.state())
    return policy, narrower


def asked(arms: tuple[Arm, ...], policy: object, sequence: int) -> list[Request]:
    """Wishes and limits: none, weights, an arm not allowed, one too dear, one too slow."""
    rng = np.random.default_rng(0)
    names = tuple(arm.name for arm in arms)
    free = [make_request(text) for text in TEXTS]
    (known,) = policy.decide(free[:1], {}, rng, sequence)  # type: ignore[attr-defined]
    costs, latencies = (
        sorted(getattr(e, of) for e in known.estimates)
        for of in ("cost_usd", "latency_s")
    )
    limits = (
        Objective(latency_weight=0.1, cost_weight=100.0),
        Objective(models=names[1:]),
        Objective(max_cost_usd=(costs[-2] + costs[-1]) / 2),
        Objective(max_latency_s=(latencies[-2] + latencies[-1]) / 2),
    )
    return [*free, *(replace(free[0], objective=objective) for objective in limits)]


@pytest.fixture(scope="module")
def situations() -> list[Situation]:
    """Every kind of state, number of arms and limit, together DECISIONS times decided."""
    cases = []
    for k in (2, 3, 4):
        arms = tuple(
            Arm(f"arm{i}", prompt_price_usd=1e-6 * 2**i, output_price_usd=1e-6 * 2**i)
            for i in range(k)
        )
        for scores in (0, 40, 300):
            policy, narrower = taught(arms, scores)
            cases += [
                (policy, narrower, scores, request)
                for request in asked(arms, policy, scores)
            ]
    times = math.ceil(DECISIONS / len(cases) / BATCH)
    rng = np.random.default_rng(11)
    found = []
    for policy, narrower, scores, request in cases:
        batch = [request] * BATCH
        names = [arm.name for arm in policy.arms]
        decisions = [
            d for _ in range(times) for d in policy.decide(batch, {}, rng, scores)
        ]
        logged = np.array([[e.propensity for e in d.estimates] for d in decisions])
        assert (
            np.ptp(logged, axis=0).max() < 1e-9
        )  # the same situation, and nothing was learned
        counts = np.bincount(
            [names.index(d.arm) for d in decisions], minlength=len(names)
        )
        (other,) = narrower.decide([request], {}, rng, scores)
        found.append(
            Situation(
                counts, logged[0], np.array([e.propensity for e in other.estimates])
            )
        )
    assert sum(int(s.counts.sum()) for s in found) >= DECISIONS
    return found


def chi_square(counts: NDArray[np.int64], propensities: Vector) -> tuple[float, int]:
    """Σ (observed - expected)² / expected and its degrees of freedom; cells that expect under 5 are taken together."""
    some = propensities > 0
    order = np.argsort(propensities[some])
    observed = counts[some][order].astype(float)
    expected = counts.sum() * propensities[some][order]
    while len(expected) > 1 and expected[0] < 5:
        observed = np.append(observed[:2].sum(), observed[2:])
        expected = np.append(expected[:2].sum(), expected[2:])
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def p_value(cases: list[tuple[NDArray[np.int64], Vector]]) -> float:
    """Of the choices of all situations under these propensities (Wilson and Hilferty, PNAS 1931)."""
    statistics, freedoms = zip(
        *(chi_square(counts, propensities) for counts, propensities in cases),
        strict=True,
    )
    n = sum(freedoms)
    z = ((sum(statistics) / n) ** (1 / 3) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_logged_propensities_fit_the_choices(situations: list[Situation]) -> None:
    """χ² over 10⁵ decisions of the default policy, fresh and taught, with two to four arms and every limit."""
    assert p_value([(s.counts, s.logged) for s in situations]) > 0.001


def test_a_removed_arm_has_no_propensity_and_is_never_chosen(
    situations: list[Situation],
) -> None:
    """In each situation they sum to one, and some arm is out in many of them."""
    assert all(
        abs(s.logged.sum() - 1) < 1e-6 and not s.counts[s.logged == 0].any()
        for s in situations
    )
    assert sum((s.logged == 0).any() for s in situations) >= len(situations) / 3


def test_wrong_propensities_do_not_fit(situations: list[Situation]) -> None:
    """The test has power: it rejects the propensities of a policy that explores 0.8 as much, and those of chance."""
    assert p_value([(s.counts, s.narrower) for s in situations]) < 1e-6
    chance = [(s.counts, (s.logged > 0) / (s.logged > 0).sum()) for s in situations]
    assert p_value(chance) < 1e-6
