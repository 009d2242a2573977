"""Failover of requests whose model has lost its last replica."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.dispatch import failover
from deployments.models.report import ModelReport
from tests.deployments.dispatch.test_admission import REPORT
from tests.support import clock
from tests.support.gateway import Gateway
from tests.support.hostile_input import ASK


@pytest.mark.parametrize("stream", [False, True])
def test_draining_replica_finishes_the_requests_it_has_accepted(
    tmp_path: Path, stream: bool
) -> None:
    """It is the model's last replica, so the model has no ready replica before the answer is complete."""
    gateway = Gateway(tmp_path)
    small = gateway.models["small"]
    drained = asyncio.Event()

    async def drains(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        await drained.wait()
        yield b"{}", REPORT

    async def run() -> Any:
        async with gateway.at_once() as client:
            small.replica = asyncio.get_running_loop().create_future()
            small.script = drains
            small.replica.set_result(None)
            body = {**ASK, "model": "small", "stream": stream}
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not small.calls:
                await asyncio.sleep(0.05)
            gateway.replicas["small"] = 0
            while gateway.ingress.router_client.replicas("small"):
                await asyncio.sleep(0.05)
            await asyncio.sleep(40)
            drained.set()
            return await asked

    answer = clock.run(run())
    assert answer.status_code == 200 and len(small.calls) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_requests_waiting_for_a_lost_arm_fail_over(
    tmp_path: Path, stream: bool
) -> None:
    """Failover comes seconds after the loss is known, long before the deadline, and not while there are replicas."""
    gateway = Gateway(tmp_path)

    async def queued(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        await asyncio.sleep(600)
        yield b"", ModelReport()

    async def run() -> tuple[bool, float, Any]:
        async with gateway.at_once() as client:
            body = {
                **ASK,
                "stream": stream,
                "router": {"models": ["small", "large"], "cost_weight": 1e6},
            }
            gateway.models["small"].script = queued
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.sleep(50)
            waits = not asked.done()
            gateway.replicas["small"] = 0
            while gateway.ingress.router_client.replicas("small"):
                await asyncio.sleep(0.05)
            known_s = asyncio.get_running_loop().time()
            answer = await asked
            return waits, asyncio.get_running_loop().time() - known_s, answer

    waits, took_s, answer = clock.run(run())
    assert (
        waits
        and took_s <= failover.CHECK_EVERY_S + failover.GRACE_S + 0.1
        and answer.status_code == 200
    )
    assert (
        answer.headers["x-router-model"] == "large"
        and answer.headers["x-router-fallback"] == "model"
    )
