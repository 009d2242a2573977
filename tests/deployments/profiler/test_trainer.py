"""Forecasts of answers: fitted from the journal, versioned with the policy, replaced without a restart."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.journal.journal import Journal
from deployments.journal.snapshot import Snapshot
from deployments.profiler import deployment, trainer
from deployments.profiler.trainer import ForecastTrainer
from deployments.router.actor import Router
from deployments.tracking.version_files import load_policy, save_policy
from policies.events import Decision, Feedback, Outcome
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile

ARMS = (Arm("small"), Arm("large"))
CHATS = 60


def add_requests(
    journal: Journal, first: int, count: int, good: str, owner: str = ""
) -> None:
    """Write finished requests of a key to the journal. The arms take turns; only answers of `good` suffice."""
    for n in range(first, first + count):
        arm = ARMS[n % 2].name
        journal.put(
            Decision(
                f"d{n}",
                arm,
                n,
                "",
                make_profile(f"What is {n} plus {n * 7}?"),
                Objective(),
                owner=owner,
            )
        )
        journal.put(Outcome(f"d{n}", output_tokens=5))
        journal.put(Feedback(f"d{n}", float(arm == good), owner=owner))
    asyncio.run(journal.flush())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(f"sqlite:///{tmp_path}/journal.db")


def sufficiency(forecast_trainer: ForecastTrainer) -> Any:
    return forecast_trainer.forecaster.complete([make_profile()])[0].sufficiency


def test_trainer_fits_after_enough_new_rows(journal: Journal) -> None:
    """No fit before that, and no second fit until there are more rows."""
    trained = ForecastTrainer(ARMS, journal)
    add_requests(journal, 0, 150, "large")
    assert not asyncio.run(trained.run_once()) and trained.forecaster.version == 0
    add_requests(journal, 150, 50, "large")
    assert asyncio.run(trained.run_once()) and trained.forecaster.version == 1
    assert sufficiency(trained)["large"] > 0.9 and sufficiency(trained)["small"] < 0.1
    assert not asyncio.run(trained.run_once())
    add_requests(journal, 200, 1400, "small")
    assert asyncio.run(trained.run_once()) and trained.forecaster.version == 2
    assert sufficiency(trained)["small"] > sufficiency(trained)["large"]


def test_trainer_pauses_after_a_fit(journal: Journal) -> None:
    trained = ForecastTrainer(ARMS, journal, cooldown_factor=1e6)
    for start in (0, 200):
        add_requests(journal, start, 200, "large")
        assert asyncio.run(trained.run_once()) is (start == 0)


def test_trainer_counts_a_corrected_score_once(journal: Journal) -> None:
    """The last score counts, even if decision and correction were read in different runs."""
    trained = ForecastTrainer(ARMS, journal)
    add_requests(journal, 0, 300, "large")
    assert asyncio.run(trained.run_once())
    for n in range(300):
        journal.put(Feedback(f"d{n}", 1.0, time_s=1.0))
    add_requests(journal, 300, 200, "none")
    for n in range(300, 500):
        journal.put(Feedback(f"d{n}", 1.0, time_s=1.0))
    asyncio.run(journal.flush())
    assert asyncio.run(trained.run_once())
    assert min(sufficiency(trained).values()) > 0.9
    assert (
        trained.forecaster.reliability()["scored"] == 450
    )  # nine of ten blocks of 500


async def test_trainer_counts_a_score_that_stands_before_its_decision(
    journal: Journal,
) -> None:
    """A prompt client's score reaches the journal before the decision that an ingress made by itself."""
    for n in range(250):
        events = [
            Feedback(f"d{n}", float(n % 2)),
            Decision(f"d{n}", ARMS[n % 2].name, n, "", make_profile(), Objective()),
            Outcome(f"d{n}", output_tokens=5),
        ]
        for event in events:
            journal.put(event)
    await journal.flush()
    trained = ForecastTrainer(ARMS, journal)
    assert await trained.run_once()
    # nine of ten blocks of all 250
    assert trained.forecaster.reliability()["scored"] == 225
    assert (
        sufficiency(trained)[ARMS[1].name]
        > 0.9
        > 0.1
        > sufficiency(trained)[ARMS[0].name]
    )


async def test_the_errors_of_forecasts_that_are_not_fitted_are_unknown(
    journal: Journal,
) -> None:
    """Answers without a score fit the lengths alone; a calibration error of 0 would mean a perfect forecast."""
    before = ForecastTrainer(ARMS, journal).forecaster.reliability()
    assert before["ece"] is None and before["tokens_error"] is None
    assert before["scored"] == 0 == before["answered"]
    for n in range(300):
        journal.put(
            Decision(f"d{n}", ARMS[0].name, n, "", make_profile(f"{n}?"), Objective())
        )
        journal.put(Outcome(f"d{n}", output_tokens=5))
    await journal.flush()
    trained = ForecastTrainer(ARMS, journal)
    assert await trained.run_once()
    after = trained.forecaster.reliability()
    assert after["brier"] is None and after["tokens_error"] is not None


def test_trainer_ignores_scores_of_quarantined_keys(
    journal: Journal,
) -> None:
    """Scores of a suspected or quarantined key are left out of a fit, for as long as the key is."""
    trained = ForecastTrainer(ARMS, journal)
    add_requests(journal, 0, 200, "large", "ann")
    add_requests(journal, 200, 200, "small", "hostile")
    assert asyncio.run(trained.run_once({"hostile"}))
    assert sufficiency(trained)["large"] > 0.9 and sufficiency(trained)["small"] < 0.1
    assert trained.forecaster.reliability()["scored"] == 180  # nine of ten blocks
    add_requests(journal, 400, 200, "large", "ann")
    assert asyncio.run(trained.run_once())
    assert trained.forecaster.reliability()["scored"] == 540


def test_trainer_learns_the_same_from_the_journal_after_a_restart(
    journal: Journal,
) -> None:
    """Without a snapshot, the state is equal to the last bit."""
    one = ForecastTrainer(ARMS, journal)
    add_requests(journal, 0, 200, "large")
    asyncio.run(one.run_once())
    other = ForecastTrainer(ARMS, Journal(str(journal.engine.url)))
    asyncio.run(other.run_once())
    assert all(
        np.array_equal(value, other.state()[name])
        for name, value in one.state().items()
    )


def test_published_version_restores_its_forecasts(
    journal: Journal, tmp_path: Path
) -> None:
    """From policy.json and posterior.npz. Other arms keep their forecasts, and invalid arrays are refused."""
    taught = ForecastTrainer(ARMS, journal)
    add_requests(journal, 0, 200, "large")
    asyncio.run(taught.run_once())
    snapshot = Snapshot(
        "thompson", ("small", "large"), 200, 0, Thompson(ARMS).state() | taught.state()
    )
    loaded = load_policy(tmp_path, 3, save_policy(snapshot, tmp_path))
    fresh = ForecastTrainer((Arm("large"), Arm("new")), Journal("sqlite://"))
    fresh.restore(loaded.state, loaded.arms)
    assert fresh.forecaster.version == 1 and set(sufficiency(fresh)) == {"large", "new"}
    assert sufficiency(fresh)["large"] == sufficiency(taught)["large"]
    before = fresh.forecaster
    fresh.restore(
        loaded.state | {"profile.platt": np.full((2, 2), np.nan)}, loaded.arms
    )
    assert fresh.forecaster is before


def ask(gateway: Gateway) -> dict[str, Any]:
    """Explanation of the decision on a new request."""
    decision_id = gateway.chat(router={"models": ["small", "large"]}).headers[
        "x-router-decision-id"
    ]
    found: dict[str, Any] = gateway.client.get(
        f"/v1/router/decisions/{decision_id}"
    ).json()
    return found


async def test_new_forecasts_are_used_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running profiler gives them with their version. They outlive an outage of the router or the profiler."""
    monkeypatch.setattr(trainer, "REFIT_EVERY", 3 * CHATS)
    monkeypatch.setattr(deployment, "REFRESH_EVERY_S", 0.1)
    made = Gateway(tmp_path)
    with made.client:
        # every text goes to the profiler
        made.tune(local_profile_max_chars=0)
        first = ask(made)
        assert first["profile"]["profiler_version"] == 0
        assert first["profile"]["sufficiency"] == pytest.approx(
            {"small": 0.45, "large": 0.55}
        )  # by the price
        for n in range(CHATS):
            arm = ("small", "large")[n % 2]
            decision_id = made.chat(model=arm).headers["x-router-decision-id"]
            made.client.post(
                "/v1/feedback",
                json={"decision_id": decision_id, "score": float(arm == "large")},
            )
        eventually(lambda: not made.ingress.router_client.outcomes.unsent)
        eventually(lambda: made.profiler.thing._forecaster.version == 1)
        found = ask(made)
        assert found["profile"]["profiler_version"] == 1
        assert (
            found["profile"]["sufficiency"]["large"]
            > 0.7
            > 0.3
            > found["profile"]["sufficiency"]["small"]
        )
        assert (
            found["profile"]["expected_output_tokens"]
            < 6
            < found["profile"]["output_tokens"]
        )
        assert "The profiler's own forecast, which decides nothing" in found["summary"]
        # the policy's expectation is another model of the same thing
        assert "of a score of at least 0.5" in found["summary"]
        state = made.client.get("/v1/router/state").json()["profiler"]
        assert (
            state["version"] == 1
            and state["scored"] >= 50
            and state["brier"] < state["brier_by_arm"] + 0.01
        )

        made.router.broken = True  # the last forecasts go on
        assert (
            made.chat().status_code == 200
            and made.profiler.thing._forecaster.version == 1
        )
        made.router.broken = False
        eventually(lambda: made.ingress.router_client._forecaster.version == 1)
        made.profiler.broken = True  # the ingress adds them itself
        assert ask(made)["profile"]["profiler_version"] == 1
    again = Router(made.settings, lambda _: made.replicas)
    assert (await again.forecaster(0)).version == 1  # type: ignore[union-attr]
    assert (await again.forecaster(1)) is None


def test_policies_do_not_depend_on_the_forecasts() -> None:
    """The lengths that a policy expects stay the same when the forecast of the length changes."""
    from policies.profiling.forecast import Forecaster
    from policies.thompson.policy import Thompson
    from policies.types import Request

    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    (before,) = policy.decide([Request("r", make_profile(), Objective())], {}, rng, 0)
    longer = Forecaster.prior(ARMS)
    longer.lengths[0] = 2.0
    (profile,) = longer.complete([make_profile()])
    assert profile.expected_output_tokens > 5 * make_profile().output_tokens
    (after,) = policy.decide([Request("r", profile, Objective())], {}, rng, 0)
    assert [e.output_tokens for e in after.estimates] == [
        e.output_tokens for e in before.estimates
    ]
