"""A model without replicas is woken in the background, and nobody waits for it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from deployments.waker import AGAIN_S, Waker
from tests import clock
from tests.fakes import FakeModel
from tests.gateway import Gateway, eventually


def test_one_call_at_a_time_and_not_at_once_again() -> None:
    """However many requests want it; and a failed call is no failure of anybody's."""

    async def run() -> list[int]:
        model, now, done, calls = FakeModel("large"), [0.0], asyncio.Event(), []

        async def slow(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
            await done.wait()
            raise RuntimeError("it did not start")
            yield b"", None

        async def method(_: str) -> Any:
            return model.complete

        model.script = slow
        waker = Waker(method, lambda: now[0])
        for step in ("first", "under way", "ended", "just now", "later"):
            if step == "ended":
                done.set()
            now[0] += AGAIN_S if step == "later" else 0.0
            if step != "ended":
                waker.wake("large", "chat")
            await asyncio.sleep(0.01)
            calls.append(len(model.calls))
        return calls

    assert clock.run(run()) == [1, 1, 1, 1, 2]


def test_a_sleeping_arm_is_woken_by_requests_that_others_answer(gateway: Gateway) -> None:
    """`auto` goes elsewhere at once; asked for by name, it is a 503 with Retry-After, and wakes, too."""
    gateway.replicas["large"] = 0
    eventually(lambda: time.sleep(0.05) or gateway.ingress.decider.replicas("large") == 0)  # it looks every 2 s
    assert not gateway.models["large"].calls
    assert gateway.chat().headers["x-router-model"] == "small"
    eventually(lambda: len(gateway.models["large"].calls) == 1)
    assert gateway.models["large"].calls[0]["max_tokens"] == 1
    assert gateway.chat(model="large").headers["retry-after"]
    assert len(gateway.models["large"].calls) == 1
