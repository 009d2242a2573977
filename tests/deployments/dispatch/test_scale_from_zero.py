"""Scale from zero: a model without replicas gets one call in the background, and no client waits for it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from deployments.dispatch.scale_from_zero import CALL_PAUSE_S, ZeroScaler
from tests.support import clock
from tests.support.fakes import FakeModel
from tests.support.gateway import Gateway, eventually


def test_one_call_at_a_time_and_a_pause_after_it() -> None:
    """The number of requests does not matter, and the failure of the call reaches no client."""

    async def run() -> list[int]:
        model = FakeModel("large")
        now = [0.0]
        done = asyncio.Event()
        calls = []

        async def slow(
            task: str, body: dict[str, Any]
        ) -> AsyncIterator[tuple[bytes, Any]]:
            await done.wait()
            raise RuntimeError("it did not start")
            yield b"", None

        async def method(_: str) -> Any:
            return model.complete

        model.script = slow
        scaler = ZeroScaler(method, lambda: now[0])
        for step in ("first", "under way", "ended", "just now", "later"):
            if step == "ended":
                done.set()
            now[0] += CALL_PAUSE_S if step == "later" else 0.0
            if step != "ended":
                scaler.request_replica("large", "chat")
            await asyncio.sleep(0.01)
            calls.append(len(model.calls))
        return calls

    assert clock.run(run()) == [1, 1, 1, 1, 2]


def test_requests_that_other_arms_answer_start_a_replica(
    gateway: Gateway,
) -> None:
    """`auto` is answered by another arm at once. A request that names the arm gets a 503 with Retry-After."""
    gateway.replicas["large"] = 0
    # the router counts the replicas every 2 s
    eventually(
        lambda: time.sleep(0.05) or gateway.ingress.router_client.replicas("large") == 0
    )
    assert not gateway.models["large"].calls
    assert gateway.chat().headers["x-router-model"] == "small"
    eventually(lambda: len(gateway.models["large"].calls) == 1)
    assert gateway.models["large"].calls[0]["max_tokens"] == 1
    assert gateway.chat(model="large").headers["retry-after"]
    assert len(gateway.models["large"].calls) == 1
