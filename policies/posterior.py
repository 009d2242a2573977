"""Bayesian linear regression for K arms at once, with exponential forgetting.

For each arm, y = x·w + noise with w ~ N(m0, P0^-1). What was seen enters only through the weighted sums
A = Σ c x xᵀ, b = Σ c y x, s = Σ c y², n = Σ c; the posterior is N(m, P^-1) with P = P0 + A/σ² and
P m = P0 m0 + b/σ² (Bishop, Pattern Recognition and Machine Learning, 2006, eq. 3.50-3.51).

The weight of an event is c = γ^(now - sequence of its decision): the age of the decision counts, not when news of it
arrived. So events commute, a correction takes its first version back exactly, and the sums of two routers add up.
Where an arm has changed (drift.py), what was decided before that weighs less by a factor of its own.
The noise variance σ² is estimated from the same sums, with the prior guess counted as `NOISE_PRIOR` events.

An event is cheap: it waits for the next prediction, and then goes into the sums and, by a rank-one update, into the
posterior (kernels.py). Now and then everything is fitted anew from the sums, of which mean, covariance and noise are
pure functions.
"""

from typing import Any

import numpy as np

from policies import kernels
from policies.types import Vector

NOISE_PRIOR = 10.0  # events
RESCALE_EVERY = 64  # decisions; between rescalings newer events just weigh more than one
REFIT_EVERY = 1 / 4  # of the events that count
REFIT_AT_MOST = 512  # events
WAITING = 64  # events that are worked in at once
FORGOTTEN = 1e-12  # events
CUTS = 4  # changes of an arm that are remembered, for what comes late


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
        self.latest = -1.0  # sequence of the last decision of which an event came
        self._heard = np.zeros(arms)  # [K] see `heard`
        self.cuts = np.tile([-1.0, 1.0], (arms, CUTS, 1))  # [K, CUTS, 2] decisions before which factors hold
        self.mean = prior_mean.copy()  # m [K, D]
        self.covariance = np.tile(np.diag(1.0 / prior_precision), (arms, 1, 1))  # P^-1 [K, D, D]
        self.noise = np.full(arms, noise_variance)  # σ² [K]
        self._due = 1  # events until the next refit
        self._x, self._told = np.empty((WAITING, dims)), np.empty((WAITING, 4))  # events, as `fold` takes them
        self._tell: Any = memoryview(self._told.reshape(-1))  # type: ignore[arg-type]  # quicker to write to
        self._waiting = 0  # events not yet in sums and posterior

    def advance(self, sequence: float) -> None:
        """Let the clock run on to this decision; older events fade."""
        if self.forgetting == 1.0 or sequence - self.reference < RESCALE_EVERY:
            return
        self.belief()
        fade = self.forgetting ** (sequence - self.reference)
        for sums in self._sums():
            sums *= fade
        self.reference = float(sequence)

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
        if abs(c) <= FORGOTTEN:
            return
        if self._waiting == WAITING:
            self._fold()
        n, tell = self._waiting, self._tell
        self._x[n] = x
        at = 4 * n
        tell[at], tell[at + 1], tell[at + 2], tell[at + 3] = arm, y, sequence, c
        self._waiting, self._due = n + 1, self._due - 1
        if sequence > self.latest:
            self.latest = sequence

    def _fold(self) -> None:
        """Work what waits into sums and posterior."""
        if self._waiting:
            belief = self.mean, self.covariance, self.noise
            kernels.fold(self._x, self._told, self._waiting, self._sums(), self.cuts, belief)
            self._waiting = 0

    @property
    def heard(self) -> Vector:
        """[K] events of all arms since this one appeared."""
        self._fold()
        return self._heard

    def _sums(self) -> kernels.Sums:
        return self.precision, self.moment, self.squares, self.count, self._heard

    def cut(self, arm: int, keep: float) -> None:
        """Let all that this arm has shown so far count for no more than `keep` events."""
        self._fold()
        self._due = 0
        now = float(self.count[arm]) * self.forgetting ** (self.latest - self.reference)  # wherever the clock stands
        factor = keep / max(keep, now)
        for sums in self._sums():
            sums[arm] *= factor
        cuts = np.roll(self.cuts[arm], 1, axis=0)
        cuts[-1, 1] *= cuts[0, 1]  # no more may be taken back than is there, so the oldest is not just forgotten
        cuts[0] = self.latest + 1.0, factor
        self.cuts[arm] = cuts

    def predict(self, x: Vector) -> tuple[Vector, Vector]:
        """Mean and variance [B, K] of x·w: what is known, without the noise.

        Args:
            x: [B, D].

        Raises:
            ValueError: it has another D; the kernels would read on beyond the end.
        """
        if x.shape[1] != len(self.prior_precision):
            raise ValueError(f"x has {x.shape[1]} features, the model {len(self.prior_precision)}")
        mean, covariance, _ = self.belief()
        return kernels.predict(_own(x), mean, covariance)

    def belief(self) -> kernels.Belief:
        """Mean [K, D], covariance [K, D, D] and noise [K], fitted anew if it is time for that."""
        self._fold()
        if self._due <= 0:
            try:
                self._refit()
            except np.linalg.LinAlgError:
                self._mend()
                self._refit()
        return self.mean, self.covariance, self.noise

    def _mend(self) -> None:
        """The nearest sums that can be: more was taken back than was there, say of votes older than anybody remembers.

        In the Frobenius norm (Higham, Linear Algebra and its Applications 1988); a router that can't decide is worse.
        """
        values, vectors = np.linalg.eigh(self.precision)
        self.precision = _own((vectors * np.maximum(values, 0.0)[:, None]) @ vectors.transpose(0, 2, 1))
        for sums in (self.squares, self.count, self._heard):
            np.maximum(sums, 0.0, out=sums)

    def _refit(self) -> None:
        """Mean, covariance and noise from the sums alone."""
        self._due = self._interval()
        self.noise = (NOISE_PRIOR * self.prior_noise + self._residual()) / (NOISE_PRIOR + self.count)
        self.covariance, self.mean = self._solve(self.noise)

    def _residual(self) -> Vector:
        """[K] Σ c (y - x·m)² under the first guess of the noise."""
        _, mean = self._solve(np.full(len(self.count), self.prior_noise))
        # from the sums; rounding may leave it a hair below zero
        fit = ((mean[:, None] @ self.precision)[:, 0] * mean).sum(1)
        return np.asarray(np.maximum(self.squares - 2 * (mean * self.moment).sum(1) + fit, 0.0))

    def _interval(self) -> int:
        """Events from one refit to the next."""
        return max(1, min(REFIT_AT_MOST, int(REFIT_EVERY * float(self.heard.max()))))

    def _solve(self, noise: Vector) -> tuple[Vector, Vector]:
        """Covariance P^-1 [K, D, D] and mean [K, D] at these noise variances [K]."""
        covariance, _ = kernels.inverse(self.precision / noise[:, None, None] + np.diag(self.prior_precision))
        moment = self.prior_precision * self.prior_mean + self.moment / noise[:, None]
        return covariance, (covariance @ moment[:, :, None])[:, :, 0]

    def state(self) -> dict[str, Vector]:
        """The sums, as arrays; all else follows from them. The next prediction refits, as in whoever restores them."""
        self._fold()
        self._due = 0
        return {
            "precision": self.precision.copy(),
            "moment": self.moment.copy(),
            "squares": self.squares.copy(),
            "count": self.count.copy(),
            "heard": self.heard.copy(),
            "cuts": self.cuts.copy(),
            "reference": np.array([self.reference]),
            "latest": np.array([self.latest]),
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
        self.precision, self.moment = _own(state["precision"]), _own(state["moment"])
        self.squares, self.count = _own(state["squares"]), _own(state["count"])
        self._heard, self.cuts = _own(state["heard"]), _own(state["cuts"])
        self.reference, self.latest = float(state["reference"][0]), float(state["latest"][0])


def _own(given: Vector) -> Vector:
    """A copy of an array as the kernels take it: what came over the network, for one, cannot be written to."""
    return np.array(given, np.float64, order="C")
