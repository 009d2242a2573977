"""Hierarchical Bayesian linear regression for K arms, which share how hard a request is for all of them.

    y = x·w_k + noise,   w_k = m_k + θ + δ_k,   θ ~ N(0, P_θ^-1),   δ_k ~ N(0, P_δ^-1)

m_k is the prior guess of the arm, θ is common to all arms, and δ_k is the arm's own part. So an arm that is new, or
rarely chosen, starts from what was learned of the others (Gelman et al., Bayesian Data Analysis, 3rd ed., 2013, ch.
15). The evidence decides how large an arm's context weights are: the posteriors over a grid of prior deviations τ_θ,
τ_δ are averaged by their marginal likelihood (MacKay, Neural Computation 1992; Hoeting et al., Statistical Science
1999). So uninformative contexts cost little exploration, and an arm with little data keeps a wide posterior.

δ is integrated out in closed form: with M_k = P_δ + A_k/σ² and G_k = M_k^-1 P_δ, the arms' data give θ the precision
Λ = P_θ + Σ_k P_δ - P_δ G_k and h = Σ_k G_kᵀ b_k/σ². Sums, forgetting and corrections are those of posterior.py.
"""

import numpy as np

from policies.thompson.kernels import inverse
from policies.thompson.posterior import NOISE_PRIOR, LinearPosterior
from policies.types import Vector

# Grids of the prior deviations of a context weight.
OWN = (0.03, 0.08, 0.2, 0.5)  # τ_δ
COMMON = (0.05, 0.1, 0.2, 0.4)  # τ_θ
MIDDLE = 0.1  # middle of the grids, for the first fit, which only estimates the noise
BIAS_DEVIATION = 0.1  # deviation of an arm's level from the common level
COMMON_DEVIATION = 0.3  # deviation of the common level from the prior guess


class HierarchicalPosterior(LinearPosterior):
    """K Bayesian linear models over the same D features, which learn from each other; the first feature is 1.

    Args:
        prior_mean: [K, D] m_k.
        noise_variance: first guess of σ².
        forgetting: γ in (0, 1]; 1 never forgets.
    """

    def __init__(self, prior_mean: Vector, noise_variance: float, forgetting: float):
        dims = prior_mean.shape[1]
        middle = np.full(dims, 2 * MIDDLE**2)
        middle[0] = BIAS_DEVIATION**2 + COMMON_DEVIATION**2
        super().__init__(prior_mean, 1 / middle, noise_variance, forgetting)
        grids = np.tile(np.array([OWN, COMMON])[:, :, None], dims)
        self._own, self._common = grids**-2.0  # [G, D] diagonals of P_δ and P_θ
        self._own[:, 0] = BIAS_DEVIATION**-2
        self._common[:, 0] = COMMON_DEVIATION**-2
        self._due = 0

    def _refit(self) -> None:
        """Refit mean, covariance and noise from the sums. The covariance is that of δ_k, with θ fixed at its mean.

        This leaves out θ's own variance, which adds G_k Λ^-1 G_kᵀ to that of w_k. It is an approximation: an arm
        without data (G = 1) has more of that variance than a known arm (G near 0). So the difference of two such arms
        is too certain: in an example of two arms its deviation is 0.17 instead of 0.21.
        """
        self._due = self._interval()
        residual = float(self._residual().sum())
        count = float(self.count.sum())
        noise = (NOISE_PRIOR * self.prior_noise + residual) / (NOISE_PRIOR + count)
        self.mean, self.covariance = self._fit(noise)
        self.noise = np.full(len(self.mean), noise)

    def _fit(self, noise: float) -> tuple[Vector, Vector]:
        """Mean [K, D] and covariance [K, D, D] of every arm at this σ²; `weights` [G, G] are those of the grid."""
        arms, dims = self.prior_mean.shape
        own = self._own
        eye = np.eye(dims)
        moment = (
            self.moment - (self.precision @ self.prior_mean[:, :, None])[:, :, 0]
        ) / noise
        # [G, K, D, D] M_k
        precision = self.precision / noise + own[:, None, :, None] * eye
        covariance, half_log_det = inverse(precision)
        # [G, K, D] δ_k if θ were 0
        alone = (covariance @ moment[:, :, None])[..., 0]
        h = own * alone.sum(1)  # [G, D]
        theta_precision = (
            arms * own[:, :, None] * eye
            - own[:, :, None] * covariance.sum(1) * own[:, None]
        )
        # [G, G, D, D] Λ
        theta_precision = theta_precision[:, None] + self._common[:, :, None] * eye
        theta_covariance, theta_half_log_det = inverse(theta_precision)
        theta = (theta_covariance @ h[:, None, :, None])[..., 0]  # [G, G, D]

        evidence = 0.5 * (
            (moment * alone).sum((1, 2)) + arms * np.log(own).sum(1)
        ) - half_log_det.sum(1)
        explained = (h[:, None] * theta).sum(2) + np.log(self._common).sum(1)
        evidence = evidence[:, None] + 0.5 * explained - theta_half_log_det
        weights = np.exp(evidence - evidence.max())
        self.weights = weights / weights.sum()

        # [G, G, K, D, 1]
        shared = covariance[:, None] @ (own[:, None] * theta)[:, :, None, :, None]
        means = alone[:, None] + shared[..., 0]
        mean = np.tensordot(self.weights, means, 2)
        # [K, D, G·G]
        between = (means - mean).reshape(-1, arms, dims).transpose(1, 2, 0)
        within = np.tensordot(self.weights.sum(1), covariance, 1)
        return self.prior_mean + mean, within + (
            between * self.weights.ravel()
        ) @ between.transpose(0, 2, 1)
