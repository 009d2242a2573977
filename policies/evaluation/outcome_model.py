"""An outcome model for the doubly robust estimator: a ridge regression for each arm, fitted along a log."""

import numpy as np
from numpy.typing import NDArray

from policies.types import Vector

FIRST_FIT = 32  # decisions before the first fit
GROWTH = 1.15  # growth of the number of decisions from one fit to the next


def fit_predictions(
    features: Vector,
    chosen: NDArray[np.int64],
    rewards: Vector,
    arms: int,
    ridge: float = 1.0,
) -> Vector:
    """[N, K] predictions of a ridge regression for each arm, each fitted on earlier decisions only.

    Such predictions do not depend on the reward they are compared with, so DR is free of bias whatever the model, as
    with cross-fitting (Chernozhukov et al., Econometrics Journal 2018). In the log of a policy that learned they must
    use the past only (Bibaut et al. 2021).

    Args:
        features: [N, D] of the decisions in their order; the first is 1.
        chosen: [N] column of the arm.
        rewards: [N] NaN where no reward arrived.
        arms: K.
        ridge: prior precision of each weight except the first.
    """
    n, d = features.shape
    out = np.zeros((n, arms))
    moments = np.zeros((arms, d, d))
    sums = np.zeros((arms, d))
    penalty = np.diag(np.concatenate([[1e-3], np.full(d - 1, ridge)]))
    start = 0
    end = min(n, FIRST_FIT)
    got = ~np.isnan(rewards)
    while start < n:
        # [K, D], zero before the first fit
        weights = np.linalg.solve(moments + penalty, sums[:, :, None])[:, :, 0]
        out[start:end] = features[start:end] @ weights.T
        for k in range(arms):
            mine = start + np.flatnonzero((chosen[start:end] == k) & got[start:end])
            moments[k] += features[mine].T @ features[mine]
            sums[k] += rewards[mine] @ features[mine]
        start = end
        end = min(n, int(end * GROWTH) + 1)
    return out
