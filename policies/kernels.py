"""The inner loops of a decision and of learning from it, compiled: numpy would spend a call on each small array.

Each function works on whole batches, and its text says which formula it is; how these make up the policy stands in
posterior.py, latency.py, propensity.py and thompson.py. B requests, K arms, D features; all arrays are C-contiguous.

They are compiled by numba when this module is imported, for the types that are written here, so that no request waits
for that; and kept in numba's cache on disk, or only in memory where no folder can be written to.
"""

from collections.abc import Callable
from math import exp, inf, log, log1p, sqrt
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from policies.types import Vector

DOUBT = 0.25  # most variance of a logarithm: beyond it a normal draw would promise negative latencies
LATENCY, VARIANCE, COST = 0, 1, 2  # rows of what `expect` returns

Belief = tuple[Vector, Vector, Vector]  # mean [K, D], covariance [K, D, D], variance of the noise [K]
Sums = tuple[Vector, Vector, Vector, Vector, Vector]  # A [K, D, D], b [K, D], s, n, heard [K]
Pair = tuple[Vector, Vector]  # mean and variance [B, K]
Mask = NDArray[np.bool_]
Quadrature = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], int]  # see probability_best
BELIEF = "Tuple((f8[:, ::1], f8[:, :, ::1], f8[::1]))"
SUMS = "Tuple((f8[:, :, ::1], f8[:, ::1], f8[::1], f8[::1], f8[::1]))"
QUADRATURE = "Tuple((f4[::1], f4[::1], f4[::1], i8))"

F = TypeVar("F", bound=Callable[..., Any])


def compiled(signature: str, **options: Any) -> Callable[[F], F]:
    """Compile a function for these types of arguments, here and now; numba knows no types that mypy could read."""

    def compile_(function: F) -> F:
        try:
            made: F = njit(signature, cache=True, error_model="numpy", **options)(function)
        except (RuntimeError, OSError):  # no folder for the cache that can be written to, or the disk is full
            made = njit(signature, error_model="numpy", **options)(function)
        return made

    return compile_


@compiled("Tuple((f8[:, :, ::1], f8[::1]))(f8[:, :, ::1])")
def _sweep(matrices: Vector) -> tuple[Vector, Vector]:
    inverses, half_log_det, row = matrices.copy(), np.zeros(len(matrices)), np.empty(matrices.shape[1])
    for n in range(len(inverses)):
        a = inverses[n]
        for p in range(len(a)):
            pivot = a[p, p]
            if not pivot > 0:
                raise np.linalg.LinAlgError("a matrix is not positive definite")
            half_log_det[n] += 0.5 * log(pivot)
            for j in range(len(a)):
                row[j] = a[p, j] / pivot
            for i in range(len(a)):
                factor = a[i, p]
                for j in range(len(a)):  # all of them: whole rows are quicker than the half that is needed
                    a[i, j] -= factor * row[j]
                a[i, p] = -factor / pivot
            for j in range(len(a)):
                a[p, j] = row[j]
            a[p, p] = 1.0 / pivot
    return inverses, half_log_det


def inverse(matrices: Vector) -> tuple[Vector, Vector]:
    """Inverses [..., D, D] and ½ log det [...] of symmetric positive definite matrices [..., D, D].

    By sweeping out one row after the other (Goodnight, The American Statistician 1979); det is the product of pivots.

    Raises:
        LinAlgError: one is not positive definite.
    """
    inverses, half_log_det = _sweep(np.ascontiguousarray(matrices.reshape(-1, *matrices.shape[-2:])))
    return inverses.reshape(matrices.shape), half_log_det.reshape(matrices.shape[:-2])


@compiled("UniTuple(f8, 2)(f8[::1], f8[::1], f8[:, ::1], f8[::1])", fastmath={"reassoc", "contract"})
def _one(x: Vector, mean: Vector, covariance: Vector, spread: Vector) -> tuple[float, float]:
    """Mean and variance of x·w for w ~ N(mean, covariance); `spread` [D] is room to work, and then covariance·x."""
    middle = variance = 0.0
    for i in range(len(x)):
        total = 0.0
        for j in range(len(x)):
            total += covariance[i, j] * x[j]
        spread[i] = total
        middle += x[i] * mean[i]
        variance += x[i] * total
    return middle, variance


@compiled("UniTuple(f8[:, ::1], 2)(f8[:, ::1], f8[:, ::1], f8[:, :, ::1])")
def predict(x: Vector, mean: Vector, covariance: Vector) -> Pair:
    """Mean and variance [B, K] of x·w_k for w_k ~ N(mean_k, covariance_k) and x [B, D]."""
    requests, arms, spread = len(x), len(mean), np.empty(x.shape[1])
    middle, variance = np.empty((requests, arms)), np.empty((requests, arms))
    for k in range(arms):  # one covariance after the other, as only one fits into the fastest cache
        for b in range(requests):
            middle[b, k], variance[b, k] = _one(x[b], mean[k], covariance[k], spread)
    return middle, variance


@compiled(f"void(f8[:, ::1], f8[:, ::1], i8, {SUMS}, f8[:, :, ::1], {BELIEF})")
def fold(x: Vector, told: Vector, count: int, sums: Sums, cuts: Vector, belief: Belief) -> None:
    """The first `count` events into the sums Σ c x xᵀ, Σ c y x, Σ c y², Σ c of posterior.py, and into the posterior:

        P^-1 ← P^-1 - P^-1 x xᵀ P^-1 / (σ²/c + xᵀ P^-1 x)

    (Sherman and Morrison; Golub and Van Loan, Matrix Computations, 2013, section 2.1.4), all in place.

    Args:
        x: [N, D] features.
        told: [N, 4] arm, y, the decision's sequence, and c without the factors of `cuts`.
        count: of the events that are there.
        sums: A, b, s, n, and what was heard.
        cuts: [K, C, 2] decisions before which factors hold.
        belief: the posterior.
    """
    precision, moment, squares, events, heard = sums
    mean, covariance, noise = belief
    dims, spread = x.shape[1], np.empty(x.shape[1])
    for n in range(count):
        arm, y, weight = int(told[n, 0]), told[n, 1], told[n, 3]
        for k in range(len(heard)):
            heard[k] += weight
        for cut in range(cuts.shape[1]):
            weight *= cuts[arm, cut, 1] if cuts[arm, cut, 0] > told[n, 2] else 1.0
        expected, variance = _one(x[n], mean[arm], covariance[arm], spread)
        left = noise[arm] + weight * variance  # not above nothing if more is taken back than was there
        scale = weight / left if left > 0.0 else 0.0
        for i in range(dims):
            seen, gain = weight * x[n, i], scale * spread[i]
            moment[arm, i] += seen * y
            mean[arm, i] += gain * (y - expected)
            for j in range(dims):
                precision[arm, i, j] += seen * x[n, j]
                covariance[arm, i, j] -= gain * spread[j]
        squares[arm] += weight * y * y
        events[arm] += weight


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


@compiled(f"f8[:, :, ::1](f8[:, ::1], f8[:, ::1], f8[:, ::1], f8, f8[:, ::1], {BELIEF}, {BELIEF}, {BELIEF})")
def expect(
    x: Vector, asked: Vector, load: Vector, total: float, terms: Vector, length: Belief, first: Belief, further: Belief
) -> Vector:
    """What to expect of B requests on K arms, see latency.py.

    Args:
        x: [B, D] their features.
        asked: [B, 6] prompt tokens, usual output tokens, most output tokens, the arm that it names or -1, and its
            weights λ_latency and λ_cost.
        load: [3, K] requests in flight, replicas and the wait for a place in seconds of each arm.
        total: requests in flight over all arms.
        terms: [3, K] context tokens, price of a prompt token, of an output token.
        length: of the logarithm of output tokens beyond the usual.
        first: of the logarithm of TTFT, by `pace_features`.
        further: of the logarithm of TPOT, likewise.

    Returns:
        [B, 8, K] latency_s, its variance, cost_usd, ttft_s, tpot_s, output_tokens, and the load per replica and over
        all arms that the request will meet: those of the same batch that name their arm are as good as in flight.
    """
    (tokens_mean, _, tokens_noise), (ttft_mean, ttft_covariance, ttft_noise) = length, first
    tpot_mean, tpot_covariance, tpot_noise = further
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
            found[b, 0, k] = load[2, k] + ttft + decoding
            found[b, 1, k] = ttft * ttft * min(ttft_doubt, DOUBT) + decoding * decoding * min(tpot_doubt, DOUBT)
            found[b, 2, k] = prompt * terms[1, k] + tokens * terms[2, k]
            found[b, 3, k], found[b, 4, k], found[b, 5, k] = ttft, tpot, tokens
            found[b, 6, k], found[b, 7, k] = here, others
    return found


@compiled(f"f8[:, ::1](f8[:, ::1], f8[:, ::1], b1[:, ::1], {QUADRATURE})")
def probability_best(mean: Vector, deviation: Vector, eligible: Mask, quadrature: Quadrature) -> Vector:
    """[B, K] P(k) = ∫ φ(z) Π_{j≠k} Φ((μ_k + σ_k z - μ_j) / σ_j) dz, see propensity.py.

    Args:
        mean: [B, K] μ.
        deviation: [B, K] σ.
        eligible: [B, K] whether the arm can be chosen; the others get 0.
        quadrature: nodes z; their weights, divided by Φ(z) as the product has j = k, too; Φ, 0 in the middle; and in
            how many steps per unit.
    """
    nodes, weights, cdf, steps = quadrature
    (requests, arms), probability = mean.shape, np.zeros(mean.shape)
    ahead, wide, fine = np.empty(arms, np.float32), np.empty(arms, np.float32), np.empty(arms, np.float32)
    product, place = np.empty(len(nodes), np.float32), np.empty(len(nodes), np.int64)
    last, middle = np.float32(len(cdf) - 1), np.float32(len(cdf) // 2 + 0.5)
    for b in range(requests):
        top, total = -inf, 0.0
        for k in range(arms):
            top = max(top, mean[b, k] if eligible[b, k] else -inf)
        for k in range(arms):  # single precision, so from the best on
            ahead[k], wide[k] = mean[b, k] - top, deviation[b, k]
            fine[k] = steps / deviation[b, k]
        for k in range(arms):
            if not eligible[b, k]:
                continue
            product[:] = 1.0
            for j in range(arms):
                if eligible[b, j]:
                    for n in range(len(nodes)):  # a loop of its own, which the compiler can do eight at a time
                        at = (ahead[k] + wide[k] * nodes[n] - ahead[j]) * fine[j] + middle
                        place[n] = int(min(max(at, np.float32(0.0)), last))
                    for n in range(len(nodes)):
                        product[n] *= cdf[place[n]]
            for n in range(len(nodes)):
                probability[b, k] += product[n] * weights[n]
            total += probability[b, k]
        if total > 0:
            probability[b] /= total
    return probability


@compiled("f8[::1](f8, f8, f8[::1])")
def faded(most: float, fade: float, heard: Vector) -> Vector:
    """[K] α = most / √(1 + n / fade) after n = `heard` scores, and never nothing, see thompson.py."""
    return np.maximum(most / np.sqrt(1.0 + np.maximum(heard, 0.0) / fade), 1e-6)


@compiled(
    "Tuple((f8[:, :, ::1], i8[::1]))(UniTuple(f8[:, ::1], 2), f8[:, :, ::1], f8[:, ::1], f8[::1], f8[:, ::1],"
    f"b1[:, ::1], {QUADRATURE})"
)
def draw(
    score: Pair, expected: Vector, asked: Vector, alpha: Vector, z: Vector, eligible: Mask, quadrature: Quadrature
) -> tuple[Vector, NDArray[np.int64]]:
    """Each arm's utility μ = quality - λ_latency latency - λ_cost cost, and a draw from N(μ, (α σ)²), see thompson.py.

    Args:
        score: its mean and variance, as `predict` says.
        expected: what `expect` says.
        asked: see `expect`.
        alpha: [K] how much to explore.
        z: [B, K] standard normal draws.
        eligible: [B, K]; the draws of the others are -inf.
        quadrature: see `probability_best`.

    A score lies in [0, 1], and so does the expected one, whatever the linear model says.

    Returns:
        [11, B, K] the numbers of ArmEstimate in their order there; and [B] the arm with the largest draw. Of the
        deviation, σ² is `variance` and λ_latency² times that of the latency.
    """
    quality, variance = score
    requests, arms = quality.shape
    table, best = np.empty((11, requests, arms)), np.zeros(requests, np.int64)
    mean, spread = np.empty((requests, arms)), np.empty((requests, arms))
    for b in range(requests):
        by_latency, by_cost = asked[b, 4], asked[b, 5]
        for k in range(arms):
            latency, cost = expected[b, LATENCY, k], expected[b, COST, k]
            expected_score = min(max(quality[b, k], 0.0), 1.0)
            mean[b, k] = expected_score - by_latency * latency - by_cost * cost
            spread[b, k] = alpha[k] * sqrt(variance[b, k] + by_latency * by_latency * expected[b, VARIANCE, k])
            table[0, b, k], table[1, b, k], table[2, b, k], table[3, b, k] = expected_score, latency, cost, mean[b, k]
            table[4, b, k] = mean[b, k] + spread[b, k] * z[b, k] if eligible[b, k] else -inf
            table[5, b, k], table[6, b, k], table[7, b, k] = expected[b, 3, k], expected[b, 4, k], expected[b, 5, k]
            table[9, b, k], table[10, b, k] = expected[b, 6, k], expected[b, 7, k]
            if table[4, b, k] > table[4, b, best[b]]:
                best[b] = k
    table[8] = probability_best(mean, spread, eligible, quadrature)
    return table, best
