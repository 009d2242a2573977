"""The hierarchical posterior, in which arms learn from each other."""

import numpy as np
import pytest

from policies.thompson.hierarchical_posterior import (
    BIAS_DEVIATION,
    COMMON,
    COMMON_DEVIATION,
    OWN,
    HierarchicalPosterior,
)
from policies.types import Vector

K = 3
D = 5
N = 300
G = len(OWN)


def level(scores: list[float]) -> Vector:
    """[K, D] prior means that expect these scores whatever the context."""
    prior = np.zeros((len(scores), D))
    prior[:, 0] = scores
    return prior


def observe(
    posterior: HierarchicalPosterior,
    weights: Vector,
    arms: range,
    noise: float = 0.2,
    n: int = N,
) -> None:
    """N events of these arms, whose true weights are given [K, D]."""
    rng = np.random.default_rng(3)
    for i in range(n):
        k = int(rng.choice(arms))
        x = np.concatenate([[1.0], rng.normal(size=D - 1)])
        posterior.add(k, x, float(x @ weights[k] + noise * rng.normal()), i)


def test_posterior_equals_that_of_the_joint_model() -> None:
    """θ and all δ_k in one Gaussian of (K + 1) D dimensions, solved densely for each prior, give the same means, and
    the grid's weights are their marginal likelihoods.
    """
    posterior = HierarchicalPosterior(level([0.4, 0.5, 0.6]), 0.04, 1.0)
    observe(posterior, np.random.default_rng(1).normal(size=(K, D)), range(K - 1))
    posterior.state()  # `state` makes the next prediction refit
    posterior.predict(np.ones((1, D)))
    noise = float(posterior.noise[0])
    a = posterior.precision
    moments = posterior.moment - np.einsum("kde,ke->kd", a, posterior.prior_mean)
    picks = [
        np.hstack([np.eye(D), *(np.eye(D) * (j == k) for j in range(K))])
        for k in range(K)
    ]  # w_k - m_k
    seen = sum(pick.T @ a[k] @ pick for k, pick in enumerate(picks)) / noise
    moment = sum(pick.T @ moments[k] for k, pick in enumerate(picks)) / noise
    joint = np.zeros((G, G, len(moment)))
    evidence = np.zeros((G, G))
    for g, own in enumerate(OWN):
        for h, common in enumerate(COMMON):
            prior = np.concatenate(
                [np.full(D, common**-2), np.tile(np.full(D, own**-2), K)]
            )
            prior[0] = COMMON_DEVIATION**-2
            prior[D::D] = BIAS_DEVIATION**-2
            joint[g, h] = np.linalg.solve(seen + np.diag(prior), moment)
            volumes = np.log(prior).sum() - np.linalg.slogdet(seen + np.diag(prior))[1]
            evidence[g, h] = 0.5 * (moment @ joint[g, h] + volumes)
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    assert posterior.weights == pytest.approx(weights, abs=1e-6)
    for k, pick in enumerate(picks):
        mean = np.tensordot(weights, joint @ pick.T, 2)
        assert posterior.mean[k] == pytest.approx(
            posterior.prior_mean[k] + mean, abs=1e-6
        )


def test_a_new_arm_starts_from_what_the_others_have_shown() -> None:
    """If a kind of request is hard for two arms, a third arm without data is expected to find it hard too."""
    posterior = HierarchicalPosterior(level([0.5] * K), 0.1, 1.0)
    observe(posterior, np.tile([0.5, 0.4, 0.0, 0.0, 0.0], (K, 1)), range(K - 1))
    easy, hard = np.array([[1.0, 1, 0, 0, 0], [1.0, -1, 0, 0, 0]])
    mean, variance = posterior.predict(np.stack([easy, hard]))
    assert mean[0, 2] > mean[1, 2] + 0.5
    assert (variance[:, 2] > 3 * variance[:, 0]).all()


def test_uninformative_contexts_cost_no_exploration() -> None:
    """The evidence decides the prior deviation of the context weights."""
    blind, telling = (
        HierarchicalPosterior(level([0.5] * K), 0.1, 1.0) for _ in range(2)
    )
    observe(blind, np.tile([0.5, 0.0, 0.0, 0.0, 0.0], (K, 1)), range(K))
    observe(
        telling,
        np.array(
            [[0.5, 0.4, -0.3, 0, 0], [0.5, -0.4, 0.3, 0, 0], [0.5, 0, 0, 0.4, 0.4]]
        ),
        range(K),
    )
    x = np.array([[1.0, 1.0, 1.0, 1.0, 1.0]])
    for posterior in (blind, telling):
        posterior.state()
    assert blind.predict(x)[1].max() < telling.predict(x)[1].max()
    deviation = [float(p.weights.sum(1) @ np.array(OWN)) for p in (blind, telling)]
    assert deviation[0] < deviation[1]


def test_between_refits_the_chosen_arm_is_up_to_date() -> None:
    """One more event moves its own arm's mean towards it at once, without a refit of all."""
    posterior = HierarchicalPosterior(level([0.5] * K), 0.1, 1.0)
    observe(posterior, np.tile([0.5, 0.0, 0.0, 0.0, 0.0], (K, 1)), range(K))
    x = np.array([1.0, 2.0, 0.0, 0.0, 0.0])
    before = posterior.predict(x[None])
    posterior.add(1, x, 1.5, N)
    after = posterior.predict(x[None])
    assert after[0][0, 1] > before[0][0, 1] and after[1][0, 1] < before[1][0, 1]
    assert after[0][0, 0] == before[0][0, 0]
