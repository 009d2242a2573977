"""The propensities that are logged with each decision."""

import math

import numpy as np

from policies.propensity import normal_cdf, probability_best


def test_normal_cdf_is_the_error_function() -> None:
    """Within 3e-5 of the exact Φ."""
    x = np.linspace(-6, 6, 401)
    exact = [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert np.abs(normal_cdf(x) - exact).max() < 3e-5


def test_two_arms_have_a_closed_form() -> None:
    """P(first) = Φ((μ1 - μ2) / √(σ1² + σ2²))."""
    mean, deviation = np.array([[0.6, 0.5]]), np.array([[0.2, 0.1]])
    expected = normal_cdf(np.array([0.1 / math.hypot(0.2, 0.1)]))[0]
    assert abs(probability_best(mean, deviation, np.ones((1, 2), bool))[0, 0] - expected) < 1e-4


def test_propensities_match_how_often_each_arm_is_drawn(rng: np.random.Generator) -> None:
    """χ² over 10⁵ draws of five arms with very different spreads; one of them is not eligible."""
    mean, deviation = np.array([[0.7, 0.72, 0.5, 0.9, 0.65]]), np.array([[0.02, 0.3, 0.15, 0.1, 0.08]])
    eligible = np.array([[True, True, True, False, True]])
    propensity = probability_best(mean, deviation, eligible)[0]
    draws = np.where(eligible, mean + deviation * rng.standard_normal((100_000, 5)), -np.inf)
    counts = np.bincount(draws.argmax(axis=1), minlength=5)
    expected = 100_000 * propensity
    some = expected > 0
    assert propensity[3] == 0 and counts[3] == 0
    assert abs(propensity.sum() - 1) < 1e-9
    assert np.sum((counts[some] - expected[some]) ** 2 / expected[some]) < 16.3  # 99.9 % at 3 degrees of freedom


def test_nobody_eligible_gives_all_zeros() -> None:
    """A row without any eligible arm has no propensities, and no warning."""
    assert not probability_best(np.zeros((1, 3)), np.ones((1, 3)), np.zeros((1, 3), bool)).any()
