"""Bayesian linear regression for K arms at once, with exponential forgetting.

For each arm, y = x·w + noise with w ~ N(m0, P0^-1). What was seen enters only through the weighted sums
A = Σ c x xᵀ, b = Σ c y x, s = Σ c y², n = Σ c; the posterior is N(m, P^-1) with P = P0 + A/σ² and
P m = P0 m0 + b/σ² (Bishop, Pattern Recognition and Machine Learning, 2006, eq. 3.50-3.51).

The weight of an event is c = γ^(now - tick of its decision). The clock ticks with every decision, or with every scored
decision (policy.py). The age of the decision counts, not the time at which the event arrived. So events commute, a
correction withdraws its first version exactly, and the sums of two routers add up. When an arm is found changed
(drift.py), its earlier decisions are multiplied by a discount factor.
The noise variance σ² is estimated from the same sums; the prior guess counts as `NOISE_PRIOR` events.

Adding an event is cheap: it is buffered until the next prediction. Then it is added to the sums and, by a rank-one
update, to the posterior (kernels.py). From time to time mean, covariance and noise are refitted from the sums, of
which they are pure functions.
"""

from math import isfinite

import numpy as np

from policies.thompson import kernels
from policies.types import Vector

NOISE_PRIOR = 10.0  # events
# Between two rescalings the weight of a new event is above 1: by at most a tenth, and for at most so many ticks.
RESCALE_EVERY = 64
MOST_GAIN = 0.1
REFIT_EVERY = 1 / 4  # of the events that count
REFIT_AT_MOST = 512  # events
BUFFER_SIZE = 64  # events that are added to the sums at once
FORGOTTEN = 1e-12  # weight of an event below which it is ignored
DISCOUNTS = 4  # latest discounts of an arm that are kept for late events


class LinearPosterior:
    """K independent Bayesian linear models over the same D features.

    Args:
        prior_mean: [K, D] m0.
        prior_precision: [D] diagonal of P0.
        noise_variance: first guess of σ².
        forgetting: γ in (0, 1]; 1 never forgets.
    """

    def __init__(
        self,
        prior_mean: Vector,
        prior_precision: Vector,
        noise_variance: float,
        forgetting: float,
    ):
        arms, dims = prior_mean.shape
        if prior_precision.shape != (dims,):
            raise ValueError(
                f"prior_precision has shape {prior_precision.shape}; give one value for each of {dims}"
            )
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting is {forgetting}; choose a value in (0, 1]")
        self.prior_mean = prior_mean
        self.prior_precision = prior_precision
        self.prior_noise = noise_variance
        self.forgetting = forgetting
        self.precision = np.zeros((arms, dims, dims))  # A [K, D, D]
        self.moment = np.zeros((arms, dims))  # b [K, D]
        self.squares = np.zeros(arms)  # s [K]
        self.count = np.zeros(arms)  # n [K]
        self.reference = 0.0  # sequence at which an event has weight 1
        self.latest = -1.0  # sequence of the latest decision that has an event
        self._total_scores = np.zeros(arms)  # [K] see `total_scores`
        # [K, DISCOUNTS, 2] a sequence, and the factor for events of earlier decisions
        self.discounts = np.tile([-1.0, 1.0], (arms, DISCOUNTS, 1))
        self.mean = prior_mean.copy()  # m [K, D]
        # P^-1 [K, D, D]
        self.covariance = np.tile(np.diag(1.0 / prior_precision), (arms, 1, 1))
        self.noise = np.full(arms, noise_variance)  # σ² [K]
        self._rescale_every = float(RESCALE_EVERY)
        if forgetting < 1:
            self._rescale_every = min(RESCALE_EVERY, MOST_GAIN / (1 - forgetting))
        self._due = 1  # events until the next refit
        self._x = np.empty((BUFFER_SIZE, dims))
        # [BUFFER_SIZE, 5] events, see kernels.update_posterior
        self._buffer = np.empty((BUFFER_SIZE, 5))
        self._buffered = 0  # events that are not yet in the sums and the posterior

    def advance(self, sequence: float) -> None:
        """Set the forgetting clock to this tick; the weight of older events decays."""
        if self.forgetting == 1.0 or sequence - self.reference < self._rescale_every:
            return
        self.posterior()
        fade = self.forgetting ** (sequence - self.reference)
        for sums in self._sums():
            sums *= fade
        self.reference = float(sequence)
        if self._rescale_every < RESCALE_EVERY:
            self._due = 0  # forgetting changes the posterior more than new events do

    def add(
        self,
        arm: int,
        x: Vector,
        y: float,
        sequence: float,
        weight: float = 1.0,
        trust: float = 1.0,
    ) -> None:
        """Add one event, or withdraw it with weight -1.

        Args:
            arm: index in [0, K).
            x: [D] features.
            y: observed value.
            sequence: of the event's decision.
            weight: number of events that it counts for.
            trust: share of that which counts in `total_scores`, on which exploration rests.

        Raises:
            ValueError: y is not finite; it would make every later prediction NaN. TaskProfile checks the features.
        """
        if not isfinite(y):
            raise ValueError("an event with a value that is not finite")
        c = weight * self.forgetting ** (self.reference - sequence)
        if abs(c) <= FORGOTTEN:
            return
        if self._buffered == BUFFER_SIZE:
            self._flush()
        n = self._buffered
        self._x[n] = x
        self._buffer[n] = (arm, y, sequence, c, c * trust)
        self._buffered = n + 1
        self._due -= 1
        if sequence > self.latest:
            self.latest = sequence

    def _flush(self) -> None:
        """Add the buffered events to the sums and the posterior."""
        if self._buffered:
            posterior = self.mean, self.covariance, self.noise
            kernels.update_posterior(
                self._x,
                self._buffer,
                self._buffered,
                self._sums(),
                self.discounts,
                posterior,
            )
            self._buffered = 0

    @property
    def total_scores(self) -> Vector:
        """[K] number of events of all arms since this arm was added, each with its weight and trust."""
        self._flush()
        return self._total_scores

    def _sums(self) -> kernels.Sums:
        return self.precision, self.moment, self.squares, self.count, self._total_scores

    def discount(self, arm: int, keep: float) -> None:
        """Reduce the weight of all events of this arm so far to at most `keep` events."""
        self._flush()
        self._due = 0
        # The weight at the latest event's decision does not depend on the clock.
        fade = self.forgetting ** (self.latest - self.reference)
        now = float(self.count[arm]) * fade
        factor = keep / max(keep, now)
        for sums in self._sums():
            sums[arm] *= factor
        discounts = np.roll(self.discounts[arm], 1, axis=0)
        # The oldest discount is merged into the second oldest. If it were dropped, withdrawing an old event would
        # subtract more than that event's share of the sums.
        discounts[-1, 1] *= discounts[0, 1]
        discounts[0] = self.latest + 1.0, factor
        self.discounts[arm] = discounts

    def predict(self, x: Vector) -> tuple[Vector, Vector]:
        """Mean and variance [B, K] of x·w, without the noise.

        Args:
            x: [B, D].

        Raises:
            ValueError: x has another D; the kernels would read beyond the end of the array.
        """
        if x.shape[1] != len(self.prior_precision):
            raise ValueError(
                f"x has {x.shape[1]} features, the model {len(self.prior_precision)}"
            )
        mean, covariance, _ = self.posterior()
        return kernels.predict(_own(x), mean, covariance)

    def posterior(self) -> kernels.Posterior:
        """Mean [K, D], covariance [K, D, D] and noise [K], refitted from the sums if that is due."""
        self._flush()
        if self._due <= 0:
            try:
                self._refit()
            except np.linalg.LinAlgError:
                self._project_psd()
                self._refit()
        return self.mean, self.covariance, self.noise

    def _project_psd(self) -> None:
        """Project the sums onto the nearest positive semidefinite ones.

        Withdrawing votes that were already forgotten can make the sums indefinite. The projection is the nearest in
        the Frobenius norm (Higham, Linear Algebra and its Applications 1988), and lets the router go on deciding.
        """
        values, vectors = np.linalg.eigh(self.precision)
        self.precision = _own(
            (vectors * np.maximum(values, 0.0)[:, None]) @ vectors.transpose(0, 2, 1)
        )
        for sums in (self.squares, self.count, self._total_scores):
            np.maximum(sums, 0.0, out=sums)

    def _refit(self) -> None:
        """Refit mean, covariance and noise from the sums."""
        self._due = self._interval()
        self.noise = (NOISE_PRIOR * self.prior_noise + self._residual()) / (
            NOISE_PRIOR + self.count
        )
        self.covariance, self.mean = self._solve(self.noise)

    def _residual(self) -> Vector:
        """[K] Σ c (y - x·m)² under the first guess of the noise."""
        _, mean = self._solve(np.full(len(self.count), self.prior_noise))
        # Rounding may leave the result slightly below zero.
        fit = ((mean[:, None] @ self.precision)[:, 0] * mean).sum(1)
        return np.asarray(
            np.maximum(self.squares - 2 * (mean * self.moment).sum(1) + fit, 0.0)
        )

    def _interval(self) -> int:
        """Number of events between two refits."""
        return max(
            1, min(REFIT_AT_MOST, int(REFIT_EVERY * float(self.total_scores.max())))
        )

    def _solve(self, noise: Vector) -> tuple[Vector, Vector]:
        """Covariance P^-1 [K, D, D] and mean [K, D] at these noise variances [K]."""
        covariance, _ = kernels.inverse(
            self.precision / noise[:, None, None] + np.diag(self.prior_precision)
        )
        moment = self.prior_precision * self.prior_mean + self.moment / noise[:, None]
        return covariance, (covariance @ moment[:, :, None])[:, :, 0]

    def state(self) -> dict[str, Vector]:
        """The sums, as arrays; everything else follows from them.

        The next prediction refits, so that this posterior and one restored from the state predict the same.
        """
        self._flush()
        self._due = 0
        return {
            "precision": self.precision.copy(),
            "moment": self.moment.copy(),
            "squares": self.squares.copy(),
            "count": self.count.copy(),
            "heard": self.total_scores.copy(),
            "cuts": self.discounts.copy(),
            "reference": np.array([self.reference]),
            "latest": np.array([self.latest]),
        }

    def restore(self, state: dict[str, Vector]) -> None:
        """Restore the sums of `state()`.

        Raises:
            ValueError: an array is missing, has another shape, is not finite, or a matrix is not symmetric.
        """
        for name, mine in self.state().items():
            given = state.get(name)
            if given is None or given.shape != mine.shape:
                raise ValueError(
                    f"'{name}' must have shape {mine.shape}, got {None if given is None else given.shape}"
                )
            if not np.isfinite(given).all():
                raise ValueError(f"'{name}' holds numbers that are not finite")
        if not np.allclose(state["precision"], state["precision"].transpose(0, 2, 1)):
            raise ValueError("'precision' is not symmetric")
        self.precision = _own(state["precision"])
        self.moment = _own(state["moment"])
        self.squares = _own(state["squares"])
        self.count = _own(state["count"])
        self._total_scores = _own(state["heard"])
        self.discounts = _own(state["cuts"])
        self.reference = float(state["reference"][0])
        self.latest = float(state["latest"][0])


def _own(given: Vector) -> Vector:
    """A writable, C-contiguous copy of an array, as the kernels need it."""
    return np.array(given, np.float64, order="C")
