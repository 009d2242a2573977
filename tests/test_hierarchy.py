"""Arms that learn from each other."""

import numpy as np
import pytest

from policies.hierarchy import BIAS_DEVIATION, COMMON_DEVIATION, HierarchicalPosterior
from policies.types import Vector

K, D, N = 3, 5, 300


def observe(posterior: HierarchicalPosterior, weights: Vector, arms: range, noise: float = 0.2, n: int = N) -> None:
    """N events of these arms, whose true weights are given [K, D]."""
    rng = np.random.default_rng(3)
    for i in range(n):
        k, x = int(rng.choice(arms)), np.concatenate([[1.0], rng.normal(size=D - 1)])
        posterior.add(k, x, float(x @ weights[k] + noise * rng.normal()), i)


def test_it_is_the_posterior_of_the_joint_model() -> None:
    """θ and all δ_k in one Gaussian of (K + 1) D dimensions, solved densely, give the same means."""
    posterior = HierarchicalPosterior(np.array([0.4, 0.5, 0.6]), D, 0.04, 1.0)
    observe(posterior, np.random.default_rng(1).normal(size=(K, D)), range(K - 1))
    posterior.state()  # whoever asks for the state gets a fresh fit
    posterior.predict(np.ones((1, D)))
    common, own = posterior.deviations
    prior = np.concatenate([np.full(D, common**-2), np.tile(np.full(D, own**-2), K)])
    prior[0], prior[D::D] = COMMON_DEVIATION**-2, BIAS_DEVIATION**-2
    picks = [np.hstack([np.eye(D), *(np.eye(D) * (j == k) for j in range(K))]) for k in range(K)]  # w_k - m_k
    precision, moment = np.diag(prior), np.zeros(len(prior))
    for k, pick in enumerate(picks):
        precision += pick.T @ posterior.precision[k] @ pick / posterior.noise[k]
        moment += pick.T @ (posterior.moment[k] - posterior.precision[k] @ posterior.prior_mean[k]) / posterior.noise[k]
    joint = np.linalg.solve(precision, moment)
    for k, pick in enumerate(picks):
        assert posterior.mean[k] == pytest.approx(posterior.prior_mean[k] + pick @ joint, abs=1e-8)


def test_a_new_arm_starts_from_what_the_others_have_shown() -> None:
    """Two arms for which a request of some sort is hard make it likely to be hard for the third."""
    posterior = HierarchicalPosterior(np.full(K, 0.5), D, 0.1, 1.0)
    observe(posterior, np.tile([0.5, 0.4, 0.0, 0.0, 0.0], (K, 1)), range(K - 1))
    easy, hard = np.array([[1.0, 1, 0, 0, 0], [1.0, -1, 0, 0, 0]])
    mean, variance = posterior.predict(np.stack([easy, hard]))
    assert mean[0, 2] > mean[1, 2] + 0.5
    assert (variance[:, 2] > 3 * variance[:, 0]).all()


def test_contexts_that_tell_nothing_cost_no_exploration() -> None:
    """The prior deviation of context weights is what the evidence says it is."""
    blind, telling = (HierarchicalPosterior(np.full(K, 0.5), D, 0.1, 1.0) for _ in range(2))
    observe(blind, np.tile([0.5, 0.0, 0.0, 0.0, 0.0], (K, 1)), range(K))
    observe(telling, np.array([[0.5, 0.4, -0.3, 0, 0], [0.5, -0.4, 0.3, 0, 0], [0.5, 0, 0, 0.4, 0.4]]), range(K))
    x = np.array([[1.0, 1.0, 1.0, 1.0, 1.0]])
    for posterior in (blind, telling):
        posterior.state()
    assert blind.predict(x)[1].max() < telling.predict(x)[1].max()
    assert blind.deviations[1] < telling.deviations[1]


def test_between_refits_the_chosen_arm_is_up_to_date() -> None:
    """One more event moves its own arm's mean towards it at once, without a refit of all."""
    posterior = HierarchicalPosterior(np.full(K, 0.5), D, 0.1, 1.0)
    observe(posterior, np.tile([0.5, 0.0, 0.0, 0.0, 0.0], (K, 1)), range(K))
    x = np.array([1.0, 2.0, 0.0, 0.0, 0.0])
    before = posterior.predict(x[None])
    posterior.add(1, x, 1.5, N)
    after = posterior.predict(x[None])
    assert after[0][0, 1] > before[0][0, 1] and after[1][0, 1] < before[1][0, 1]
    assert after[0][0, 0] == before[0][0, 0]
