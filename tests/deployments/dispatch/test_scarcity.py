"""The price of a scarce model in the decisions of an ingress and of the router."""

from typing import Any

import pytest

from policies.events import Decision
from tests.support.gateway import Gateway, eventually

SLOTS = {"max_running": 8, "max_queued": 64, "max_queue_wait_s": 30}


def charged(gateway: Gateway, **body: Any) -> Decision:
    """The decision of a request."""
    answer = gateway.chat(**body)
    assert answer.status_code == 200
    return record(gateway, answer.headers["x-router-decision-id"])


def record(gateway: Gateway, decision_id: str) -> Decision:
    router, portal = gateway.router.thing, gateway.client.portal
    eventually(lambda: portal.call(router.record, decision_id))
    found: Any = portal.call(router.record, decision_id)
    decision: Decision = found.decision
    return decision


def price(decision: Decision) -> float:
    """What it would have paid for its place at the model `large`."""
    return decision.scarcity(decision.estimate("large"))


@pytest.mark.parametrize("snapshot_max_age_s", [0.0, 3600.0])
def test_a_request_pays_for_a_place_at_a_busy_model(
    gateway: Gateway, snapshot_max_age_s: float
) -> None:
    """Whether the ingress decides or the router; not with a high priority, and not if prices are switched off."""
    gateway.tune(snapshot_max_age_s=snapshot_max_age_s, admission=SLOTS)
    tuning = gateway.ingress.router_client
    eventually(lambda: tuning._reported_tuning is tuning.tuning)
    assert price(charged(gateway)) == 0.0
    tuning.in_flight["large"] += 6  # the target is an eighth of eight slots
    paid = charged(gateway)
    assert price(paid) > 0.0
    if not snapshot_max_age_s:
        assert gateway.router.thing._arm_stats.states()["large"].price > 0.0
    high = charged(gateway, router={"priority": "high"})
    assert price(high) == 0.0 and high.estimate("large").load > 0.0
    named = charged(gateway, model="large")
    assert named.estimate("large").propensity == 1.0
    gateway.tune(scarcity_price=False)
    eventually(lambda: tuning._reported_tuning is tuning.tuning)
    assert price(charged(gateway)) == 0.0
    tuning.in_flight["large"] -= 6
