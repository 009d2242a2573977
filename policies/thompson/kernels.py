"""Compiled inner loops of deciding and learning; numpy would spend a call on each small array.

Each function works on whole batches, and its docstring states its formula. How they make up the policy is explained in
posterior.py, latency.py, propensity.py and policy.py. B requests, K arms, D features; all arrays are C-contiguous.
"""

from math import exp, inf, log, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

from policies.thompson.availability import OBSERVED, Observed, estimate
from policies.thompson.best_arm import QUADRATURE, Mask, Quadrature, probability_best
from policies.thompson.compiling import compiled
from policies.types import Vector

# Largest variance of a logarithm: beyond it a normal draw could be a negative latency.
DOUBT = 0.25
# Smallest deviation of a draw, so that the draws have a density.
LEAST_SPREAD = 1e-6
# Rows of the result of `expect`.
LATENCY = 0
VARIANCE = 1
COST = 2
SCARCITY = 8

# Mean [K, D], covariance [K, D, D], variance of the noise [K].
Posterior = tuple[Vector, Vector, Vector]
# A [K, D, D], b [K, D], s [K], n [K], total scores [K].
Sums = tuple[Vector, Vector, Vector, Vector, Vector]
Pair = tuple[Vector, Vector]  # mean and variance, [B, K] or [K]
POSTERIOR = "Tuple((f8[:, ::1], f8[:, :, ::1], f8[::1]))"
SUMS = "Tuple((f8[:, :, ::1], f8[:, ::1], f8[::1], f8[::1], f8[::1]))"


@compiled("Tuple((f8[:, :, ::1], f8[::1]))(f8[:, :, ::1])")
def _sweep(matrices: Vector) -> tuple[Vector, Vector]:
    inverses = matrices.copy()
    half_log_det = np.zeros(len(matrices))
    row = np.empty(matrices.shape[1])
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
                # The matrix is symmetric, but whole rows are faster than the half that is needed.
                for j in range(len(a)):
                    a[i, j] -= factor * row[j]
                a[i, p] = -factor / pivot
            for j in range(len(a)):
                a[p, j] = row[j]
            a[p, p] = 1.0 / pivot
    return inverses, half_log_det


def inverse(matrices: Vector) -> tuple[Vector, Vector]:
    """Inverses [..., D, D] and ½ log det [...] of symmetric positive definite matrices [..., D, D].

    Sweeps out one row after the other (Goodnight, The American Statistician 1979); det is the product of the pivots.

    Raises:
        LinAlgError: a matrix is not positive definite.
    """
    inverses, half_log_det = _sweep(
        np.ascontiguousarray(matrices.reshape(-1, *matrices.shape[-2:]))
    )
    return inverses.reshape(matrices.shape), half_log_det.reshape(matrices.shape[:-2])


@compiled(
    "UniTuple(f8, 2)(f8[::1], f8[::1], f8[:, ::1], f8[::1])",
    fastmath={"reassoc", "contract"},
)
def _one(
    x: Vector, mean: Vector, covariance: Vector, spread: Vector
) -> tuple[float, float]:
    """Mean and variance of x·w for w ~ N(mean, covariance); `spread` [D] is overwritten with covariance·x."""
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
    requests = len(x)
    arms = len(mean)
    spread = np.empty(x.shape[1])
    middle = np.empty((requests, arms))
    variance = np.empty((requests, arms))
    # The arms are the outer loop, because only one covariance fits into the fastest cache.
    for k in range(arms):
        for b in range(requests):
            middle[b, k], variance[b, k] = _one(x[b], mean[k], covariance[k], spread)
    return middle, variance


@compiled("f8(f8[:, ::1], f8)")
def _kept(discounts: Vector, sequence: float) -> float:
    """The product of an arm's discount factors [C, 2] that were applied after this decision."""
    kept = 1.0
    for c in range(len(discounts)):
        if discounts[c, 0] > sequence:
            kept *= discounts[c, 1]
    return kept


@compiled(f"void(f8[:, ::1], f8[:, ::1], i8, {SUMS}, f8[:, :, ::1], {POSTERIOR})")
def update_posterior(
    x: Vector,
    buffer: Vector,
    count: int,
    sums: Sums,
    discounts: Vector,
    posterior: Posterior,
) -> None:
    """Add the first `count` events to the sums Σ c x xᵀ, Σ c y x, Σ c y², Σ c of posterior.py and to the posterior:

        P^-1 ← P^-1 - P^-1 x xᵀ P^-1 / (σ²/c + xᵀ P^-1 x)

    (Sherman and Morrison; Golub and Van Loan, Matrix Computations, 2013, section 2.1.4), all in place.

    Args:
        x: [N, D] features.
        buffer: [N, 5] arm, y, the decision's sequence, c without the factors of `discounts`, and the part of c that
            counts in the total scores.
        count: number of events in the buffer.
        sums: A, b, s, n, and the total scores.
        discounts: [K, C, 2] a sequence, and the factor for events of earlier decisions.
        posterior: mean, covariance and noise.
    """
    precision, moment, squares, events, total_scores = sums
    mean, covariance, noise = posterior
    dims = x.shape[1]
    spread = np.empty(x.shape[1])
    for n in range(count):
        arm = int(buffer[n, 0])
        y = buffer[n, 1]
        weight = buffer[n, 3]
        for k in range(len(total_scores)):
            total_scores[k] += buffer[n, 4] * _kept(discounts[k], buffer[n, 2])
        weight *= _kept(discounts[arm], buffer[n, 2])
        expected, variance = _one(x[n], mean[arm], covariance[arm], spread)
        # It is not positive if more is withdrawn than the sums hold.
        left = noise[arm] + weight * variance
        scale = weight / left if left > 0.0 else 0.0
        for i in range(dims):
            seen = weight * x[n, i]
            gain = scale * spread[i]
            moment[arm, i] += seen * y
            mean[arm, i] += gain * (y - expected)
            for j in range(dims):
                precision[arm, i, j] += seen * x[n, j]
                covariance[arm, i, j] -= gain * spread[j]
        squares[arm] += weight * y * y
        events[arm] += weight


@compiled("void(f8[::1], f8, f8, f8)")
def _set_pace_features(
    row: Vector, prompt_tokens: float, load: float, total_load: float
) -> None:
    """Write `pace_features` to a row [4]."""
    row[0] = 1.0
    row[1] = log1p(prompt_tokens) / 5
    row[2] = log1p(load)
    row[3] = log1p(total_load)


@compiled("f8[::1](f8, f8, f8)")
def pace_features(prompt_tokens: float, load: float, total_load: float) -> Vector:
    """[4] features of the time to a token: bias, prompt length, the arm's load, and the load of all arms.

    The last one matters if arms share a machine; otherwise its weight is learned to be near 0.

    Args:
        prompt_tokens: of the request.
        load: requests in flight per replica of the arm.
        total_load: requests in flight over all arms.
    """
    row = np.empty(4)
    _set_pace_features(row, prompt_tokens, load, total_load)
    return row


@compiled(
    f"f8[:, :, ::1](f8[:, ::1], f8[:, ::1], f8[:, ::1], f8, f8[:, ::1], {POSTERIOR}, {POSTERIOR}, {POSTERIOR})"
)
def expect(
    x: Vector,
    asked: Vector,
    load: Vector,
    total: float,
    terms: Vector,
    length: Posterior,
    first: Posterior,
    further: Posterior,
) -> Vector:
    """Expected latency, cost and length of B requests on K arms, see latency.py.

    Args:
        x: [B, D] their features.
        asked: [B, 9] prompt tokens, usual output tokens, limit of output tokens, the arm that the client named or -1,
            the weights λ_latency and λ_cost, the chance to be scored, the probability of a uniform draw, and 1 if the
            request pays the prices of scarce arms.
        load: [5, K] requests in flight, replicas, the seconds in the queue, and the scarcity prices of a prompt token
            and of an output token of each arm.
        total: requests in flight over all arms.
        terms: [5, K] context tokens, price of a prompt token, of an output token, factors on the output tokens and on
            TPOT.
        length: posterior of the logarithm of output tokens beyond the usual number.
        first: posterior of the logarithm of TTFT, by `pace_features`.
        further: posterior of the logarithm of TPOT, by `pace_features`.

    Returns:
        [B, 9, K] latency_s, its variance, cost_usd, ttft_s, tpot_s, output_tokens, the load per replica and over all
        arms, and what the request pays for a scarce arm. Requests of the same batch that name their arm count as in
        flight.
    """
    (tokens_mean, _, tokens_noise), (ttft_mean, ttft_covariance, ttft_noise) = (
        length,
        first,
    )
    tpot_mean, tpot_covariance, tpot_noise = further
    requests = len(x)
    arms = load.shape[1]
    spread = np.empty(4)
    at = np.empty(4)
    found = np.empty((requests, 9, arms))
    named = np.zeros(arms)
    naming = 0.0
    for b in range(requests):
        if asked[b, 3] >= 0:
            named[int(asked[b, 3])] += 1.0
            naming += 1.0
    for b in range(requests):
        prompt = asked[b, 0]
        usual = asked[b, 1]
        limit = asked[b, 2]
        mine = asked[b, 3]
        others = total + naming - (mine >= 0)
        for k in range(arms):
            here = (load[0, k] + named[k] - (mine == k)) / load[1, k]
            beyond = 0.5 * tokens_noise[k]
            for i in range(x.shape[1]):
                beyond += x[b, i] * tokens_mean[k, i]
            tokens = terms[3, k] * ((1.0 + usual) * exp(beyond) - 1.0)
            tokens = max(min(tokens, terms[0, k] - prompt, limit), 1.0)
            _set_pace_features(at, prompt, here, others)
            log_ttft, ttft_doubt = _one(at, ttft_mean[k], ttft_covariance[k], spread)
            log_tpot, tpot_doubt = _one(at, tpot_mean[k], tpot_covariance[k], spread)
            ttft = exp(min(log_ttft + 0.5 * ttft_noise[k], 8.0))
            tpot = terms[4, k] * exp(min(log_tpot + 0.5 * tpot_noise[k], 8.0))
            decoding = (tokens - 1.0) * tpot
            found[b, 0, k] = load[2, k] + ttft + decoding
            found[b, 1, k] = ttft * ttft * min(
                ttft_doubt, DOUBT
            ) + decoding * decoding * min(tpot_doubt, DOUBT)
            found[b, 2, k] = prompt * terms[1, k] + tokens * terms[2, k]
            found[b, 3, k] = ttft
            found[b, 4, k] = tpot
            found[b, 5, k] = tokens
            found[b, 6, k] = here
            found[b, 7, k] = others
            scarcity = load[3, k] * prompt + load[4, k] * tokens
            found[b, SCARCITY, k] = asked[b, 8] * scarcity
    return found


@compiled("f8[::1](f8, f8, f8[::1])")
def exploration_factor(most: float, fade: float, total_scores: Vector) -> Vector:
    """[K] α = most / √(1 + n / fade) after n = `total_scores` scores; see policy.py."""
    return most / np.sqrt(1.0 + np.maximum(total_scores, 0.0) / fade)


@compiled(
    f"Tuple((f8[:, :, ::1], i8[::1]))(UniTuple(f8[:, ::1], 2), Tuple(({OBSERVED})), f8[:, :, ::1], f8[:, ::1],"
    f"UniTuple(f8, 3), f8[::1], f8[:, ::1], f8[:, ::1], b1[:, ::1], {QUADRATURE})"
)
def draw(
    quality: Pair,
    observed: Observed,
    expected: Vector,
    asked: Vector,
    exploration: tuple[float, float, float],
    total_scores: Vector,
    z: Vector,
    uniform: Vector,
    eligible: Mask,
    quadrature: Quadrature,
) -> tuple[Vector, NDArray[np.int64]]:
    """Each arm's utility μ = availability · quality - λ_latency latency - λ_cost cost - scarcity, and a draw from
    N(μ, s²).

    s² is the variance of what the answer will show, see policy.py. The expected quality is clipped to [0, 1], because
    scores are in [0, 1] and a linear model may leave that range.

    Args:
        quality: mean and variance of the score of an unflawed answer, from `predict`.
        observed: what is known of the availability.
        expected: the result of `expect`.
        asked: see `expect`.
        exploration: see `exploration_factor`, most and fade; and the smallest probability of an eligible arm, if the
            answer will be scored.
        total_scores: [K] number of scores.
        z: [B, K] standard normal draws.
        uniform: [B, 2] uniform draws: whether the arm is drawn uniformly, and which.
        eligible: [B, K]; the draws of the others are -inf.
        quadrature: see `probability_best`.

    Returns:
        [12, B, K] the numbers of ArmEstimate in the order of its fields; and [B] the chosen arm: the one with the
        largest draw, or one that was drawn uniformly.
    """
    score, variance = quality
    window, changed, found, now = observed
    available, doubt = estimate(window, changed, found, now)
    most, fade, least = exploration
    alpha = exploration_factor(most, fade, total_scores)
    requests, arms = score.shape
    table = np.empty((12, requests, arms))
    best = np.zeros(requests, np.int64)
    mean = np.empty((requests, arms))
    spread = np.empty((requests, arms))
    for b in range(requests):
        by_latency = asked[b, 4]
        by_cost = asked[b, 5]
        for k in range(arms):
            latency = expected[b, LATENCY, k]
            cost = expected[b, COST, k]
            unflawed = min(max(score[b, k], 0.0), 1.0)
            expected_score = available[k] * unflawed
            worth = expected_score - by_latency * latency - by_cost * cost
            mean[b, k] = worth - expected[b, SCARCITY, k]
            shown = unflawed * unflawed * doubt[k]
            shown += by_latency * by_latency * expected[b, VARIANCE, k]
            sampled = sqrt(asked[b, 6]) * available[k] * available[k] * variance[b, k]
            spread[b, k] = max(alpha[k] * sqrt(sampled + shown), LEAST_SPREAD)
            table[0, b, k] = expected_score
            table[1, b, k] = latency
            table[2, b, k] = cost
            table[3, b, k] = mean[b, k]
            table[4, b, k] = (
                mean[b, k] + spread[b, k] * z[b, k] if eligible[b, k] else -inf
            )
            table[5, b, k] = expected[b, 3, k]
            table[6, b, k] = expected[b, 4, k]
            table[7, b, k] = expected[b, 5, k]
            table[9, b, k] = expected[b, 6, k]
            table[10, b, k] = expected[b, 7, k]
            table[11, b, k] = available[k]
            if table[4, b, k] > table[4, b, best[b]]:
                best[b] = k
    table[8] = probability_best(mean, spread, eligible, quadrature)
    for b in range(requests):
        count = 0
        for k in range(arms):
            count += eligible[b, k]
        share = min(1.0, asked[b, 7] + least * asked[b, 6] * count)
        if count == 0 or share <= 0.0:
            continue
        place = int(uniform[b, 1] * count)
        for k in range(arms):
            if eligible[b, k]:
                table[8, b, k] = (1.0 - share) * table[8, b, k] + share / count
                if place == 0 and uniform[b, 0] < share:
                    best[b] = k
                place -= 1
    return table, best
