"""Probabilities that mean what they say: logistic regression for K arms at once, Platt scaling, and reliability.

The arms share what they have in common: an answer of arm k suffices with probability sigmoid(x · (w0 + u_k)), with
w0 ~ N(c, P^-1) and u_k ~ N(m_k, Q^-1), all found together as the maximum of the posterior by Newton's method
(iteratively reweighted least squares; Bishop, Pattern Recognition and Machine Learning, 2006, sec. 4.3.3). The arms
meet only in w0, so a step costs K solves of size D: the Schur complement of the arms' blocks.
"""

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from policies.types import Vector

ITERATIONS = 25
LARGEST_STEP = 4.0  # of a log-odds in one Newton step: far from the optimum a whole one may overshoot
BINS = 10


def sigmoid(z: Vector) -> Vector:
    """1 / (1 + e^-z), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))


def logit(p: float) -> float:
    """The log-odds of a probability, which is kept 0.01 away from certainty."""
    bounded = min(max(p, 0.01), 0.99)
    return float(np.log(bounded / (1 - bounded)))


@dataclass(frozen=True, eq=False)
class Labelled:
    """N answers of which it is known whether they sufficed.

    x: [N, D] features. arm: [N] who answered, in [0, K). y: [N] 1 if it sufficed, else 0.
    weight: [N] how many events each counts for.
    """

    x: Vector
    arm: NDArray[np.int64]
    y: Vector
    weight: Vector

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: slice) -> "Labelled":
        return Labelled(self.x[rows], self.arm[rows], self.y[rows], self.weight[rows])


def fit_arms(data: Labelled, centre: Vector, shared: Vector, mean: Vector, own: Vector) -> tuple[Vector, Vector]:
    """The weights w0 [D] that all arms share, and w0 + u_k [K, D] of each; see the module's text.

    Args:
        data: what was seen; may be empty.
        centre: [D] prior mean c of the shared weights.
        shared: [D] their precision, the diagonal of P.
        mean: [K, D] prior means m of what each arm has of its own.
        own: [D] their precision, the diagonal of Q.
    """
    x, arm = data.x, data.arm
    w0, u = centre.copy(), mean.copy()
    rows = [np.flatnonzero(arm == k) for k in range(len(mean))]
    for _ in range(ITERATIONS):
        p = sigmoid((x * (w0 + u[arm])).sum(axis=1))
        curve, slope = data.weight * p * (1 - p), data.weight * (data.y - p)
        hessian = np.stack([(x[r] * curve[r, None]).T @ x[r] for r in rows])  # [K, D, D]
        gradient = np.stack([x[r].T @ slope[r] for r in rows])  # [K, D]
        inner = np.linalg.inv(hessian + np.diag(own))
        pull, through = gradient + own * (mean - u), hessian @ inner
        schur = np.diag(shared) + hessian.sum(axis=0) - (through @ hessian).sum(axis=0)
        right = gradient.sum(axis=0) + shared * (centre - w0) - np.einsum("kde,ke->d", through, pull)
        step0 = np.linalg.solve(schur, right)
        step = np.einsum("kde,ke->kd", inner, pull - hessian @ step0)
        moved = float(np.abs((x * (step0 + step[arm])).sum(axis=1)).max(initial=0.0))
        scale = min(1.0, LARGEST_STEP / moved) if moved else 1.0
        w0, u = w0 + scale * step0, u + scale * step
        if moved < 1e-4:
            break
    return w0, w0 + u


def fit_platt(data: Labelled, said: Vector, arms: int, precision: float) -> tuple[Vector, Vector]:
    """Slope and intercept that turn log-odds into calibrated ones: of all arms [2], and of each [K, 2].

    Platt scaling (J. Platt, Probabilistic outputs for support vector machines, 1999), with a normal prior around
    "right as they are" in place of his smoothed targets, and the arms shrunk towards what all of them need.

    Args:
        data: what was seen afterwards; its features are not used.
        said: [N] the log-odds that were said before.
        arms: K.
        precision: of the prior on slope and intercept.
    """
    x = np.stack([said, np.ones(len(said))], axis=1)
    prior = np.full(2, precision)
    shared, each = fit_arms(
        Labelled(x, data.arm, data.y, data.weight), np.array([1.0, 0.0]), prior, np.zeros((arms, 2)), prior
    )
    for platt in (shared, each):
        platt[..., 0] = np.maximum(platt[..., 0], 0.0)  # the order of the requests is never turned round
    return shared, each


@dataclass(frozen=True, eq=False)
class Reliability:
    """How well probabilities held, on answers that came after they were said.

    count: answers. brier: mean squared error of the probabilities (Brier, 1950).
    ece: expected calibration error: |said - seen|, weighted by the answers of each bin (Naeini et al., AAAI 2015).
    table: [bins, 3] mean probability said, share that sufficed, and answers, of bins of equal width over [0, 1].
    """

    count: int
    brier: float
    ece: float
    table: Vector


def reliability(probability: Vector, outcome: Vector, bins: int = BINS) -> Reliability:
    """Compare probabilities [N] with what happened, 0 or 1 [N]; the figures of no answers are not a number."""
    table = np.zeros((bins, 3))
    if not len(probability):
        return Reliability(0, nan, nan, table)
    at = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins)
    table[:, 0] = np.bincount(at, probability, bins) / np.maximum(count, 1)
    table[:, 1] = np.bincount(at, outcome, bins) / np.maximum(count, 1)
    table[:, 2] = count
    gap = float((np.abs(table[:, 0] - table[:, 1]) * count).sum() / len(probability))
    return Reliability(len(probability), float(((probability - outcome) ** 2).mean()), gap, table)
