"""Confidence sequences: bounds that hold at all times at once, so one may look at any time and stop at any time.

For y_s = (ξ_s - ξ̂_s) / b ≥ -1, ξ̂_s a guess made before ξ_s was seen, and ν_s = E[ξ_s | past], each

    M_t(λ) = exp(λ Σ (ξ_s - ν_s) / b - ψ(λ) Σ y_s²),   ψ(λ) = -log(1 - λ) - λ,   0 ≤ λ < 1

is a supermartingale that starts at 1 (Fan, Grama and Liu, EJP 2015; Howard, Ramdas, McAuliffe and Sekhon, Annals of
Statistics 2021), and so is their mixture over λ. By Ville's inequality P(it ever reaches 1/α) ≤ α. Solved for Σ ν_s,
this is an empirical-Bernstein lower confidence sequence for the running mean of the ν_s, which may change over time
(Waudby-Smith and Ramdas, JRSS-B 2024; Waudby-Smith, Wu, Ramdas, Karampatziakis and Mineiro, ACM/IMS JDS 2024). The
only assumption about ξ is its lower bound; importance weights need no upper bound.
"""

import numpy as np

from policies.types import Vector

# λ from the best one after a few events to the best one after about a million.
LAMBDAS = 0.9 * 0.6 ** np.arange(12)
KNOTS = 256  # points at which the boundary is solved exactly
PSI = -np.log1p(-LAMBDAS) - LAMBDAS


def _log_mean_exp(x: Vector) -> Vector:
    """Log of the mean of exp over the first axis."""
    top = x.max(axis=0)
    return np.asarray(top + np.log(np.exp(x - top).mean(axis=0)))


def _exponents(total: Vector, variation: Vector) -> Vector:
    """[12, ...] log M(λ); the λ are the first axis, because numpy sums over it faster."""
    return np.asarray(
        np.multiply.outer(LAMBDAS, total) - np.multiply.outer(PSI, variation)
    )


def log_evidence(total: Vector, variation: Vector) -> Vector:
    """Log of the mixture over λ of M_t(λ): against the hypothesis that Σ ν_s is at most Σ ξ_s - b · total.

    Args:
        total: [...] Σ (ξ_s - ν_s) / b under the hypothesis.
        variation: [...] Σ y_s².
    """
    return _log_mean_exp(_exponents(total, variation))


def boundary(variation: Vector, alpha: float) -> Vector:
    """[...] the total that is exceeded with probability at most alpha at any time, under `log_evidence`.

    The boundary is a concave function of the variation, because the evidence is convex in both. So its tangents lie
    above it. Many values get the lower one of the two tangents at the nearest of KNOTS points, at most 1e-3 too high.
    """
    variation = np.asarray(variation, dtype=np.float64)
    if variation.size <= KNOTS:
        return _solve(variation, alpha)[0]
    knots = np.linspace(0.0, float(variation.max()) ** 0.25, KNOTS) ** 4
    height, slope = _solve(knots, alpha)
    right = np.clip(np.searchsorted(knots, variation), 1, KNOTS - 1)
    left = right - 1
    return np.asarray(
        np.minimum(
            height[left] + slope[left] * (variation - knots[left]),
            height[right] + slope[right] * (variation - knots[right]),
        )
    )


def _solve(variation: Vector, alpha: float) -> tuple[Vector, Vector]:
    """[...] the boundary and its slope.

    Newton's method on a convex, increasing function, started above the root. It descends to the root and never passes
    it, so stopping early is safe.
    """
    target = np.log(1 / alpha)
    # At this start a single λ reaches the target, and the mixture is at least that λ's share of it.
    alone = (target + np.log(len(LAMBDAS))) / LAMBDAS
    u = np.min(
        [
            first + rate * variation
            for first, rate in zip(alone, PSI / LAMBDAS, strict=True)
        ],
        axis=0,
    )
    for _ in range(8):
        x = _exponents(u, variation)
        top = x.max(axis=0)
        share = np.exp(x - top)
        mean = share.mean(axis=0)
        excess = np.maximum(top + np.log(mean) - target, 0.0)
        if excess.max(initial=0.0) < 1e-9:
            break
        u = u - excess * mean / np.tensordot(LAMBDAS / len(LAMBDAS), share, axes=1)
    x = _exponents(u, variation)
    share = np.exp(x - x.max(axis=0))
    slope = np.tensordot(PSI, share, axes=1) / np.tensordot(LAMBDAS, share, axes=1)
    return np.asarray(u), np.asarray(slope)


def guesses(x: Vector, first: float, low: float, high: float) -> Vector:
    """[N] the mean of the values before each x, starting at `first`, clipped to [low, high]."""
    before = np.concatenate([[0.0], np.cumsum(x)[:-1]])
    return np.clip((first + before) / np.arange(1, len(x) + 1), low, high)


def lower_sequence(
    x: Vector, lowest: float, highest_mean: float, alpha: float
) -> Vector:
    """[N] lower bounds for the running mean of E[x_s | past], all valid at once with probability 1 - alpha.

    Args:
        x: [N] values in their order, each at least `lowest`.
        lowest: lower bound of x.
        highest_mean: upper bound of the conditional means.
        alpha: probability that any of the bounds is wrong.

    Raises:
        ValueError: some x is below `lowest`.
    """
    if len(x) and x.min() < lowest - 1e-9:
        raise ValueError(
            f"a value of {x.min():g} is below the lowest possible value, {lowest:g}"
        )
    b = highest_mean - lowest
    y = (x - guesses(x, (lowest + highest_mean) / 2, lowest, highest_mean)) / b
    t = np.arange(1, len(x) + 1)
    return np.asarray((np.cumsum(x) - b * boundary(np.cumsum(y * y), alpha)) / t)
