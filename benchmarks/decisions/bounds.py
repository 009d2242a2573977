"""References on a recorded stream: each fixed arm, the oracle, and ridge regression on all arms' scores."""

from typing import Any

import numpy as np

from benchmarks.decisions.streams import Portfolio, load
from policies.types import Vector

FOLDS = 5
PENALTY = 3.0
RECYCLE_ABOVE = 2500  # requests; only longer streams repeat prompts


def order_of(
    portfolio: Portfolio, shuffle: int, requests: int, calibrate: int = 0
) -> Vector:
    """Row numbers of the prompts in the order of this shuffle.

    Prompts that are kept back for the calibration never occur. If the portfolio has fewer prompts than requests, they
    end the stream; only a stream that is longer than all prompts repeats them, each time in another order.

    Args:
        portfolio: the recorded prompts.
        shuffle: number of the shuffle.
        requests: wanted length.
        calibrate: number of prompts that are kept back.
    """
    rng = np.random.default_rng(1000 + shuffle)
    rows = rng.permutation(len(portfolio.profiles))
    rows = rows[: len(rows) - calibrate]
    if requests <= RECYCLE_ABOVE:
        return rows[:requests]
    laps = [rows, *(rng.permutation(rows) for _ in range(requests // len(rows)))]
    return np.concatenate(laps)[:requests]


def kept_back(portfolio: Portfolio, shuffle: int, calibrate: int) -> Vector:
    """Row numbers of the prompts that `order_of` leaves out for the calibration."""
    rng = np.random.default_rng(1000 + shuffle)
    rows = rng.permutation(len(portfolio.profiles))
    return rows[len(rows) - calibrate :]


def by_shuffle(
    name: str,
    cost_weight: float,
    shuffles: int,
    requests: int,
    splits: Any,
    data: Any,
    calibrate: int = 0,
) -> dict[str, Vector]:
    """Mean utility [shuffles] of each fixed arm, the best of them, the cross-fitted ridge and the oracle."""
    portfolio = load(name, splits, data)
    utility = portfolio.scores - cost_weight * portfolio.cost
    predicted = (
        cross_fitted(portfolio.features, portfolio.scores)
        - cost_weight * portfolio.cost
    )
    routed = utility[np.arange(len(utility)), predicted.argmax(axis=1)]
    rows = [
        order_of(portfolio, shuffle, requests, calibrate) for shuffle in range(shuffles)
    ]
    fixed = np.array([utility[row].mean(axis=0) for row in rows])
    found = {}
    for arm, values in zip(portfolio.arms, fixed.T, strict=True):
        found[f"always {arm}"] = values
    found["best single"] = fixed.max(axis=1)
    found["offline ridge"] = np.array([routed[row].mean() for row in rows])
    found["oracle"] = np.array([utility[row].max(axis=1).mean() for row in rows])
    return found


def ridge(features: Vector, scores: Vector, penalty: float = PENALTY) -> Vector:
    """Weights [D, K] of the ridge regression of scores [M, K] on features [M, D]."""
    return np.asarray(
        np.linalg.solve(
            features.T @ features + penalty * np.eye(features.shape[1]),
            features.T @ scores,
        )
    )


def cross_fitted(features: Vector, scores: Vector) -> Vector:
    """Scores [M, K] predicted by ridge regression that was fitted on the other folds."""
    fold = np.random.default_rng(0).permutation(len(features)) % FOLDS
    predicted = np.zeros_like(scores)
    for f in range(FOLDS):
        predicted[fold == f] = features[fold == f] @ ridge(
            features[fold != f], scores[fold != f]
        )
    return predicted
