"""The compiled probability that an arm's draw is the largest; propensity.py explains the method."""

from math import exp, inf

import numpy as np
from numpy.typing import NDArray

from policies.thompson.compiling import compiled
from policies.types import Vector

# An arm is much narrower than another if the ratio of their deviations is below this.
NARROW = 0.2
# Deviations below an arm's mean where its Φ is taken to be 0 in panels, and above its mean where it is taken to be 1.
LOW_EDGE = 3.75
HIGH_EDGE = 4.75
# Width of the first panel in deviations of the narrowest arm, and largest number of panels.
FIRST_PANEL = 4.0
MAX_PANELS = 12
DENSITY = 0.3989422804014327  # 1 / √(2π)

Mask = NDArray[np.bool_]
# See `probability_best`.
Quadrature = tuple[
    NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], int, Vector, Vector
]
QUADRATURE = "Tuple((f4[::1], f4[::1], f4[::1], i8, f8[::1], f8[::1]))"


@compiled(f"i8(i8, f8[::1], f8[::1], b1[::1], f8[:, ::1], {QUADRATURE})")
def _panels(
    k: int,
    mean: Vector,
    deviation: Vector,
    eligible: Mask,
    found: Vector,
    quadrature: Quadrature,
) -> int:
    """Nodes and weights [2, ...] for arm k where another arm is much narrower, see propensity.py.

    Returns:
        The number of nodes, which are draws in standard deviations of the arm; 0 if the plain nodes are exact enough.
    """
    _, _, _, _, points, shares = quadrature
    wide = deviation[k]
    lowest = -inf
    highest = -inf
    for j in range(len(mean)):
        if eligible[j] and j != k:
            lowest = max(lowest, mean[j] - LOW_EDGE * deviation[j])
            highest = max(highest, mean[j] + HIGH_EDGE * deviation[j])
    begin = max((lowest - mean[k]) / wide, -HIGH_EDGE)
    narrowest = inf
    for j in range(len(mean)):
        edge = (mean[j] + LOW_EDGE * deviation[j] - mean[k]) / wide
        if eligible[j] and j != k and edge > begin:
            narrowest = min(narrowest, deviation[j] / wide)
    if narrowest >= NARROW:
        return 0
    width = FIRST_PANEL * narrowest
    end = min((highest - mean[k]) / wide, HIGH_EDGE)
    count = 0
    while begin < HIGH_EDGE and count + len(points) <= found.shape[1]:
        # Above the others' highest draws their product is 1, and the rest of the density is smooth.
        right = min(begin + width, end) if begin < end else HIGH_EDGE
        if count + 2 * len(points) > found.shape[1]:
            right = HIGH_EDGE
        for n in range(len(points)):
            z = begin + (right - begin) * points[n]
            found[0, count] = z
            found[1, count] = (right - begin) * shares[n] * exp(-0.5 * z * z) * DENSITY
            count += 1
        begin = right
        width *= 2.0
    return count


@compiled(f"f8[:, ::1](f8[:, ::1], f8[:, ::1], b1[:, ::1], {QUADRATURE})")
def probability_best(
    mean: Vector, deviation: Vector, eligible: Mask, quadrature: Quadrature
) -> Vector:
    """[B, K] P(k) = ∫ φ(z) Π_{j≠k} Φ((μ_k + σ_k z - μ_j) / σ_j) dz, see propensity.py.

    Args:
        mean: [B, K] μ.
        deviation: [B, K] σ.
        eligible: [B, K] whether the arm can be chosen; the others get 0.
        quadrature: nodes z; their weights, divided by Φ(z) because the product includes j = k; a table of Φ with the
            argument 0 in the middle; the table's number of steps per unit; and the nodes and weights of a panel in
            [0, 1].
    """
    nodes, weights, cdf, steps, points, _ = quadrature
    requests, arms = mean.shape
    probability = np.zeros(mean.shape)
    ahead = np.empty(arms, np.float32)
    wide = np.empty(arms, np.float32)
    fine = np.empty(arms, np.float32)
    found = np.empty((2, MAX_PANELS * len(points)))
    most = max(len(nodes), found.shape[1])
    at_nodes = np.empty(most, np.float32)
    product = np.empty(most, np.float32)
    place = np.empty(most, np.int64)
    last = np.float32(len(cdf) - 1)
    middle = np.float32(len(cdf) // 2 + 0.5)
    for b in range(requests):
        top = -inf
        total = 0.0
        for k in range(arms):
            top = max(top, mean[b, k] if eligible[b, k] else -inf)
        # In single precision, so relative to the best arm.
        for k in range(arms):
            ahead[k] = mean[b, k] - top
            wide[k] = deviation[b, k]
            fine[k] = steps / deviation[b, k]
        for k in range(arms):
            if not eligible[b, k]:
                continue
            panels = _panels(k, mean[b], deviation[b], eligible[b], found, quadrature)
            count = panels if panels > 0 else len(nodes)
            for n in range(count):
                z = np.float32(found[0, n]) if panels > 0 else nodes[n]
                at_nodes[n] = ahead[k] + wide[k] * z
                product[n] = 1.0
            for j in range(arms):
                if eligible[b, j] and (panels == 0 or j != k):
                    # A separate loop, which the compiler can vectorise.
                    for n in range(count):
                        at = (at_nodes[n] - ahead[j]) * fine[j] + middle
                        place[n] = int(min(max(at, np.float32(0.0)), last))
                    for n in range(count):
                        product[n] *= cdf[place[n]]
            for n in range(count):
                weight = found[1, n] if panels > 0 else weights[n]
                probability[b, k] += product[n] * weight
            total += probability[b, k]
        if total > 0:
            probability[b] /= total
    return probability
