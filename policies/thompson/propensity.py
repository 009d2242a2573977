"""Propensities of Thompson sampling: the exact probability that each arm's draw is the largest.

P(k) = ∫ φ(z) Π_{j≠k} Φ((μ_k + σ_k z - μ_j) / σ_j) dz, by the trapezoid rule, with Φ read from a table.

Where another arm is much narrower, the product has a step that plain nodes miss. Let x0 be the largest lower edge of
the other arms, μ_j - c σ_j. Below it the product is 0. At a distance d above it, an arm whose Φ still rises has
σ_j > d / (c + c'), because its own lower edge is not above x0. So panels whose widths double, from x0 on, fit the
steps of all arms. Each has the nodes of Gauss and Legendre.

The relative error is below 2 % for probabilities above 0.001, with 2 to 14 arms and ratios of deviations up to 100.
"""

from math import erf, sqrt

import numpy as np
from numpy.typing import NDArray

from policies.thompson import best_arm
from policies.types import Vector

NODES = 32
_EDGE = 4.25  # standard deviations; the probability beyond is 2e-5
_STEPS = 1024  # entries of the table per standard deviation
_REACH = 6  # standard deviations that the table covers on each side
_MIDDLE = _STEPS * _REACH
_TABLE = np.array(
    [0.5 + 0.5 * erf(i / _STEPS / sqrt(2)) for i in range(-_MIDDLE, _MIDDLE + 1)],
    np.float32,
)


def normal_cdf(x: Vector) -> Vector:
    """Φ(x) from the table; the absolute error is below 2e-4, and much smaller on average over many x."""
    return np.asarray(
        _TABLE.take((x * _STEPS + (_MIDDLE + 0.5)).astype(np.intp), mode="clip"),
        np.float64,
    )


_Z = np.linspace(-_EDGE, _EDGE, NODES)
_WEIGHTS = np.exp(-0.5 * _Z**2) / np.exp(-0.5 * _Z**2).sum()
# The kernel's product includes the factor Φ(z) of the arm itself, so the weights are divided by it.
_POINTS, _SHARES = np.polynomial.legendre.leggauss(8)
QUADRATURE = (
    _Z.astype(np.float32),
    (_WEIGHTS / normal_cdf(_Z)).astype(np.float32),
    _TABLE,
    _STEPS,
    0.5 + 0.5 * _POINTS,
    0.5 * _SHARES,
)


def probability_best(
    mean: Vector, deviation: Vector, eligible: NDArray[np.bool_]
) -> Vector:
    """[B, K] probability that arm k has the largest of independent draws N(mean, deviation²).

    Args:
        mean: [B, K] of the draws.
        deviation: [B, K] of the draws, positive.
        eligible: [B, K]; the others get 0. A row without any is all 0.
    """
    given = (
        np.array(mean, np.float64, order="C"),
        np.array(deviation, np.float64, order="C"),
    )
    return best_arm.probability_best(
        *given, np.array(eligible, np.bool_, order="C"), QUADRATURE
    )
