"""What is expected of an arm before any score: the weights of a linear model, and what an operator declares by kind."""

from collections.abc import Callable, Sequence

import numpy as np

from policies.base import prior_quality
from policies.profiling.features import KIND_COLUMNS, KIND_VALUE, KINDS, D
from policies.types import Arm, Request, Vector


def prior_weights(
    arms: Sequence[Arm], link: Callable[[float], float] = float
) -> Vector:
    """[K, D] weights with x·w = link(expected score) for a request of each kind, whatever its other features.

    Args:
        arms: the constant's weight gives `Arm.prior_quality`, that of a kind corrects it to `Arm.prior_by_kind`.
        link: from a score to the scale of the linear model.
    """
    weights = np.zeros((len(arms), D))
    levels = [link(quality) for quality in prior_quality(arms).tolist()]
    weights[:, 0] = levels
    for k, arm in enumerate(arms):
        for kind, expected in arm.prior_by_kind:
            weights[k, KIND_COLUMNS[kind]] = (link(expected) - levels[k]) / KIND_VALUE
    return weights


class DeclaredQuality:
    """What an operator declares of arms by kind, as scores that every request of the kind brings along.

    An arm that counts `prior_scores` = n scores with the mean m for a kind adds the precision n/σ² at m to the
    prediction for each request of that kind. So the declared value decides while the prediction is uncertain, and
    what was learned decides afterwards.

    Args:
        arms: K arms.
        noise: σ², the variance of a score.
    """

    def __init__(self, arms: Sequence[Arm], noise: float):
        self._rows = {kind: row for row, kind in enumerate(KINDS)}
        self._mean = np.zeros((len(KINDS) + 1, len(arms)))  # the last row: another kind
        self._precision = np.zeros_like(self._mean)
        for k, arm in enumerate(arms):
            for kind, expected in arm.prior_by_kind:
                self._mean[self._rows[kind], k] = expected
                self._precision[self._rows[kind], k] = arm.prior_scores / noise
        self._is_empty = not self._precision.any()

    def combined(
        self, quality: tuple[Vector, Vector], requests: Sequence[Request]
    ) -> tuple[Vector, Vector]:
        """The means and variances [B, K] of the quality with the declared ones."""
        if self._is_empty:
            return quality
        rows = [self._rows.get(request.profile.kind, -1) for request in requests]
        mean, variance = quality
        weight = variance * self._precision[rows]
        return (mean + weight * self._mean[rows]) / (1 + weight), variance / (
            1 + weight
        )
