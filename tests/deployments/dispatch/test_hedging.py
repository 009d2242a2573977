"""Hedging: a second arm is asked when the first is slow or fails."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from tests.deployments.dispatch.test_admission import takes
from tests.support import clock
from tests.support.fakes import failing
from tests.support.gateway import Gateway
from tests.support.hostile_input import ASK

Post = Callable[[float], Awaitable[Any]]


def play(folder: Path, scenario: Callable[[Gateway, Post], Awaitable[None]]) -> None:
    """Run a scenario with a gateway and a function that asks it with a deadline; the cheap `small` is asked first."""
    gateway = Gateway(folder)

    async def run() -> None:
        async with gateway.at_once() as client:

            async def post(limit_s: float) -> Any:
                wish = {"max_latency_s": limit_s, "cost_weight": 1e6}
                return await client.post(
                    "/v1/chat/completions", json={**ASK, "router": wish}
                )

            await scenario(gateway, post)
            assert not any(gateway.ingress.router_client.in_flight.values())

    clock.run(run())


@pytest.mark.parametrize(
    ("hedge_after_fraction", "answered_by"), [(0.1, "hedge"), (None, "none")]
)
def test_request_with_a_deadline_may_ask_a_second_arm(
    tmp_path: Path, hedge_after_fraction: float | None, answered_by: str
) -> None:
    """With `hedge_after_fraction` the slow arm is cancelled. Without it the request waits."""

    async def scenario(gateway: Gateway, post: Post) -> None:
        gateway.tune(hedge_after_fraction=hedge_after_fraction)
        gateway.models["small"].script = takes(1.0)
        began = asyncio.get_running_loop().time()
        answer = await post(2.0)
        took_s = asyncio.get_running_loop().time() - began
        assert (
            answer.status_code == 200
            and answer.headers["x-router-fallback"] == answered_by
        )
        assert answer.headers["x-router-model"] == (
            "large" if hedge_after_fraction else "small"
        )
        await asyncio.sleep(0.1)  # until the slower attempt is cancelled
        assert took_s == pytest.approx(0.2 if hedge_after_fraction else 1.0)
        assert gateway.models["small"].cancelled == (1 if hedge_after_fraction else 0)

    play(tmp_path, scenario)


def test_hedged_request_fails_over_at_once(tmp_path: Path) -> None:
    """The second arm does not wait for `hedge_after_fraction`, and there is no third attempt."""

    async def scenario(gateway: Gateway, post: Post) -> None:
        gateway.tune(hedge_after_fraction=0.5)
        gateway.models["small"].script = failing(RuntimeError())
        began = asyncio.get_running_loop().time()
        answer = await post(20.0)
        assert (
            answer.status_code == 200 and answer.headers["x-router-fallback"] == "model"
        )
        assert asyncio.get_running_loop().time() == began
        gateway.models["large"].script = failing(RuntimeError())
        assert (await post(20.0)).status_code == 503

    play(tmp_path, scenario)


@pytest.mark.parametrize("refusing", [False, True])
def test_arm_without_room_for_the_hedge_is_asked_after_a_failure(
    tmp_path: Path, refusing: bool
) -> None:
    """The second arm is full, or Serve refuses the call, when the first is slow. It has room when the first fails."""

    async def scenario(gateway: Gateway, post: Post) -> None:
        gateway.tune(
            hedge_after_fraction=0.1, admission={"max_running": 1, "max_queued": 0}
        )
        queue = gateway.ingress.dispatcher.admission.queues["large"]

        async def slow(
            task: str, body: dict[str, Any]
        ) -> AsyncIterator[tuple[bytes, Any]]:
            if refusing:
                gateway.models["large"].script = failing(BackPressureError(1, 1))
            else:
                queue.running = 1
            await asyncio.sleep(0.6)
            gateway.models["large"].script = None
            queue.running = 0
            raise RuntimeError
            yield b"", None

        gateway.models["small"].script = slow
        answer = await post(2.0)
        assert (
            answer.status_code == 200 and answer.headers["x-router-fallback"] == "model"
        )
        asked = [len(gateway.models[arm].calls) for arm in ("small", "large")]
        assert asked == [1, 2 if refusing else 1]

    play(tmp_path, scenario)
