"""A second arm for a request in haste: when the first is slow, when it fails, and when the second has no room."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes import failing
from tests.gateway import Gateway, eventually
from tests.test_admission import takes


class BackPressureError(Exception):
    """By Serve's name."""


@pytest.mark.parametrize(("hedge_after", "answered_by"), [(0.1, "hedge"), (None, "none")])
def test_a_request_in_haste_may_ask_a_second_arm(gateway: Gateway, hedge_after: float | None, answered_by: str) -> None:
    """By a setting: the slow arm is cancelled; without it the request waits."""
    gateway.tune(hedge_after=hedge_after)
    gateway.models["small"].script = takes(1.0)
    answer = gateway.chat(router={"max_latency_s": 2.0, "cost_weight": 1e6})
    assert answer.status_code == 200 and answer.headers["x-router-fallback"] == answered_by
    assert answer.headers["x-router-model"] == ("large" if hedge_after else "small")
    eventually(lambda: not any(gateway.ingress.decider.in_flight.values()))
    assert gateway.models["small"].cancelled == (1 if hedge_after else 0)


def test_hedging_still_replaces_an_arm_that_fails(gateway: Gateway) -> None:
    """At once, and once."""
    gateway.tune(hedge_after=0.5)
    gateway.models["small"].script = failing(RuntimeError())
    answer = gateway.chat(router={"max_latency_s": 20.0, "cost_weight": 1e6})
    assert answer.status_code == 200 and answer.headers["x-router-fallback"] == "model"
    gateway.models["large"].script = failing(RuntimeError())
    assert gateway.chat(router={"max_latency_s": 20.0, "cost_weight": 1e6}).status_code == 503
    assert not any(gateway.ingress.decider.in_flight.values())


@pytest.mark.parametrize("refusing", [False, True])
def test_a_second_arm_that_had_no_room_for_a_hedge_takes_over_a_failure(gateway: Gateway, refusing: bool) -> None:
    """Its line is full when the first one is slow, or it is refused a place; it is free again when that one fails."""
    gateway.tune(hedge_after=0.1, admission={"running": 1, "waiting": 0})
    line = gateway.ingress.dispatcher.admission.lines["large"]

    async def slow(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        if refusing:
            gateway.models["large"].script = failing(BackPressureError())
        else:
            line.running = 1
        await asyncio.sleep(0.6)
        gateway.models["large"].script, line.running = None, 0
        raise RuntimeError
        yield b"", None

    gateway.models["small"].script = slow
    answer = gateway.chat(router={"max_latency_s": 2.0, "cost_weight": 1e6})
    assert answer.status_code == 200 and answer.headers["x-router-fallback"] == "model"
    assert len(gateway.models["large"].calls) == (2 if refusing else 1) and len(gateway.models["small"].calls) == 1
    assert not any(gateway.ingress.decider.in_flight.values())
