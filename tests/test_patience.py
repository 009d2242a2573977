"""A request does not wait for a model's next replica when the last one is gone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.common import RequestMetadata
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

from deployments import patience
from tests import clock
from tests.gateway import Gateway
from tests.hostile import ASK
from tests.test_admission import REPORT


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_draining_replica_has_taken_it_may_finish(tmp_path: Path, stream: bool) -> None:
    """Whose model has no other: its count is 0 before it has answered."""
    gateway = Gateway(tmp_path)
    small, drained = gateway.models["small"], asyncio.Event()

    async def drains(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        await drained.wait()
        yield b"{}", REPORT

    async def run() -> Any:
        async with gateway.at_once() as client:
            small.replica, small.script = asyncio.get_running_loop().create_future(), drains
            small.replica.set_result(None)
            body = {**ASK, "model": "small", "stream": stream}
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not small.calls:
                await asyncio.sleep(0.05)
            gateway.replicas["small"] = 0
            while gateway.ingress.decider.replicas("small"):
                await asyncio.sleep(0.05)
            await asyncio.sleep(40)
            drained.set()
            return await asked

    answer = clock.run(run())
    assert answer.status_code == 200 and len(small.calls) == 1


def test_serve_still_tells_what_a_replica_has_taken() -> None:
    """A newer Serve that calls it otherwise would have all calls of a draining replica given up."""

    async def run() -> None:
        for kind in (DeploymentResponse, DeploymentResponseGenerator):
            assigned = asyncio.get_running_loop().create_future()
            call = kind(assigned, RequestMetadata("r", "i"), False)
            assert not patience.taken(call)
            assigned.set_result(None)
            assert patience.taken(call)

    asyncio.run(run())
    assert not patience.taken(None)


@pytest.mark.parametrize("stream", [False, True])
def test_what_waits_for_a_lost_arm_goes_to_another(tmp_path: Path, stream: bool) -> None:
    """Seconds after it is known, long before its deadline; while there are replicas, it waits as long as it may."""
    gateway = Gateway(tmp_path)

    async def queued(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        await asyncio.sleep(600)
        yield b"", {}

    async def run() -> tuple[bool, float, Any]:
        async with gateway.at_once() as client:
            body = {**ASK, "stream": stream, "router": {"models": ["small", "large"], "cost_weight": 1e6}}
            gateway.models["small"].script = queued
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.sleep(50)
            waits = not asked.done()
            gateway.replicas["small"] = 0
            while gateway.ingress.decider.replicas("small"):
                await asyncio.sleep(0.05)
            known_s = asyncio.get_running_loop().time()
            answer = await asked
            return waits, asyncio.get_running_loop().time() - known_s, answer

    waits, took_s, answer = clock.run(run())
    assert waits and took_s <= patience.LOOK_EVERY_S + patience.GRACE_S + 0.1 and answer.status_code == 200
    assert answer.headers["x-router-model"] == "large" and answer.headers["x-router-fallback"] == "model"
