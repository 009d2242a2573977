"""The Bayesian linear models, against arithmetic done by hand and by other means."""

import numpy as np
import pytest

from policies.thompson.posterior import NOISE_PRIOR, LinearPosterior


def make(dims: int = 2, arms: int = 2, forgetting: float = 1.0) -> LinearPosterior:
    return LinearPosterior(np.zeros((arms, dims)), np.ones(dims), 1.0, forgetting)


def test_one_event_gives_the_posterior_computed_by_hand() -> None:
    """Prior N(0, 1) on one weight, x = 1, y = 1: with noise variance σ² the mean is 1 / (1 + σ²)."""
    posterior = make(dims=1)
    posterior.add(0, np.array([1.0]), 1.0, sequence=0)
    mean, variance = posterior.predict(np.array([[1.0]]))
    # under the first guess σ² = 1 the mean is 1/2, so the residual is 1/4, and σ² = (10 + 1/4) / 11
    noise = (NOISE_PRIOR + 0.25) / (NOISE_PRIOR + 1)
    assert mean[0, 0] == pytest.approx(1 / (1 + noise))
    assert variance[0, 0] == pytest.approx(1 / (1 + 1 / noise))
    assert mean[0, 1] == 0.0 and variance[0, 1] == pytest.approx(1.0)


def test_many_events_equal_ridge_regression(rng: np.random.Generator) -> None:
    """The mean is the ridge solution with penalty σ² · P0."""
    posterior = make(dims=3)
    x = rng.standard_normal((200, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.1 * rng.standard_normal(200)
    for row, value in zip(x, y, strict=True):
        posterior.add(1, row, value, sequence=0)
    posterior.state()  # `state` makes the next prediction refit
    posterior.predict(x[:1])
    ridge = np.linalg.solve(x.T @ x + posterior.noise[1] * np.eye(3), x.T @ y)
    assert np.allclose(posterior.mean[1], ridge)
    assert posterior.noise[1] == pytest.approx(
        (NOISE_PRIOR + np.sum((y - x @ ridge) ** 2)) / 210, rel=0.01
    )


def test_events_commute_though_old_ones_fade(rng: np.random.Generator) -> None:
    """Any order of arrival gives the same sums, because the age of the decision counts."""
    events = [
        (int(rng.integers(2)), rng.standard_normal(2), float(rng.random()), n)
        for n in range(300)
    ]
    one = make(forgetting=0.99)
    other = make(forgetting=0.99)
    for arm, x, y, n in events:
        one.advance(n)
        one.add(arm, x, y, n)
    one.advance(1000)
    other.advance(1000)
    for i in rng.permutation(len(events)):
        other.add(*events[i])
    for name, sums in one.state().items():
        assert np.allclose(sums, other.state()[name], rtol=1e-9, atol=1e-12), name


def test_a_withdrawn_event_leaves_no_trace(rng: np.random.Generator) -> None:
    """A correction replaces the first version exactly."""
    posterior = make()
    x = rng.standard_normal(2)
    posterior.add(0, rng.standard_normal(2), 0.3, 0)
    before = posterior.state()
    posterior.add(0, x, 1.0, 5)
    posterior.add(0, x, 1.0, 5, weight=-1.0)
    for name, sums in posterior.state().items():
        assert name == "latest" or np.allclose(sums, before[name], atol=1e-12)


def test_withdrawing_more_than_was_added_does_no_lasting_harm(
    rng: np.random.Generator,
) -> None:
    """It is mended at the next fit: what is left is a posterior, and learns."""
    posterior = make(dims=3)
    x = np.array([0.0, 3.0, 0.0])
    for _ in range(40):
        posterior.add(0, np.array([1.0, 0.0, 0.0]), 1.0, 0)
        posterior.add(0, x, 1.0, 0, weight=-1.0)
    posterior.state()  # the next prediction is a fresh fit
    mean, variance = posterior.predict(np.eye(3))
    assert (
        np.isfinite(mean).all()
        and (variance > 0).all()
        and (variance <= 1 + 1e-9).all()
    )
    assert mean[0, 0] > 0.5 and variance[1, 0] == pytest.approx(1.0)
    for _ in range(50):
        posterior.add(0, x, 0.9, 0)
    mean, variance = posterior.predict(np.eye(3))
    assert variance[1, 0] < 0.01


def test_an_old_event_weighs_less() -> None:
    """With γ = 0.99 an event of 100 decisions ago counts for 0.99^100."""
    posterior = make(forgetting=0.99)
    posterior.add(0, np.array([1.0, 0.0]), 1.0, sequence=0)
    posterior.advance(100)
    assert posterior.state()["count"][0] == pytest.approx(0.99**100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moment": np.zeros((2, 5))}, "shape"),
        ({"squares": np.array([np.nan, 0.0])}, "finite"),
        ({"precision": np.arange(8.0).reshape(2, 2, 2)}, "symmetric"),
    ],
)
def test_a_broken_state_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    """Wrong shapes, numbers that are not finite and asymmetric matrices are named in the message."""
    posterior = make()
    with pytest.raises(ValueError, match=message):
        posterior.restore({**posterior.state(), **change})


def test_forgetting_outside_its_range_is_refused() -> None:
    """The message names the value and the range."""
    with pytest.raises(
        ValueError, match=r"forgetting is 1.5; choose a value in \(0, 1\]"
    ):
        make(forgetting=1.5)
