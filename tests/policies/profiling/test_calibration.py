"""Calibrated probabilities and their reliability."""

import numpy as np
import pytest

from policies.profiling.calibration import (
    Labelled,
    fit_arms,
    fit_platt,
    reliability,
    sigmoid,
)

N = 600
D = 5
K = 3


@pytest.fixture
def data(rng: np.random.Generator) -> Labelled:
    x = rng.standard_normal((N, D))
    arm = rng.integers(0, K, N)
    weights = rng.standard_normal(D) + 0.5 * rng.standard_normal((K, D))
    y = (rng.random(N) < sigmoid((x * weights[arm]).sum(axis=1))).astype(float)
    return Labelled(x, arm, y, rng.uniform(0.2, 1.0, N))


def test_the_fit_of_all_arms_equals_one_logistic_regression(
    data: Labelled, rng: np.random.Generator
) -> None:
    """The fit finds the maximum that Newton's method finds on all (K + 1) D weights at once, with the same prior."""
    centre = rng.standard_normal(D)
    mean = rng.standard_normal((K, D))
    shared = np.full(D, 1.5)
    own = np.full(D, 4.0)
    w0, weights = fit_arms(data, centre, shared, mean, own)
    design = np.hstack([data.x, *(data.x * (data.arm == k)[:, None] for k in range(K))])
    prior = np.concatenate([centre, mean.ravel()])
    precision = np.concatenate([shared, np.tile(own, K)])
    w = prior.copy()
    for _ in range(100):
        p = sigmoid(design @ w)
        curve = data.weight * p * (1 - p)
        hessian = (design * curve[:, None]).T @ design + np.diag(precision)
        w = w + 0.5 * np.linalg.solve(
            hessian, design.T @ (data.weight * (data.y - p)) - precision * (w - prior)
        )
    assert w0 == pytest.approx(w[:D], abs=1e-4)
    assert weights - w0 == pytest.approx(w[D:].reshape(K, D), abs=1e-4)


def test_without_answers_the_fit_is_the_prior(rng: np.random.Generator) -> None:
    """The weights equal the prior's exactly."""
    centre = rng.standard_normal(D)
    mean = rng.standard_normal((K, D))
    nothing = Labelled(
        np.zeros((0, D)), np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0)
    )
    w0, weights = fit_arms(nothing, centre, np.ones(D), mean, np.ones(D))
    assert w0 == pytest.approx(centre) and weights == pytest.approx(centre + mean)


def test_separable_answers_give_finite_weights() -> None:
    """If one large feature predicts every answer, the weights stay finite."""
    x = np.where(np.arange(N)[:, None] % 2, 50.0, -50.0) * np.ones((1, D))
    divided = Labelled(
        x, np.arange(N) % K, (np.arange(N) % 2).astype(float), np.ones(N)
    )
    _, weights = fit_arms(
        divided, np.zeros(D), np.ones(D), np.zeros((K, D)), np.ones(D)
    )
    assert np.isfinite(weights).all() and (sigmoid(x[1] @ weights.T) > 0.9).all()


def test_platt_scaling_corrects_overconfidence(rng: np.random.Generator) -> None:
    """One arm's log-odds are three times too large and another's are right: both are right after the scaling."""
    true = 1.5 * rng.standard_normal(4000)
    arm = np.arange(4000) % 2
    y = (rng.random(4000) < sigmoid(true)).astype(float)
    said = np.where(arm == 0, 3 * true, true)
    _, platt = fit_platt(
        Labelled(np.zeros((4000, 1)), arm, y, np.ones(4000)), said, 2, 4.0
    )
    assert platt[0, 0] == pytest.approx(1 / 3, abs=0.07) and platt[
        1, 0
    ] == pytest.approx(1.0, abs=0.15)
    before = reliability(sigmoid(said), y)
    after = reliability(sigmoid(said * platt[arm, 0] + platt[arm, 1]), y)
    assert after.ece < before.ece / 2 and after.brier < before.brier


def test_platt_scaling_never_reverses_an_order(
    rng: np.random.Generator,
) -> None:
    """Even if the answers contradict the log-odds, a higher prediction never becomes a lower one."""
    said = rng.standard_normal(500)
    y = (rng.random(500) < sigmoid(-2 * said)).astype(float)
    shared, platt = fit_platt(
        Labelled(np.zeros((500, 1)), np.zeros(500, dtype=np.int64), y, np.ones(500)),
        said,
        1,
        4.0,
    )
    assert shared[0] == platt[0, 0] == 0.0


def test_reliability_follows_its_definition() -> None:
    """One success in four at 0.25 is reliable; none at 0.9 is off by 0.9; a bin has the weight of its answers."""
    said = np.array([0.25, 0.25, 0.25, 0.25, 0.9, 0.9, 0.9, 1.0])
    seen = np.array([1, 0, 0, 0, 0, 0, 0, 1.0])
    found = reliability(said, seen)
    assert found.count == 8
    assert found.brier == pytest.approx((0.75**2 + 3 * 0.25**2 + 3 * 0.81) / 8)
    assert found.ece == pytest.approx(
        (4 * 0.0 + 4 * abs((3 * 0.9 + 1.0) / 4 - 0.25)) / 8
    )
    assert found.table[2].tolist() == [0.25, 0.25, 4] and found.table[
        9
    ].tolist() == pytest.approx([0.925, 0.25, 4])
    assert reliability(np.zeros(0), np.zeros(0)).count == 0
