"""Tests of the demand that the router tells a model's autoscaler."""

import time
from pathlib import Path
from typing import Any

import pytest

from policies.demand import LEAST
from tests.support.gateway import Gateway, eventually


def demand(gateway: Gateway, model: str) -> float:
    """What the router answers the autoscaler now."""
    router = gateway.router.thing
    router._demanded_s = -1e9
    portal: Any = gateway.client.portal
    return float(portal.call(router.demand, model))


def at_zero(gateway: Gateway, *models: str) -> None:
    """Take the replicas of these models away, and wait until the ingress knows; the router counts them every 2 s."""
    gateway.replicas |= dict.fromkeys(models, 0)
    client = gateway.ingress.router_client
    eventually(
        lambda: time.sleep(0.05) or not any(client.replicas(name) for name in models)
    )


def state_of(gateway: Gateway, model: str) -> dict[str, Any]:
    found: dict[str, Any] = gateway.client.get("/v1/router/state").json()["models"]
    return found[model]


def test_requests_that_another_model_answers_are_demand_for_the_cold_one(
    gateway: Gateway,
) -> None:
    """The better model is wanted without a request sent to it; the one that answers has no further demand."""
    at_zero(gateway, "large")
    assert demand(gateway, "large") == 0.0
    for _ in range(30):
        answer = gateway.chat()
        assert answer.headers["x-router-model"] == "small"
        decision = answer.headers["x-router-decision-id"]
        bad = {"decision_id": decision, "score": 0.0}
        assert gateway.client.post("/v1/feedback", json=bad).status_code == 200
    eventually(lambda: demand(gateway, "large") > 0.0)
    assert not gateway.models["large"].calls
    assert demand(gateway, "small") == demand(gateway, "minilm") == LEAST
    shown = state_of(gateway, "large")["demand"]
    assert shown["requests"] > 0.0 and shown["loss"] > 0.5 and shown["start_s"] == 0.0
    gateway.tune(demand_autoscaling=False)
    eventually(lambda: demand(gateway, "large") == 0.0)
    assert state_of(gateway, "large")["demand"] is None


@pytest.mark.parametrize("snapshot_max_age_s", [0.0, 3600.0])
def test_one_request_that_names_a_cold_model_starts_it(
    gateway: Gateway, snapshot_max_age_s: float
) -> None:
    """It gets a 503 with Retry-After, whether the ingress decides or the router; nothing is sent to the model."""
    gateway.tune(snapshot_max_age_s=snapshot_max_age_s)
    at_zero(gateway, "large")
    refused = gateway.chat(model="large")
    assert refused.status_code == 503 and refused.headers["retry-after"]
    eventually(lambda: demand(gateway, "large") > 0.0)
    assert not gateway.models["large"].calls
    assert demand(gateway, "small") == LEAST


def test_all_models_may_be_at_zero(gateway: Gateway) -> None:
    """One request starts those that could answer it; a text to embed starts the embedder."""
    at_zero(gateway, "small", "large", "minilm")
    assert gateway.chat().status_code == 503
    eventually(lambda: demand(gateway, "small") > 0.0)
    assert demand(gateway, "large") > 0.0
    assert demand(gateway, "minilm") == 0.0
    embedded = gateway.client.post(
        "/v1/embeddings", json={"model": "auto", "input": "hello"}
    )
    assert embedded.status_code == 503
    eventually(lambda: demand(gateway, "minilm") > 0.0)


def test_the_time_of_a_start_survives_a_restart_of_the_router(
    gateway: Gateway, tmp_path: Path
) -> None:
    """It is learned from the wish and the first answer, and kept in the journal."""
    at_zero(gateway, "large")
    gateway.chat(model="large")
    eventually(lambda: demand(gateway, "large") > 0.0)
    gateway.replicas["large"] = 1
    eventually(
        lambda: (
            demand(gateway, "large") == LEAST
            and gateway.chat(model="large").status_code == 200
        )
    )
    eventually(lambda: (state_of(gateway, "large")["demand"] or {}).get("start_s"))
    learned = state_of(gateway, "large")["demand"]["start_s"]
    router = gateway.router.thing
    portal: Any = gateway.client.portal
    portal.call(router._maintain)
    again = type(router)(gateway.settings, lambda _: gateway.replicas)
    assert again._projections.demand.start_s == {"large": pytest.approx(learned)}
