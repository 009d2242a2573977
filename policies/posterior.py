"""Bayesian linear regression for K arms at once, with exponential forgetting.

For each arm, y = x·w + noise with w ~ N(m0, P0^-1). What was seen enters only through the weighted sums
A = Σ c x xᵀ, b = Σ c y x, s = Σ c y², n = Σ c; the posterior is N(m, P^-1) with P = P0 + A/σ² and
P m = P0 m0 + b/σ² (Bishop, Pattern Recognition and Machine Learning, 2006, eq. 3.50-3.51).

The weight of an event is c = γ^(now - sequence of its decision): the age of the decision counts, not when news of it
arrived. So events commute, a correction takes its first version back exactly, and the sums of two routers add up.
The noise variance σ² is estimated from the same sums, with the prior guess counted as `NOISE_PRIOR` events.
"""

import numpy as np
from numpy.typing import NDArray

from policies.types import Vector

NOISE_PRIOR = 10.0  # events
RESCALE_EVERY = 64  # decisions; between rescalings newer events just weigh more than one


class LinearPosterior:
    """K independent Bayesian linear models over the same D features.

    Args:
        prior_mean: [K, D] m0.
        prior_precision: [D] diagonal of P0.
        noise_variance: first guess of σ².
        forgetting: γ in (0, 1]; 1 never forgets.
    """

    def __init__(self, prior_mean: Vector, prior_precision: Vector, noise_variance: float, forgetting: float):
        arms, dims = prior_mean.shape
        if prior_precision.shape != (dims,):
            raise ValueError(f"prior_precision has shape {prior_precision.shape}; give one value for each of {dims}")
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting is {forgetting}; choose a value in (0, 1]")
        self.prior_mean, self.prior_precision = prior_mean, prior_precision
        self.prior_noise, self.forgetting = noise_variance, forgetting
        self.precision = np.zeros((arms, dims, dims))  # A [K, D, D]
        self.moment = np.zeros((arms, dims))  # b [K, D]
        self.squares = np.zeros(arms)  # s [K]
        self.count = np.zeros(arms)  # n [K]
        self.reference = 0.0  # sequence at which an event weighs one
        self.mean = prior_mean.copy()  # m [K, D]
        self.covariance = np.tile(np.diag(1.0 / prior_precision), (arms, 1, 1))  # P^-1 [K, D, D]
        self.noise = np.full(arms, noise_variance)  # σ² [K]
        self._stale: NDArray[np.bool_] = np.zeros(arms, dtype=bool)

    def advance(self, sequence: float) -> None:
        """Let the clock run on to this decision; older events fade."""
        if self.forgetting == 1.0 or sequence - self.reference < RESCALE_EVERY:
            return
        fade = self.forgetting ** (sequence - self.reference)
        for sums in (self.precision, self.moment, self.squares, self.count):
            sums *= fade
        self.reference = float(sequence)
        self._stale[:] = True

    def add(self, arm: int, x: Vector, y: float, sequence: float, weight: float = 1.0) -> None:
        """Add one event, or with weight -1 take one back.

        Args:
            arm: index in [0, K).
            x: [D] its features.
            y: what was seen.
            sequence: of the decision that it belongs to.
            weight: how many events it counts for.
        """
        c = weight * self.forgetting ** (self.reference - sequence)
        self.precision[arm] += c * np.outer(x, x)
        self.moment[arm] += c * y * x
        self.squares[arm] += c * y * y
        self.count[arm] += c
        self._stale[arm] = True

    def predict(self, x: Vector) -> tuple[Vector, Vector]:
        """Mean and variance [B, K] of x·w: what is known, without the noise.

        Args:
            x: [B, D], or [B, K, D] where each arm has features of its own.
        """
        self._refresh()
        by_arm = x.transpose(1, 0, 2) if x.ndim == 3 else x[None]  # [K or 1, B, D]
        mean = np.einsum("kbd,kd->bk", np.broadcast_to(by_arm, (len(self.mean), *by_arm.shape[1:])), self.mean)
        variance = ((by_arm @ self.covariance) * by_arm).sum(-1).T
        return mean, np.maximum(variance, 1e-12)

    def _refresh(self) -> None:
        """Bring mean, covariance and noise up to date with the sums, of which they are pure functions."""
        stale = np.flatnonzero(self._stale)
        if not stale.size:
            return
        _, mean = self._solve(stale, np.full(len(stale), self.prior_noise))
        # Σ c (y - x·m)², from the sums; rounding may leave it a hair below zero
        fit = np.einsum("kd,kde,ke->k", mean, self.precision[stale], mean)
        residual = np.maximum(self.squares[stale] - 2 * np.einsum("kd,kd->k", mean, self.moment[stale]) + fit, 0.0)
        self.noise[stale] = (NOISE_PRIOR * self.prior_noise + residual) / (NOISE_PRIOR + self.count[stale])
        self.covariance[stale], self.mean[stale] = self._solve(stale, self.noise[stale])
        self._stale[stale] = False

    def _solve(self, arms: NDArray[np.intp], noise: Vector) -> tuple[Vector, Vector]:
        """Covariance P^-1 [k, D, D] and mean [k, D] of these arms at these noise variances [k]."""
        precision = self.precision[arms] / noise[:, None, None] + np.diag(self.prior_precision)
        factor = np.linalg.inv(np.linalg.cholesky(precision))
        covariance = factor.transpose(0, 2, 1) @ factor
        moment = self.prior_precision * self.prior_mean[arms] + self.moment[arms] / noise[:, None]
        return covariance, np.einsum("kde,ke->kd", covariance, moment)

    def state(self) -> dict[str, Vector]:
        """The sums, as arrays; all else follows from them."""
        return {
            "precision": self.precision.copy(),
            "moment": self.moment.copy(),
            "squares": self.squares.copy(),
            "count": self.count.copy(),
            "reference": np.array([self.reference]),
        }

    def restore(self, state: dict[str, Vector]) -> None:
        """Take over the sums of `state()`.

        Raises:
            ValueError: an array is missing, has another shape, is not finite, or a matrix is not symmetric.
        """
        for name, mine in self.state().items():
            given = state.get(name)
            if given is None or given.shape != mine.shape:
                raise ValueError(f"'{name}' must have shape {mine.shape}, got {None if given is None else given.shape}")
            if not np.isfinite(given).all():
                raise ValueError(f"'{name}' holds numbers that are not finite")
        if not np.allclose(state["precision"], state["precision"].transpose(0, 2, 1)):
            raise ValueError("'precision' is not symmetric")
        self.precision, self.moment = state["precision"].copy(), state["moment"].copy()
        self.squares, self.count = state["squares"].copy(), state["count"].copy()
        self.reference = float(state["reference"][0])
        self._stale[:] = True
