"""Bayesian linear regression for K arms that share what they have in common: how hard a request is for all of them.

    y = x·w_k + noise,   w_k = m_k + θ + δ_k,   θ ~ N(0, P_θ^-1),   δ_k ~ N(0, P_δ^-1)

with m_k the prior guess of the arm, θ common to all arms and δ_k its own. So an arm that is new, or rarely chosen,
starts from what the others have shown (Gelman et al., Bayesian Data Analysis, 3rd ed., 2013, ch. 15), and an arm's
context weights are as large as the evidence says: their prior deviations τ_θ, τ_δ are those of a grid that maximise
the marginal likelihood (MacKay, Neural Computation 1992). Contexts that tell nothing thus cost no exploration.

δ is integrated out in closed form: with M_k = P_δ + A_k/σ² and G_k = M_k^-1 P_δ, the arms' data say of θ
Λ = P_θ + Σ_k P_δ - P_δ G_k and h = Σ_k G_kᵀ b_k/σ². Sums, forgetting and corrections are those of posterior.py.
"""

import numpy as np

from policies.posterior import NOISE_PRIOR, LinearPosterior
from policies.types import Vector

DEVIATIONS = (0.02, 0.05, 0.1, 0.2, 0.4)  # of a context weight: the grid
BIAS_DEVIATION = 0.15  # of an arm's level from the common one
COMMON_DEVIATION = 0.3  # of the common level from the prior guess
REFIT_EVERY = 1 / 8  # of the events so far; between refits the chosen arm alone is updated
REFIT_AT_MOST = 64  # events


class HierarchicalPosterior(LinearPosterior):
    """K Bayesian linear models over the same D features, the first of which is 1, that learn from each other.

    Args:
        prior_quality: [K] expected y before anything is known.
        dims: D.
        noise_variance: first guess of σ².
        forgetting: γ in (0, 1]; 1 never forgets.
    """

    def __init__(self, prior_quality: Vector, dims: int, noise_variance: float, forgetting: float):
        prior = np.zeros((len(prior_quality), dims))
        prior[:, 0] = prior_quality
        self._events, self._due = 0, 0
        super().__init__(prior, np.ones(dims), noise_variance, forgetting)
        self._refit()

    def add(self, arm: int, x: Vector, y: float, sequence: float, weight: float = 1.0) -> None:
        """See LinearPosterior: into the sums, and at once into the arm's own mean and covariance (Sherman-Morrison)."""
        super().add(arm, x, y, sequence, weight)
        self._events += 1
        if self._events >= self._due:
            return  # the next prediction refits everything
        c = weight * self.forgetting ** (self.reference - sequence)
        spread = self.covariance[arm] @ x
        gain = c * spread / (self.noise[arm] + c * (spread @ x))
        self.mean[arm] += gain * (y - x @ self.mean[arm])
        self.covariance[arm] -= np.outer(gain, spread)

    def advance(self, sequence: float) -> None:
        """See LinearPosterior; after a fading, everything is refitted."""
        before = self.reference
        super().advance(sequence)
        if self.reference != before:
            self._due = 0

    def _refresh(self) -> None:
        if self._events >= self._due:
            self._refit()

    def _refit(self) -> None:
        """Noise, prior deviations, θ and every arm, as functions of the sums alone."""
        count = float(self.count.sum())
        self._events, self._due = 0, max(1, min(REFIT_AT_MOST, int(REFIT_EVERY * count)))
        self.deviations = (0.1, 0.1)
        noise = self.prior_noise
        for _ in range(2 if count else 0):
            _, mean, _ = self._solve_all(noise, *self.deviations)
            fit = np.einsum("kd,kde,ke->", mean, self.precision, mean)
            residual = max(float(self.squares.sum() - 2 * (mean * self.moment).sum() + fit), 0.0)
            noise = (NOISE_PRIOR * self.prior_noise + residual) / (NOISE_PRIOR + count)
            common, own = self.deviations
            own = max(DEVIATIONS, key=lambda value: self._solve_all(noise, common, value)[2])
            common = max(DEVIATIONS, key=lambda value: self._solve_all(noise, value, own)[2])
            self.deviations = (common, own)
        self.covariance, self.mean, _ = self._solve_all(noise, *self.deviations)
        self.noise = np.full(len(self.mean), noise)
        self._stale[:] = False

    def _solve_all(self, noise: float, common: float, own: float) -> tuple[Vector, Vector, float]:
        """Covariance [K, D, D] and mean [K, D] of every arm given these deviations, and their log evidence (up to a
        constant). The covariance is that of δ_k, θ being taken at its mean: it is the same for all arms, and what all
        share decides nothing between them.
        """
        arms, dims = self.prior_mean.shape
        p_own, p_common = np.full(dims, own**-2), np.full(dims, common**-2)
        p_own[0], p_common[0] = BIAS_DEVIATION**-2, COMMON_DEVIATION**-2
        moment = (self.moment - np.einsum("kde,ke->kd", self.precision, self.prior_mean)) / noise
        factor = np.linalg.cholesky(self.precision / noise + np.diag(p_own))
        inverse = np.linalg.inv(factor)
        covariance = inverse.transpose(0, 2, 1) @ inverse
        alone = np.einsum("kde,ke->kd", covariance, moment)
        theta_precision = np.diag(p_common + arms * p_own) - p_own[:, None] * covariance.sum(0) * p_own
        theta_factor = np.linalg.cholesky(theta_precision)
        said = p_own * alone.sum(0)
        theta = np.linalg.solve(theta_precision, said)
        mean = self.prior_mean + alone + np.einsum("kde,e->kd", covariance, p_own * theta)
        explained = float(said @ theta + (moment * alone).sum())
        volume = float(np.log(np.diagonal(factor, axis1=1, axis2=2)).sum() + np.log(np.diag(theta_factor)).sum())
        evidence = 0.5 * explained - volume + 0.5 * float(np.log(p_common).sum() + arms * np.log(p_own).sum())
        return covariance, mean, evidence

    def state(self) -> dict[str, Vector]:
        """See LinearPosterior; what was learned since the last refit is fitted anew, as in whoever restores it."""
        self._due = 0
        return super().state()

    def restore(self, state: dict[str, Vector]) -> None:
        """See LinearPosterior."""
        super().restore(state)
        self._due = 0
