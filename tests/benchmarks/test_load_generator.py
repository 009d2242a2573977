"""Tests of the load generator and the echo engine: their times are right."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from benchmarks.serving import echo_engine
from benchmarks.serving.load_generator import LoadPlan, Report, run
from tests.support import clock

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def play(
    handler: Handler, run_loop: Callable[[Any], Report] = asyncio.run, **plan: Any
) -> Report:
    """Run a plan against a server in the same event loop; a closed loop needs the machine's clock."""

    async def both() -> Report:
        app = web.Application()
        app.router.add_post("/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        try:
            return await run(LoadPlan(f"http://127.0.0.1:{port}/", ("a",), **plan))
        finally:
            await runner.cleanup()

    return run_loop(both())


class Stall:
    """A server that answers at once, except for half a second after its 20th request."""

    def __init__(self) -> None:
        self.seen = 0
        self.until = 0.0

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.seen += 1
        if self.seen == 20:
            self.until = time.monotonic() + 0.5
        await asyncio.sleep(max(0.0, self.until - time.monotonic()))
        return web.Response(text="{}")


def test_an_open_loop_records_a_stall_in_every_delayed_request() -> None:
    """An open loop of 100 requests a second records the stall in many requests, a closed loop in few."""
    opened = np.array(play(Stall(), rate=100.0, seconds=1.2).latency_s)
    closed = np.array(play(Stall(), clients=1, seconds=1.2).latency_s)
    assert (opened > 0.2).sum() >= 15
    # in 1.2 s one client can see at most six stalls
    assert 1 <= (closed > 0.2).sum() <= 7 < (opened > 0.2).sum()


def test_the_same_seed_sends_at_the_same_times() -> None:
    """The sending times depend only on the seed, so all systems get the same arrivals."""
    counts = [
        len(play(Stall(), rate=200.0, seconds=0.3, seed=seed).lag_s)
        for seed in (1, 1, 2, 3)
    ]
    assert counts[0] == counts[1] and len(set(counts)) > 1


def test_streams_are_timed_to_the_first_piece_and_per_token() -> None:
    """The report shows the times of an echo: 50 ms to the first token, 20 ms for each further one."""

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        async for chunk in echo_engine.stream("a", 10, True, 0.05, 0.02):
            await answer.write(chunk.encode())
        return answer

    report = play(handler, clock.run, rate=10.0, seconds=1.0, tokens=10, stream=True)
    assert report.status["200"] == len(report.ttft_s) >= 3
    assert np.median(report.ttft_s) == pytest.approx(0.05, abs=0.01)
    assert np.median(report.per_token_s) == pytest.approx(0.02, rel=0.2)


def test_errors_are_counted_and_not_timed() -> None:
    """An answer with status 500 counts as an error and has no latency."""

    async def broken(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    report = play(broken, clients=2, seconds=0.2)
    assert report.status["500"] > 0 and not report.latency_s


def test_late_tokens_do_not_delay_the_next() -> None:
    """After a slow read the echo engine sends the overdue tokens at once and keeps its schedule."""

    async def slow_reader() -> float:
        began = time.monotonic()
        async for i in echo_engine.pace(10, 0.02, 0.02):
            if i == 2:
                await asyncio.sleep(0.1)
        return time.monotonic() - began

    assert clock.run(slow_reader()) == pytest.approx(0.2)
