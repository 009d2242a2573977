"""The benchmark's load generator and its echo engine: what they say of a server's time is true."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from benchmarks import echo
from benchmarks.load import Plan, Report, run
from tests import clock

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def play(handler: Handler, run_loop: Callable[[Any], Report] = asyncio.run, **plan: Any) -> Report:
    """A plan against a server in the same loop; a client that waits its turn needs the machine's clock."""

    async def both() -> Report:
        app = web.Application()
        app.router.add_post("/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        try:
            return await run(Plan(f"http://127.0.0.1:{port}/", ("a",), **plan))
        finally:
            await runner.cleanup()

    return run_loop(both())


class Stall:
    """Answers at once, but for half a second in which nobody is answered."""

    def __init__(self) -> None:
        self.seen, self.until = 0, 0.0

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.seen += 1
        if self.seen == 20:
            self.until = time.monotonic() + 0.5
        await asyncio.sleep(max(0.0, self.until - time.monotonic()))
        return web.Response(text="{}")


def test_a_stall_shows_in_all_requests_that_should_have_left_meanwhile() -> None:
    """At 100 a second, some thirty wait longer than a fifth of a second; one client that waits its turn sees one."""
    opened = np.array(play(Stall(), rate=100.0, seconds=1.2).latency_s)
    closed = np.array(play(Stall(), clients=1, seconds=1.2).latency_s)
    assert (opened > 0.2).sum() >= 15
    assert 1 <= (closed > 0.2).sum() <= 7 < (opened > 0.2).sum()  # in 1.2 s it can't see more than six


def test_the_same_seed_sends_at_the_same_times() -> None:
    """Side by side, all systems get the same arrivals; another seed gives others."""
    counts = [len(play(Stall(), rate=200.0, seconds=0.3, seed=seed).lag_s) for seed in (1, 1, 2, 3)]
    assert counts[0] == counts[1] and len(set(counts)) > 1


def test_streams_are_timed_to_the_first_piece_and_per_token() -> None:
    """An echo of 10 tokens, 50 ms to the first and 20 ms for each further one."""

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        async for chunk in echo.stream("a", 10, True, 0.05, 0.02):
            await answer.write(chunk.encode())
        return answer

    report = play(handler, clock.run, rate=10.0, seconds=1.0, tokens=10, stream=True)
    assert report.status["200"] == len(report.ttft_s) >= 3
    assert np.median(report.ttft_s) == pytest.approx(0.05, abs=0.01)
    assert np.median(report.per_token_s) == pytest.approx(0.02, rel=0.2)


def test_errors_are_counted_and_not_timed() -> None:
    """A 500 is no fast answer."""

    async def broken(_: web.Request) -> web.StreamResponse:
        return web.Response(status=500)

    report = play(broken, clients=2, seconds=0.2)
    assert report.status["500"] > 0 and not report.latency_s


def test_late_tokens_do_not_delay_the_next() -> None:
    """Who takes long over one finds the others due; the answer takes no longer than its schedule."""

    async def slow_reader() -> float:
        began = time.monotonic()
        async for i in echo.pace(10, 0.02, 0.02):
            if i == 2:
                await asyncio.sleep(0.1)
        return time.monotonic() - began

    assert clock.run(slow_reader()) == pytest.approx(0.2)
