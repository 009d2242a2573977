"""References on a recorded stream: each fixed arm, the oracle, and ridge regression on all arms' scores."""

from typing import Any

import numpy as np

from benchmarks.decisions.streams import Portfolio, load
from policies.types import Vector

FOLDS = 5
PENALTY = 3.0


def order_of(portfolio: Portfolio, shuffle: int, requests: int) -> Vector:
    """Row numbers of the prompts in the order of this shuffle."""
    return np.random.default_rng(1000 + shuffle).permutation(len(portfolio.profiles))[
        :requests
    ]


def by_shuffle(
    name: str, cost_weight: float, shuffles: int, requests: int, splits: Any, data: Any
) -> dict[str, Vector]:
    """Mean utility [shuffles] of each fixed arm, the best of them, the cross-fitted ridge and the oracle."""
    portfolio = load(name, splits, data)
    utility = portfolio.scores - cost_weight * portfolio.cost
    predicted = (
        cross_fitted(portfolio.features, portfolio.scores)
        - cost_weight * portfolio.cost
    )
    routed = utility[np.arange(len(utility)), predicted.argmax(axis=1)]
    rows = [order_of(portfolio, shuffle, requests) for shuffle in range(shuffles)]
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
