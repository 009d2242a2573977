"""How probable it is that each arm's draw is the best: the propensities of Thompson sampling, without sampling.

P(k) = ∫ φ(z) Π_{j≠k} Φ((μ_k + σ_k z - μ_j) / σ_j) dz, by the midpoint rule on quantiles of the normal.
"""

import numpy as np
from numpy.typing import NDArray

from policies.types import Vector

NODES = 96
_EDGE = 4.5  # standard deviations; what lies beyond has a probability of 7e-6
_Z = np.linspace(-_EDGE, _EDGE, NODES)
_WEIGHTS = np.exp(-0.5 * _Z**2)
_WEIGHTS /= _WEIGHTS.sum()


def normal_cdf(x: Vector) -> Vector:
    """Φ(x), absolute error below 1e-7 (Abramowitz and Stegun, 1964, eq. 7.1.26)."""
    y = np.abs(x) / np.sqrt(2.0)
    t = 1.0 / (1.0 + 0.3275911 * y)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = 1.0 - poly * np.exp(-y * y)
    return np.asarray(0.5 * (1.0 + np.where(x < 0, -erf, erf)))


def probability_best(mean: Vector, deviation: Vector, eligible: NDArray[np.bool_]) -> Vector:
    """[B, K] probability that arm k has the largest of independent draws N(mean, deviation²).

    Args:
        mean: [B, K] of the draws.
        deviation: [B, K] of the draws, positive.
        eligible: [B, K]; the others get 0. A row without any is all 0.
    """
    draws = mean[:, :, None] + deviation[:, :, None] * _Z  # [B, k, NODES]
    # [B, k, j, NODES]: how probably arm j's draw stays below a given draw of arm k
    below = normal_cdf((draws[:, :, None, :] - mean[:, None, :, None]) / deviation[:, None, :, None])
    beaten = np.where(eligible[:, None, :, None], below, 1.0)
    arms = np.arange(mean.shape[1])
    beaten[:, arms, arms] = 1.0
    probability = np.where(eligible, beaten.prod(axis=2) @ _WEIGHTS, 0.0)
    total = probability.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(probability, total, out=np.zeros_like(probability), where=total > 0))
