"""Tests of the metrics that Prometheus gets of routing, of the ingresses and of the export to MLflow."""

import asyncio
from math import isnan
from pathlib import Path

import pytest

from deployments.dispatch.admission import RANKS, ModelQueue
from deployments.dispatch.circuit_breaker import Breaker
from deployments.observability.gateway_metrics import NO_ANSWER, GatewayTelemetry
from deployments.observability.metrics import Telemetry
from deployments.settings import AdmissionSettings
from deployments.tracking.tracker import Tracker
from policies.evaluation.kind_figures import dearest_cost_usd
from policies.events import (
    CALIBRATION,
    FORCED,
    ArmEstimate,
    Decision,
    Outcome,
    Record,
)
from policies.types import Objective
from tests.support import exposition
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile

ESTIMATES = (
    ArmEstimate("small", utility=0.4, cost_usd=1e-5),
    ArmEstimate("large", utility=0.6, cost_usd=3e-4),
    ArmEstimate("huge", utility=0.9, cost_usd=9e-4, removed_by="not allowed"),
)


def decision(fallback: str = "") -> Decision:
    return Decision(
        "d",
        "small",
        0,
        "thompson-v1",
        make_profile(),
        Objective(),
        ESTIMATES,
        fallback=fallback,
    )


def test_the_dearest_cost_is_that_of_an_arm_that_could_have_answered() -> None:
    """An arm that a limit excludes is no alternative."""
    assert dearest_cost_usd(decision()) == 3e-4


def test_regret_and_saving_count_what_the_router_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Named models and calibrations are no choice of the router; a failed answer saves nothing."""
    made = exposition.record(monkeypatch)
    telemetry = Telemetry()
    for fallback, status in (
        ("", "ok"),
        ("", "error"),
        (FORCED, "ok"),
        (CALIBRATION, "ok"),
    ):
        made_decision = decision(fallback)
        outcome = Outcome("d", status, cost_usd=1e-5)
        telemetry.routed(made_decision, Record(made_decision))
        telemetry.routed(outcome, Record(made_decision, outcome))
    telemetry._routing.set({})
    assert made["ray_router_regret"].values[()] == pytest.approx(2 * 0.2)
    assert made["ray_router_routed_cost_usd"].values[()] == pytest.approx(2e-5)
    dearest = made["ray_router_estimated_dearest_cost_usd"]
    assert dearest.values[()] == pytest.approx(3e-4)


def test_a_gauge_that_is_unknown_again_is_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reward of a suspended key's scores must not stay on the dashboard, nor the version of a removed role."""
    made = exposition.record(monkeypatch)
    telemetry = Telemetry()
    telemetry._routing.set({"votes": 30.0, "reward": 0.5})
    telemetry._routing.set({"votes": 0.0})
    assert made["ray_router_reward_votes"].values[()] == 0.0
    assert isnan(made["ray_router_reward"].values[()])
    assert () not in made["ray_router_estimated_saving"].values
    telemetry.roles({"champion": (1, 0.9), "challenger": (2, 0.1)})
    telemetry.roles({"champion": (3, 1.0)})
    shares = made["ray_router_role_share"].values
    assert shares[(("role", "challenger"),)] == 0.0
    assert isnan(made["ray_router_role_version"].values[(("role", "challenger"),)])


def test_requests_are_counted_by_route_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals of the middleware, unknown paths and errors are among them; ids make no labels."""
    made = exposition.record(monkeypatch)
    gateway = Gateway(tmp_path)
    with gateway.client as client:
        decision_id = gateway.chat().headers["x-router-decision-id"]
        gateway.chat(model="unknown")
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        client.post("/v1/feedback", json={"decision_id": decision_id, "score": 1.0})
        client.get(f"/v1/router/decisions/{decision_id}")
        client.get("/v1/router/state")
        for n in range(3):
            client.get(f"/some/path/{n}")
        client.post("/v1/chat/completions", content=b"x" * 2**21)
        gateway.ingress.telemetry.flush()
    counts = {
        tuple(dict(key)[tag] for tag in ("route", "code")): value
        for key, value in made["ray_router_http_requests"].values.items()
    }
    assert counts == {
        ("/v1/chat/completions", "200"): 1,
        ("/v1/chat/completions", "404"): 1,
        ("/v1/chat/completions", "413"): 1,
        ("/v1/feedback", "200"): 1,
        ("/v1/router/decisions", "200"): 1,
        ("/v1/router/state", "200"): 1,
        ("other", "404"): 3,
    }
    arms = {dict(key)["arm"] for key in made["ray_router_breaker_open"].values}
    assert arms == {"small", "large", "minilm"}
    assert NO_ANSWER not in {int(code) for _, code in counts}


async def test_queues_and_breakers_are_exported_as_they_are_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Waiting requests by priority; a breaker that opened, and closed again."""
    made = exposition.record(monkeypatch)
    queue = ModelQueue()
    queue.settings = AdmissionSettings(max_running=1, max_queued=8)
    breaker = Breaker()
    telemetry = GatewayTelemetry({"small": queue}, {"small": breaker}, RANKS)

    def waiting() -> dict[str, float]:
        telemetry.flush()
        values = made["ray_router_waiting_requests"].values
        return {dict(key)["priority"]: value for key, value in values.items()}

    entered = await queue.enter(RANKS["normal"])
    others = [
        asyncio.create_task(queue.enter(RANKS[name]))
        for name in ("high", "normal", "normal")
    ]
    await asyncio.sleep(0)
    assert waiting() == {"high": 1, "normal": 2, "batch": 0}
    queue.leave(entered)
    await asyncio.sleep(0)
    assert waiting() == {"high": 0, "normal": 2, "batch": 0}
    for task in others:
        task.cancel()
    for status, is_open in (("error", 1.0), ("ok", 0.0)):
        for _ in range(breaker.settings.failure_threshold):
            breaker.end(status, probe=status == "ok")
        telemetry.flush()
        assert made["ray_router_breaker_open"].values[(("arm", "small"),)] == is_open


async def test_the_lag_of_mlflow_is_the_rows_that_it_lacks(
    tmp_path: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows while MLflow refuses the export, and is 0 again afterwards."""
    made = exposition.record(monkeypatch)
    gateway = Gateway(tmp_path, mlflow_uri=mlflow_uri, experiment="test")
    with gateway.client:
        tracker = Tracker(gateway.settings, gateway.router, 7.0)
        await tracker._track()

        def fail(*_: object) -> None:
            raise OSError("away")

        for _ in range(3):
            gateway.chat()
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        with monkeypatch.context() as broken:
            broken.setattr(tracker._runs, "send", fail)
            with pytest.raises(OSError, match="away"):
                await tracker._track()
        last = gateway.router.thing._journal.last_row
        assert made["ray_router_mlflow_lag_rows"].values[()] == last >= 6
        await tracker._track()
        assert made["ray_router_mlflow_lag_rows"].values[()] == 0
