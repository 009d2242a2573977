"""Calibrated probabilities: logistic regression for K arms at once, Platt scaling, and reliability.

The arms share the weights w0: an answer of arm k suffices with probability sigmoid(x · (w0 + u_k)), with
w0 ~ N(c, P^-1) and u_k ~ N(m_k, Q^-1). All weights together are the maximum of the posterior, found by Newton's method
(iteratively reweighted least squares; Bishop, Pattern Recognition and Machine Learning, 2006, sec. 4.3.3). The arms
are coupled only by w0, so a step costs K solves of size D: the Schur complement of the arms' blocks.
"""

from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from policies.types import Vector

ITERATIONS = 25
# Largest change of a log-odds in one Newton step: far from the optimum a full step may overshoot.
LARGEST_STEP = 4.0
BINS = 10


def sigmoid(z: Vector) -> Vector:
    """1 / (1 + e^-z), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * z)))


def logit(p: float) -> float:
    """The log-odds of a probability, which is clipped to [0.01, 0.99]."""
    bounded = min(max(p, 0.01), 0.99)
    return float(np.log(bounded / (1 - bounded)))


@dataclass(frozen=True, eq=False)
class Labelled:
    """N answers with the label of whether they sufficed.

    x: [N, D] features. arm: [N] index of the arm that answered, in [0, K). y: [N] 1 if the answer sufficed, else 0.
    weight: [N] number of events that each counts for.
    """

    x: Vector
    arm: NDArray[np.int64]
    y: Vector
    weight: Vector

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: slice) -> "Labelled":
        return Labelled(self.x[rows], self.arm[rows], self.y[rows], self.weight[rows])


def fit_arms(
    data: Labelled, centre: Vector, shared: Vector, mean: Vector, own: Vector
) -> tuple[Vector, Vector]:
    """The weights w0 [D] that all arms share, and w0 + u_k [K, D] of each arm; the module's text states the model.

    Args:
        data: the labelled answers; may be empty.
        centre: [D] prior mean c of the shared weights.
        shared: [D] prior precision of the shared weights, the diagonal of P.
        mean: [K, D] prior means m of the arms' own weights.
        own: [D] prior precision of the arms' own weights, the diagonal of Q.
    """
    x = data.x
    arm = data.arm
    w0 = centre.copy()
    u = mean.copy()
    rows = [np.flatnonzero(arm == k) for k in range(len(mean))]
    for _ in range(ITERATIONS):
        p = sigmoid((x * (w0 + u[arm])).sum(axis=1))
        curve = data.weight * p * (1 - p)
        slope = data.weight * (data.y - p)
        # [K, D, D]
        hessian = np.stack([(x[r] * curve[r, None]).T @ x[r] for r in rows])
        gradient = np.stack([x[r].T @ slope[r] for r in rows])  # [K, D]
        inner = np.linalg.inv(hessian + np.diag(own))
        pull = gradient + own * (mean - u)
        through = hessian @ inner
        schur = np.diag(shared) + hessian.sum(axis=0) - (through @ hessian).sum(axis=0)
        right = (
            gradient.sum(axis=0)
            + shared * (centre - w0)
            - np.einsum("kde,ke->d", through, pull)
        )
        step0 = np.linalg.solve(schur, right)
        step = np.einsum("kde,ke->kd", inner, pull - hessian @ step0)
        moved = float(np.abs((x * (step0 + step[arm])).sum(axis=1)).max(initial=0.0))
        scale = min(1.0, LARGEST_STEP / moved) if moved else 1.0
        w0 = w0 + scale * step0
        u = u + scale * step
        if moved < 1e-4:
            break
    return w0, w0 + u


def fit_platt(
    data: Labelled, predicted: Vector, arms: int, precision: float
) -> tuple[Vector, Vector]:
    """Slope and intercept that calibrate log-odds: shared by all arms [2], and of each arm [K, 2].

    Platt scaling (J. Platt, Probabilistic outputs for support vector machines, 1999). In place of his smoothed targets
    it has a normal prior around slope 1 and intercept 0, and shrinks the arms towards the shared values.

    Args:
        data: the labels that arrived after the prediction; its features are not used.
        predicted: [N] the log-odds that were predicted before.
        arms: K.
        precision: of the prior on slope and intercept.
    """
    x = np.stack([predicted, np.ones(len(predicted))], axis=1)
    prior = np.full(2, precision)
    shared, each = fit_arms(
        Labelled(x, data.arm, data.y, data.weight),
        np.array([1.0, 0.0]),
        prior,
        np.zeros((arms, 2)),
        prior,
    )
    # A slope is never negative, so the order of the requests is kept.
    for platt in (shared, each):
        platt[..., 0] = np.maximum(platt[..., 0], 0.0)
    return shared, each


@dataclass(frozen=True, eq=False)
class Reliability:
    """The reliability of probabilities, on answers that came after the prediction.

    count: number of answers. brier: mean squared error of the probabilities (Brier, 1950).
    ece: expected calibration error: |predicted - observed|, weighted by the answers of each bin (Naeini et al., AAAI
        2015).
    table: [bins, 3] mean predicted probability, observed share, and number of answers, of equally wide bins of [0, 1].
    """

    count: int
    brier: float
    ece: float
    table: Vector


def reliability(probability: Vector, outcome: Vector, bins: int = BINS) -> Reliability:
    """Compare probabilities [N] with outcomes [N], which are 0 or 1; without answers the figures are NaN."""
    table = np.zeros((bins, 3))
    if not len(probability):
        return Reliability(0, nan, nan, table)
    at = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins)
    table[:, 0] = np.bincount(at, probability, bins) / np.maximum(count, 1)
    table[:, 1] = np.bincount(at, outcome, bins) / np.maximum(count, 1)
    table[:, 2] = count
    gap = float((np.abs(table[:, 0] - table[:, 1]) * count).sum() / len(probability))
    return Reliability(
        len(probability), float(((probability - outcome) ** 2).mean()), gap, table
    )
