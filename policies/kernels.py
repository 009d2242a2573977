"""The inner loops of a decision and of learning from it, compiled: numpy would spend a call on each small array.

Each function works on whole batches, and its text says which formula it is; how these make up the policy stands in
posterior.py, latency.py, propensity.py and thompson.py. B requests, K arms, D features; all arrays are C-contiguous.

They are compiled by numba when this module is imported, for the types that are written here, so that no request waits
for that; and kept in numba's cache on disk, or only in memory where no folder can be written to.
"""

from collections.abc import Callable
from math import exp, inf, log1p, sqrt
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from policies.types import Vector

DOUBT = 0.25  # most variance of a logarithm: beyond it a normal draw would promise negative latencies
LATENCY, VARIANCE, COST = 0, 1, 2  # rows of what `expect` returns

F = TypeVar("F", bound=Callable[..., Any])


def compiled(signature: str) -> Callable[[F], F]:
    """Compile a function for these types of arguments, here and now; numba knows no types that mypy could read."""

    def compile_(function: F) -> F:
        try:
            made: F = njit(signature, cache=True)(function)
        except (RuntimeError, OSError):  # no folder for the cache that can be written to, or the disk is full
            made = njit(signature)(function)
        return made

    return compile_


@compiled("UniTuple(f8, 2)(f8[::1], f8[::1], f8[:, ::1], f8[::1])")
def _one(x: Vector, mean: Vector, covariance: Vector, spread: Vector) -> tuple[float, float]:
    """Mean and variance of x·w for w ~ N(mean, covariance); `spread` [D] is room to work, and then covariance·x."""
    spread[:] = 0.0
    for i in range(len(x)):
        for j in range(len(x)):
            spread[j] += x[i] * covariance[i, j]
    middle = variance = 0.0
    for i in range(len(x)):
        middle += x[i] * mean[i]
        variance += x[i] * spread[i]
    return middle, variance


@compiled("UniTuple(f8[:, ::1], 2)(f8[:, ::1], f8[:, ::1], f8[:, :, ::1])")
def predict(x: Vector, mean: Vector, covariance: Vector) -> tuple[Vector, Vector]:
    """Mean and variance [B, K] of x·w_k for w_k ~ N(mean_k, covariance_k) and x [B, D]."""
    requests, arms, spread = len(x), len(mean), np.empty(x.shape[1])
    middle, variance = np.empty((requests, arms)), np.empty((requests, arms))
    for b in range(requests):
        for k in range(arms):
            middle[b, k], variance[b, k] = _one(x[b], mean[k], covariance[k], spread)
    return middle, variance


@compiled(
    "void(i8, f8[::1], f8, f8, f8, f8[:, :, ::1], f8[:, ::1], f8[::1], f8[::1], f8[::1], f8[:, :, ::1],"
    "f8[:, ::1], f8[:, :, ::1], f8[::1])"
)
def fold(
    arm: int,
    x: Vector,
    y: float,
    sequence: float,
    weight: float,
    precision: Vector,
    moment: Vector,
    squares: Vector,
    count: Vector,
    heard: Vector,
    cuts: Vector,
    mean: Vector,
    covariance: Vector,
    noise: Vector,
) -> None:
    """One event into the sums Σ c x xᵀ, Σ c y x, Σ c y², Σ c of posterior.py, and into mean and covariance P^-1:

        P^-1 ← P^-1 - P^-1 x xᵀ P^-1 / (σ²/c + xᵀ P^-1 x)

    (Sherman and Morrison; Golub and Van Loan, Matrix Computations, 2013, section 2.1.4), all in place.
    """
    heard += weight
    for n in range(cuts.shape[1]):
        if cuts[arm, n, 0] > sequence:
            weight *= cuts[arm, n, 1]
    spread = np.empty(len(x))
    expected, variance = _one(x, mean[arm], covariance[arm], spread)
    scale = weight / (noise[arm] + weight * variance)
    for i in range(len(x)):
        seen, told = weight * x[i], scale * spread[i]
        moment[arm, i] += seen * y
        mean[arm, i] += told * (y - expected)
        for j in range(len(x)):
            precision[arm, i, j] += seen * x[j]
            covariance[arm, i, j] -= told * spread[j]
    squares[arm] += weight * y * y
    count[arm] += weight


@compiled("f8[::1](f8, f8, f8)")
def pace_features(prompt_tokens: float, load: float, total_load: float) -> Vector:
    """[4] what the time to a token depends on: bias, prompt length, the arm's load, and all arms' load.

    The last matters where arms share a machine; where they don't, its weight is learned to be nothing.

    Args:
        prompt_tokens: of the request.
        load: requests in flight per replica of the arm.
        total_load: requests in flight over all arms.
    """
    return np.array([1.0, log1p(prompt_tokens) / 5, log1p(load), log1p(total_load)])


@compiled(
    "f8[:, :, ::1](f8[:, ::1], f8[:, ::1], f8[:, ::1], f8, f8[:, ::1], f8[:, ::1], f8[::1],"
    "f8[:, ::1], f8[:, :, ::1], f8[::1], f8[:, ::1], f8[:, :, ::1], f8[::1])"
)
def expect(
    x: Vector,
    asked: Vector,
    load: Vector,
    total: float,
    terms: Vector,
    tokens_mean: Vector,
    tokens_noise: Vector,
    ttft_mean: Vector,
    ttft_covariance: Vector,
    ttft_noise: Vector,
    tpot_mean: Vector,
    tpot_covariance: Vector,
    tpot_noise: Vector,
) -> Vector:
    """What to expect of B requests on K arms, see latency.py.

    Args:
        x: [B, D] their features.
        asked: [B, 4] prompt tokens, usual output tokens, most output tokens, and the arm that it names or -1.
        load: [2, K] requests in flight and replicas of each arm.
        total: requests in flight over all arms.
        terms: [3, K] context tokens, price of a prompt token, of an output token.
        tokens_mean, tokens_noise: [K, D], [K] of log output tokens beyond the usual.
        ttft_mean, ttft_covariance, ttft_noise: [K, 4], [K, 4, 4], [K] of log TTFT.
        tpot_mean, tpot_covariance, tpot_noise: of log TPOT.

    Returns:
        [B, 8, K] latency_s, its variance, cost_usd, ttft_s, tpot_s, output_tokens, and the load per replica and over
        all arms that the request will meet: those of the same batch that name their arm are as good as in flight.
    """
    requests, arms, spread = len(x), load.shape[1], np.empty(4)
    found, named, naming = np.empty((requests, 8, arms)), np.zeros(arms), 0.0
    for b in range(requests):
        if asked[b, 3] >= 0:
            named[int(asked[b, 3])] += 1.0
            naming += 1.0
    for b in range(requests):
        prompt, usual, limit, mine = asked[b, 0], asked[b, 1], asked[b, 2], asked[b, 3]
        others = total + naming - (mine >= 0)
        for k in range(arms):
            here = (load[0, k] + named[k] - (mine == k)) / load[1, k]
            beyond = 0.5 * tokens_noise[k]
            for i in range(x.shape[1]):
                beyond += x[b, i] * tokens_mean[k, i]
            tokens = max(min((1.0 + usual) * exp(beyond) - 1.0, terms[0, k] - prompt, limit), 1.0)
            at = pace_features(prompt, here, others)
            log_ttft, ttft_doubt = _one(at, ttft_mean[k], ttft_covariance[k], spread)
            log_tpot, tpot_doubt = _one(at, tpot_mean[k], tpot_covariance[k], spread)
            ttft = exp(min(log_ttft + 0.5 * ttft_noise[k], 8.0))
            tpot = exp(min(log_tpot + 0.5 * tpot_noise[k], 8.0))
            decoding = (tokens - 1.0) * tpot
            found[b, 0, k] = ttft + decoding
            found[b, 1, k] = ttft * ttft * min(ttft_doubt, DOUBT) + decoding * decoding * min(tpot_doubt, DOUBT)
            found[b, 2, k] = prompt * terms[1, k] + tokens * terms[2, k]
            found[b, 3, k], found[b, 4, k], found[b, 5, k] = ttft, tpot, tokens
            found[b, 6, k], found[b, 7, k] = here, others
    return found


@compiled("Tuple((f8[:, :, ::1], f8[:, ::1]))(f8[:, ::1], f8[:, ::1], f8[:, :, ::1], f8[:, ::1], f8[::1], f8[:, ::1], b1[:, ::1])")
def draw(
    quality: Vector,
    variance: Vector,
    expected: Vector,
    weights: Vector,
    exploration: Vector,
    normal: Vector,
    eligible: NDArray[np.bool_],
) -> tuple[Vector, Vector]:
    """Each arm's utility μ = quality - λ_latency latency - λ_cost cost, and a draw of it, see thompson.py.

    Args:
        quality, variance: [B, K] of the score.
        expected: what `expect` says.
        weights: [B, 2] λ_latency and λ_cost.
        exploration: [K] α.
        normal: [B, K] standard normal draws.
        eligible: [B, K]; the draws of the others are -inf.

    Returns:
        [B, 11, K] the numbers of ArmEstimate in their order there, of which the propensity is left 0; and [B, K] the
        deviation α σ of the draws, σ² being variance + λ_latency² · that of latency.
    """
    requests, arms = quality.shape
    table, spread = np.zeros((requests, 11, arms)), np.empty((requests, arms))
    for b in range(requests):
        by_latency, by_cost = weights[b, 0], weights[b, 1]
        for k in range(arms):
            latency, cost = expected[b, LATENCY, k], expected[b, COST, k]
            mean = quality[b, k] - by_latency * latency - by_cost * cost
            doubt = variance[b, k] + by_latency * by_latency * expected[b, VARIANCE, k]
            spread[b, k] = exploration[k] * sqrt(doubt)
            table[b, 0, k], table[b, 1, k], table[b, 2, k], table[b, 3, k] = quality[b, k], latency, cost, mean
            table[b, 4, k] = mean + spread[b, k] * normal[b, k] if eligible[b, k] else -inf
            for n in range(3):
                table[b, 5 + n, k] = expected[b, 3 + n, k]
            for n in range(2):
                table[b, 9 + n, k] = expected[b, 6 + n, k]
    return table, spread


@compiled("f8[:, ::1](f8[:, :], f8[:, :], b1[:, :], f4[::1], f4[::1], f4[::1], i8)")
def probability_best(
    mean: Vector,
    deviation: Vector,
    eligible: NDArray[np.bool_],
    nodes: NDArray[np.float32],
    weights: NDArray[np.float32],
    cdf: NDArray[np.float32],
    steps: int,
) -> Vector:
    """[B, K] P(k) = ∫ φ(z) Π_{j≠k} Φ((μ_k + σ_k z - μ_j) / σ_j) dz, see propensity.py.

    Args:
        mean, deviation, eligible: [B, K] μ, σ and whether the arm can be chosen.
        nodes, weights: of the quadrature; the weights already divided by Φ(z), as the product has j = k, too.
        cdf: Φ in so many `steps` per unit, 0 in the middle.
    """
    requests, arms = mean.shape
    probability = np.zeros((requests, arms))
    ahead, wide, fine = np.empty(arms, np.float32), np.empty(arms, np.float32), np.empty(arms, np.float32)
    product = np.empty(len(nodes), np.float32)
    last = np.float32(len(cdf) - 1)
    middle = np.float32(len(cdf) // 2 + 0.5)
    for b in range(requests):
        top, total = -inf, 0.0
        for k in range(arms):
            if eligible[b, k]:
                top = max(top, mean[b, k])
        for k in range(arms):  # single precision, so from the best on
            ahead[k], wide[k] = mean[b, k] - top, deviation[b, k]
            fine[k] = steps / deviation[b, k]
        for k in range(arms):
            if not eligible[b, k]:
                continue
            product[:] = 1.0
            for j in range(arms):
                if eligible[b, j]:
                    for n in range(len(nodes)):
                        at = (ahead[k] + wide[k] * nodes[n] - ahead[j]) * fine[j] + middle
                        product[n] *= cdf[int(min(max(at, np.float32(0.0)), last))]
            for n in range(len(nodes)):
                probability[b, k] += product[n] * weights[n]
            total += probability[b, k]
        for k in range(arms):
            if total > 0:
                probability[b, k] /= total
    return probability
