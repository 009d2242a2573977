"""Whether the system is well, from what Serve, the gateway and MLflow answer."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from deployments.operations.system_status import (
    Component,
    Observed,
    components,
    is_well,
)
from tests.support.dashboard import details_of
from tests.support.gateway import ROOT

NOW_S = 1e9
CONFIG = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
STATE: dict[str, Any] = {
    "uptime_s": 3600.0,
    "journal": {"row": 10, "waiting_rows": 0},
    "export": {
        "row": 7,
        "waiting_rows": 3,
        "succeeded_s": NOW_S - 5,
        "reported_s": NOW_S - 5,
        "problem": "",
    },
    "models": {"nano": {"replicas": 1, "healthy": True, "in_flight": 2.0}},
}


def observed(**changed: Any) -> Observed:
    """A system that is well, with changes."""
    whole = Observed(
        details_of(CONFIG)["applications"], True, "", STATE, "", False, True
    )
    return replace(whole, **changed)


def parts_of(**changed: Any) -> dict[str, Component]:
    return {part.name: part for part in components(observed(**changed), NOW_S)}


def test_a_system_that_is_well() -> None:
    """Each component is ready, and says how it does."""
    parts = parts_of()
    assert all(part.ready for part in parts.values()) and is_well([*parts.values()])
    assert [*parts] == [
        "gateway",
        "model nano",
        "model small",
        "model large",
        "model general",
        "model minilm",
        "profiler",
        "router",
        "tracker",
        "MLflow",
    ]
    assert parts["model nano"].detail == "1 of 1 replicas, 2 requests in flight"
    assert parts["tracker"].detail == "3 rows to export, last report 5 s ago"


def test_a_model_without_a_replica_is_named() -> None:
    """With the last line of what Serve says of it."""
    applications = details_of(CONFIG)["applications"]
    small = applications["small"]
    small |= {"status": "DEPLOY_FAILED", "message": "Traceback\nout of memory"}
    small["deployments"]["Model:small"]["replicas"] = []
    parts = parts_of(applications=applications)
    assert parts["model small"] == Component(
        "model small", False, "deploy failed: out of memory"
    )
    assert not is_well([*parts.values()]) and parts["model nano"].ready


def test_an_ingress_that_is_missing_makes_the_gateway_not_ready() -> None:
    """One of two replicas answers, and the other is not there."""
    applications = details_of(CONFIG)["applications"]
    applications["gateway"]["deployments"]["Ingress"]["target_num_replicas"] = 2
    assert parts_of(applications=applications)["gateway"] == Component(
        "gateway", False, "1 of 2 replicas"
    )


def test_without_a_key_the_router_is_unknown_and_the_rest_is_shown() -> None:
    """A refused question is no fault of the system."""
    parts = parts_of(state=None, state_problem="not asked: send a key", denied=True)
    assert parts["router"] == Component("router", None, "not asked: send a key")
    assert parts["model nano"].ready and is_well([*parts.values()])
    parts = parts_of(state=None, state_problem="the router is not available")
    assert parts["router"].ready is False


def test_another_machines_models_come_from_the_router() -> None:
    """There the dashboard cannot be asked; what is unknown is no fault."""
    parts = parts_of(applications=None, mlflow=None)
    assert parts["model nano"].ready and parts["profiler"].ready is None
    assert is_well([*parts.values()])
    gone = {**STATE, "models": {"nano": {"replicas": 0, "in_flight": 0}}}
    assert parts_of(applications=None, state=gone)["model nano"].ready is False


@pytest.mark.parametrize(
    ("export", "mlflow", "tracker", "ready"),
    [
        ({"problem": "MlflowException"}, True, True, False),
        ({"reported_s": NOW_S - 600}, True, False, True),
        ({"reported_s": None}, True, False, True),
        ({"reported_s": None}, None, None, None),
        ({}, False, True, False),
    ],
)
def test_the_export_to_mlflow(
    export: dict[str, Any],
    mlflow: bool | None,
    tracker: bool | None,
    ready: bool | None,
) -> None:
    """A silent tracker, a failed export and an MLflow that is away are distinguished."""
    state = {**STATE, "export": {**STATE["export"], **export}}
    parts = parts_of(state=state, mlflow=mlflow)
    assert parts["tracker"].ready is tracker and parts["MLflow"].ready is ready


def test_a_router_that_has_just_started_need_not_have_a_report() -> None:
    """The tracker reports every five seconds."""
    export = {**STATE["export"], "reported_s": None, "waiting_rows": None}
    state = {**STATE, "uptime_s": 3.0, "export": export}
    assert parts_of(state=state)["tracker"].ready is None
