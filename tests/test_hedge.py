"""A second arm for a request in haste: when the first is slow, when it fails, and when the second has no room."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests import clock
from tests.fakes import failing
from tests.gateway import Gateway
from tests.hostile import ASK
from tests.test_admission import takes


class BackPressureError(Exception):
    """By Serve's name."""


Post = Callable[[float], Awaitable[Any]]


def play(folder: Path, scenario: Callable[[Gateway, Post], Awaitable[None]]) -> None:
    """A scenario with a gateway and a way to ask it within so many seconds; the cheap `small` is asked first."""
    gateway = Gateway(folder)

    async def run() -> None:
        async with gateway.at_once() as client:

            async def post(limit_s: float) -> Any:
                wish = {"max_latency_s": limit_s, "cost_weight": 1e6}
                return await client.post("/v1/chat/completions", json={**ASK, "router": wish})

            await scenario(gateway, post)
            assert not any(gateway.ingress.decider.in_flight.values())

    clock.run(run())


@pytest.mark.parametrize(("hedge_after", "answered_by"), [(0.1, "hedge"), (None, "none")])
def test_a_request_in_haste_may_ask_a_second_arm(tmp_path: Path, hedge_after: float | None, answered_by: str) -> None:
    """By a setting: the slow arm is cancelled; without it the request waits."""

    async def scenario(gateway: Gateway, post: Post) -> None:
        gateway.tune(hedge_after=hedge_after)
        gateway.models["small"].script, began = takes(1.0), asyncio.get_running_loop().time()
        answer = await post(2.0)
        took_s = asyncio.get_running_loop().time() - began
        assert answer.status_code == 200 and answer.headers["x-router-fallback"] == answered_by
        assert answer.headers["x-router-model"] == ("large" if hedge_after else "small")
        await asyncio.sleep(0.1)  # of the test's clock: the loser hears that it is cancelled
        assert took_s == pytest.approx(0.2 if hedge_after else 1.0)
        assert gateway.models["small"].cancelled == (1 if hedge_after else 0)

    play(tmp_path, scenario)


def test_hedging_still_replaces_an_arm_that_fails(tmp_path: Path) -> None:
    """At once, and once."""

    async def scenario(gateway: Gateway, post: Post) -> None:
        gateway.tune(hedge_after=0.5)
        gateway.models["small"].script, began = failing(RuntimeError()), asyncio.get_running_loop().time()
        answer = await post(20.0)
        assert answer.status_code == 200 and answer.headers["x-router-fallback"] == "model"
        assert asyncio.get_running_loop().time() == began
        gateway.models["large"].script = failing(RuntimeError())
        assert (await post(20.0)).status_code == 503

    play(tmp_path, scenario)


@pytest.mark.parametrize("refusing", [False, True])
def test_a_second_arm_that_had_no_room_for_a_hedge_takes_over_a_failure(tmp_path: Path, refusing: bool) -> None:
    """Its line is full when the first one is slow, or it is refused a place; it is free again when that one fails."""

    async def scenario(gateway: Gateway, post: Post) -> None:
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
        answer = await post(2.0)
        assert answer.status_code == 200 and answer.headers["x-router-fallback"] == "model"
        asked = [len(gateway.models[arm].calls) for arm in ("small", "large")]
        assert asked == [1, 2 if refusing else 1]

    play(tmp_path, scenario)
