"""Forecasts of length and sufficiency, learned from finished requests, and their reliability."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from policies.events import Decision, Outcome, Record
from policies.profiling.calibration import reliability, sigmoid
from policies.profiling.features import D
from policies.profiling.forecast import ENOUGH, Forecaster, usual_tokens
from policies.types import Arm, Objective, TaskProfile, Vector
from tests.support.requests import make_profile

ARMS = (
    Arm("small", prior_quality=0.5),
    Arm("large", prior_quality=0.5),
    Arm("embedder", tasks=("embed",)),
)
WEIGHTS = {
    "small": np.array([-1.0, 6.0, -3.0]),
    "large": np.array([1.0, -2.0, 3.0]),
}  # of features 0, 1, 2
LENGTH = np.array([0.5, 2.0])  # of log tokens beyond the usual, on features 0 and 1

Truth = Callable[[str, Vector], float]


def suffices(arm: str, x: Vector) -> float:
    return float(sigmoid(x[:3] @ WEIGHTS[arm]))


def world(
    count: int, seed: int, truth: Truth = suffices, limit: int = 0, start: int = 0
) -> list[Record]:
    """Finished requests, answered by a random arm; an answer longer than the limit is cut off."""
    rng = np.random.default_rng(seed)
    records = []
    for n in range(start, start + count):
        x = np.zeros(D)
        x[0] = 1.0
        x[1:10] = rng.uniform(-0.7, 0.7, 9)
        arm = ("small", "large")[rng.integers(2)]
        profile = TaskProfile(x, "chat", "question", 20, limit)
        tokens = int(
            np.exp(
                np.log1p(usual_tokens("question"))
                + x[:2] @ LENGTH
                + 0.3 * rng.standard_normal()
            )
        )
        cut = bool(limit) and tokens > limit
        outcome = Outcome(
            str(n),
            output_tokens=limit if cut else tokens,
            finish_reason="length" if cut else "stop",
        )
        score = float(rng.random() < truth(arm, x))
        records.append(
            Record(
                Decision(str(n), arm, n, "", profile, Objective()),
                outcome,
                {"user": score},
            )
        )
    return records


def predicted(forecaster: Forecaster, records: list[Record]) -> tuple[Vector, Vector]:
    """The predicted probabilities for these answers, and whether the answers sufficed."""
    profiles = forecaster.complete([record.decision.profile for record in records])
    said = [
        p.sufficiency[r.decision.arm] for p, r in zip(profiles, records, strict=True)
    ]
    return np.array(said), np.array([record.scores["user"] for record in records])


@pytest.mark.parametrize("seed", range(5))
def test_forecasts_are_better_than_the_prior_and_than_each_arms_mean(seed: int) -> None:
    """On 3,000 new requests after 2,000 the Brier score is near the best possible one, and the calibration error is
    below 0.05.
    """
    fitted = Forecaster.prior(ARMS).refit(world(2000, seed))
    new = world(3000, 100 + seed)
    said, seen = predicted(fitted, new)
    found = reliability(said, seen)
    best = np.mean(
        [
            (suffices(r.decision.arm, r.decision.profile.features) - r.scores["user"])
            ** 2
            for r in new
        ]
    )
    prior = reliability(*predicted(Forecaster.prior(ARMS), new))
    assert found.brier < best + 0.015 < prior.brier - 0.03
    assert found.brier < fitted.reliability()["brier_by_arm"] - 0.03
    assert found.ece < 0.05


@pytest.mark.parametrize("count", [120, 1500])
def test_the_reported_reliability_is_that_of_new_answers(count: int) -> None:
    """With features that predict nothing, the reported Brier score equals that on new requests."""
    reported = []
    true = []
    for seed in range(10):
        fitted = Forecaster.prior(ARMS).refit(world(count, seed, lambda arm, x: 0.5))
        reported.append(fitted.reliability()["brier"])
        true.append(
            reliability(
                *predicted(fitted, world(2000, 50 + seed, lambda arm, x: 0.5))
            ).brier
        )
    assert np.mean(reported) >= np.mean(true) - 0.005 >= 0.24


def test_forecasts_follow_an_arm_that_gets_worse() -> None:
    """After `large` breaks, its answers are predicted to fail, although most of the log says otherwise."""
    good = world(3000, 1, lambda arm, x: 0.9)
    bad = world(2500, 2, lambda arm, x: 0.1 if arm == "large" else 0.9, start=3000)
    (profile,) = (
        Forecaster.prior(ARMS).refit(good + bad).complete([bad[0].decision.profile])
    )
    assert profile.sufficiency["large"] < 0.35 and profile.sufficiency["small"] > 0.8


def test_expected_output_tokens_are_learned() -> None:
    """On new requests the error is half of the table's, and the mean is right."""
    fitted = Forecaster.prior(ARMS).refit(world(1500, 3))
    new = world(2000, 4)
    tokens = np.array([float(r.outcome.output_tokens) for r in new if r.outcome])
    expected = np.array(
        [
            p.expected_output_tokens
            for p in fitted.complete([r.decision.profile for r in new])
        ]
    )
    off, before = (
        np.sqrt(np.mean(np.log(t / tokens) ** 2))
        for t in (expected, usual_tokens("question"))
    )
    assert off < before / 2 and expected.mean() == pytest.approx(tokens.mean(), rel=0.1)
    figures = fitted.reliability()
    assert (
        figures["tokens_error"] == pytest.approx(off, rel=0.15)
        and figures["tokens_error_by_kind"] > 1.5 * off
    )


def test_answers_that_were_cut_off_count_as_longer() -> None:
    """With a third of all answers cut off, the expected length without a limit is right within a tenth."""
    records = world(2000, 5, limit=250)
    assert (
        0.2
        < np.mean([r.outcome.finish_reason == "length" for r in records if r.outcome])
        < 0.5
    )
    fitted = Forecaster.prior(ARMS).refit(records)
    free = world(2000, 6)
    true = np.mean([r.outcome.output_tokens for r in free if r.outcome])
    expected = fitted.complete([r.decision.profile for r in free])
    assert np.mean([p.expected_output_tokens for p in expected]) == pytest.approx(
        true, rel=0.1
    )
    assert (
        max(
            p.expected_output_tokens
            for p in fitted.complete([records[0].decision.profile])
        )
        <= 250
    )


def test_only_arms_that_do_the_task_get_a_forecast() -> None:
    """A chat gets no forecast for an embedder, and the features for the policies stay as they were."""
    profile = make_profile()
    (found,) = Forecaster.prior(ARMS).complete([profile])
    assert set(found.sufficiency) == {"small", "large"} and found.profiler_version == 0
    assert (
        found.output_tokens
        == profile.output_tokens
        == pytest.approx(found.expected_output_tokens)
    )
    assert found.features is profile.features


def test_with_few_answers_the_settings_of_the_operator_apply() -> None:
    """Below ENOUGH answers the forecast is the table and prior_quality; answers without a score teach lengths only."""
    arms = (Arm("small", prior_quality=0.3), Arm("large", prior_quality=0.8))
    prior = Forecaster.prior(arms)
    assert prior.refit(world(ENOUGH // 2, 0)) is prior
    (profile,) = prior.complete([make_profile()])
    assert profile.sufficiency == pytest.approx({"small": 0.3, "large": 0.8}, abs=1e-3)
    unscored = prior.refit([replace(record, scores={}) for record in world(300, 0)])
    assert unscored.version == 1 and unscored.lengths.any()
    assert unscored.complete([make_profile()])[0].sufficiency == profile.sufficiency


def test_a_short_log_does_not_replace_a_long_one() -> None:
    """A published fit of 2,000 answers stays until this log has half of their weight."""
    published = Forecaster.prior(ARMS).refit(world(2000, 7))
    assert published.refit(world(200, 8)) is published
    assert published.refit(world(1200, 8)).version == 2


def test_forecasts_keep_learning_when_scores_become_rare() -> None:
    """From all scores to a fifth between two fits, while one arm breaks: the age of a score counts in scores."""
    dense = world(3000, 13, lambda arm, x: 0.9)
    sparse = world(5000, 14, lambda arm, x: 0.1 if arm == "large" else 0.9, start=3000)
    sparse = [
        record if n % 5 == 0 else replace(record, scores={})
        for n, record in enumerate(sparse)
    ]
    first = Forecaster.prior(ARMS).refit(dense)
    fitted = first.refit(dense + sparse)
    assert fitted.version == first.version + 1
    (profile,) = fitted.complete([dense[0].decision.profile])
    assert profile.sufficiency["large"] < 0.5 < 0.8 < profile.sufficiency["small"]


def test_an_error_counts_as_insufficient_and_a_disconnect_does_not() -> None:
    """The forecasts treat both as the policy does."""
    records = world(400, 9, lambda arm, x: 1.0)
    failed = [
        replace(r, outcome=Outcome(r.decision.id, "error"), scores={})
        if r.decision.arm == "small"
        else r
        for r in records
    ]
    left = [
        replace(r, outcome=Outcome(r.decision.id, "disconnected"), scores={})
        for r in records
    ]
    (profile,) = (
        Forecaster.prior(ARMS).refit(failed).complete([records[0].decision.profile])
    )
    assert profile.sufficiency["small"] < 0.1 and profile.sufficiency["large"] > 0.9
    prior = Forecaster.prior(ARMS)
    assert prior.refit(left) is prior


def test_arms_that_stay_keep_their_forecasts_and_new_ones_start_from_the_shared_weights() -> (
    None
):
    """The order of the arms does not matter."""
    both = world(3000, 10, lambda arm, x: float(sigmoid(np.array([4 * x[1]]))[0]))
    fitted = Forecaster.prior(ARMS).refit(both)
    after = fitted.for_arms((Arm("new"), ARMS[1]))
    x = np.zeros((2, D))
    x[:, 0] = 1.0
    x[:, 1] = (-0.7, 0.7)
    usual = np.full(2, 100.0)
    assert after.predict(x, usual)[1][:, 1] == pytest.approx(
        fitted.predict(x, usual)[1][:, 1]
    )
    new = after.predict(x, usual)[1][:, 0]
    assert new[0] < 0.35 and new[1] > 0.65


def test_a_forecaster_is_restored_from_its_state() -> None:
    """Figures, version and forecasts are the same."""
    fitted = Forecaster.prior(ARMS).refit(world(500, 11))
    twin = Forecaster.restored(fitted.state(), ARMS)
    profiles = [record.decision.profile for record in world(50, 12)]
    one = fitted.complete(profiles)
    other = twin.complete(profiles)
    assert [p.sufficiency for p in one] == [p.sufficiency for p in other]
    assert [p.expected_output_tokens for p in one] == [
        p.expected_output_tokens for p in other
    ]
    assert twin.reliability() == fitted.reliability() and twin.version == 1


@pytest.mark.parametrize("name", Forecaster.prior(ARMS).state())
def test_arrays_that_do_not_fit_are_refused(name: str) -> None:
    """An array that is missing, has another shape or is not finite is refused; the message names the array."""
    state = Forecaster.prior(ARMS).state()
    broken = state[name].copy()
    broken.flat[0] = np.nan
    for bad in (
        {k: v for k, v in state.items() if k != name},
        state | {name: np.ones(77)},
        state | {name: broken},
    ):
        with pytest.raises(ValueError, match=f"'{name}'"):
            Forecaster.restored(bad, ARMS)
