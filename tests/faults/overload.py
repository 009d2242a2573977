"""Checks of overload, failing models and clients that leave (see catalogue.py)."""

import asyncio
import gc
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.deployments.dispatch.test_admission import takes
from tests.faults.catalogue import ALONE, TEST, Fault, Finding
from tests.support.gateway import Gateway
from tests.support.hostile_input import ASK

CHAT = "/v1/chat/completions"
JSON = (b"content-type", b"application/json")


def percentile(values: list[float], q: float) -> float:
    """The q-th percentile in the unit of the values; 0 if there are none."""
    return float(np.percentile(values, q)) if values else 0.0


async def post(app: Any, body: dict[str, Any]) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of a POST. Calls the app directly, since a client library takes longer than the gateway."""
    content = [json.dumps(body).encode()]
    started = []

    async def receive() -> dict[str, Any]:
        if not content:
            await asyncio.Future()
        return {"type": "http.request", "body": content.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.append(message)

    await app(scope(), receive, send)
    return started[0]["status"], dict(started[0]["headers"])


def scope() -> dict[str, Any]:
    """ASGI scope of a POST to /v1/chat/completions."""
    made = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": b"",
        "query_string": b"",
        "root_path": "",
    }
    return {
        **made,
        "headers": [JSON],
        "scheme": "http",
        "http_version": "1.1",
        "server": ("a", 80),
    }


async def open_loop(
    rate: float, seconds: float, call: Callable[[], Awaitable[Any]]
) -> list[tuple[Any, float]]:
    """Make calls at random times, independent of earlier ones; returns each result with its seconds."""
    rng = random.Random(1)
    tasks = []
    began = time.perf_counter()
    due = 0.0

    async def timed() -> tuple[Any, float]:
        start = time.perf_counter()
        return await call(), time.perf_counter() - start

    while (due := due + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        tasks.append(asyncio.create_task(timed()))
    return list(await asyncio.gather(*tasks))


def t11(folder: Path) -> Finding:
    """Send two and five times the requests that the models can answer, in an open loop."""
    gateway = Gateway(folder)
    hold_s = 0.4
    slots = 4
    capacity = 2 * slots / hold_s  # requests a second
    found = []
    held = True

    async def run() -> None:
        nonlocal held
        async with gateway.at_once():
            app: Any = gateway.client.app
            gateway.tune(
                admission={
                    "max_running": slots,
                    "max_queued": 16,
                    "max_queue_wait_s": 2.0,
                }
            )
            for name in ("small", "large"):
                gateway.models[name].script = takes(hold_s, slots)
                await post(app, {**ASK, "model": name})
            gc.collect()
            gc.freeze()  # as Serve does in its replicas
            for times in (2, 5):
                began = time.perf_counter()
                answers = await open_loop(times * capacity, 8.0, lambda: post(app, ASK))
                seconds = time.perf_counter() - began  # until the last answer
                good = [took for (status, _), took in answers if status == 200]
                late = [took for (status, _), took in answers if status == 429]
                told = all(
                    int(headers[b"retry-after"]) >= 1
                    for (status, headers), _ in answers
                    if status == 429
                )
                goodput = len(good) / seconds / capacity
                bound = 2 * hold_s + 16 * hold_s / slots
                figures = (
                    goodput,
                    percentile(good, 99),
                    percentile(late, 99),
                    len(late) / len(answers),
                )
                held &= told and len(good) + len(late) == len(answers)
                held &= goodput >= 0.9 and figures[1] <= bound and figures[2] < 0.1
                found.append(
                    f"{times}×: goodput {goodput:.0%}, {figures[3]:.0%} got 429 in {1000 * figures[2]:.0f} ms (p99), "
                    f"admitted p99 {figures[1]:.1f} s (bound {bound:.1f})"
                )
            began = time.perf_counter()
            calm, _ = await post(app, ASK)
            recovery = time.perf_counter() - began
            held &= (
                calm == 200
                and recovery < 1.0
                and gateway.ingress.dispatcher.admission.in_flight_total == 0
            )
            found.append(f"then {recovery:.2f} s")

    asyncio.run(run())
    return Finding("; ".join(found), bool(held))


def t13(folder: Path) -> Finding:
    """Let the profiler take 5 s for a tenth of its calls and fail at another tenth."""
    gateway = Gateway(folder)
    rng = random.Random(3)
    seconds: dict[str, list[float]] = {"none": [], "profiler": []}
    failed = 0
    with gateway.client:
        # every text goes to the profiler, even a short one
        gateway.tune(local_profile_max_chars=0, profile_timeout_s=0.25)
        gateway.chat()
        for _ in range(200):
            gateway.profiler.broken = False
            gateway.profiler.delay_s = 0.0
            fate = rng.random()
            gateway.profiler.broken = fate > 0.9
            gateway.profiler.delay_s = 5.0 if fate < 0.1 else 0.0
            began = time.perf_counter()
            answer = gateway.chat()
            failed += answer.status_code != 200
            seconds[answer.headers["x-router-fallback"]].append(
                time.perf_counter() - began
            )
        deadline_s = gateway.ingress.router_client.tuning.profile_timeout_s
    added = percentile(seconds["profiler"], 99) - percentile(seconds["none"], 50)
    share = len(seconds["profiler"]) / 200
    figure = (
        f"{share:.0%} without it, {failed} failed, at most {1000 * added:.0f} ms "
        f"more (deadline {1000 * deadline_s:g})"
    )
    return Finding(figure, failed == 0 and added <= deadline_s + 0.05)


def t15(folder: Path) -> Finding:
    """Open 200 streams whose clients leave after the first chunk, and 50 whose clients leave before it."""
    gateway = Gateway(folder)
    running = Counter[str]()

    async def endless(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        running["engine"] += 1
        try:
            for i in itertools.count():
                yield b"data: %d\n\n" % i, None
                await asyncio.sleep(0.02)
        finally:
            running["engine"] -= 1

    async def leave(app: Any, after: int) -> None:
        body = [
            b'{"model": "large", "stream": true, "messages": [{"role": "user", "content": "a"}]}'
        ]
        received = 0
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal received
            received += bool(message.get("body"))
            if received >= after:
                gone.set()
                if after == 0:
                    raise OSError("the connection is closed")

        await app(scope(), receive, send)

    async def run() -> tuple[float, int, int]:
        async with gateway.at_once():
            gateway.tune(
                admission={"max_running": 100, "max_queued": 400, "max_in_flight": 1000}
            )
            gateway.models["large"].script = endless
            app = gateway.client.app
            await asyncio.gather(
                *(leave(app, 1 if i % 5 else 0) for i in range(250)),
                return_exceptions=True,
            )
            began = time.perf_counter()
            while (
                gateway.ingress.dispatcher.admission.in_flight_total
                and time.perf_counter() - began < 5
            ):
                await asyncio.sleep(0.01)
            freed_s = time.perf_counter() - began
            left = gateway.ingress.dispatcher.admission.in_flight_total + sum(
                gateway.ingress.router_client.in_flight.values()
            )
            model = gateway.models["large"]
            return freed_s, left, len(model.calls) - model.cancelled

    freed_s, left, uncancelled = asyncio.run(run())
    figure = f"free after {freed_s:.2f} s, {left} left in the counters, {uncancelled} engine calls not cancelled"
    return Finding(figure, freed_s <= 2 and left == 0 and uncancelled == 0)


def t24(folder: Path) -> Finding:
    """Let a model fail every time and then recover; the circuit breaker must limit the failures."""
    gateway = Gateway(folder)
    with gateway.client:
        breaker = gateway.ingress.dispatcher.breakers["small"]
        now = [0.0]
        breaker._clock = lambda: now[0]
        gateway.tune(breaker={"failure_threshold": 3, "cooldown_s": 5.0})
        small = gateway.models["small"]
        statuses = Counter[int]()

        async def dead(
            task: str, body: dict[str, Any]
        ) -> AsyncIterator[tuple[bytes, Any]]:
            raise RuntimeError
            yield b"", None

        small.script = dead
        for _ in range(60):
            statuses[gateway.chat().status_code] += 1
        asked = len(small.calls)
        small.script = None
        while gateway.chat(model="small").status_code != 200 and now[0] < 60:
            now[0] += 0.5
        back_s = now[0]
    failures = sum(count for status, count in statuses.items() if status != 200)
    figure = f"{failures} of 60 requests failed, the arm was asked {asked} times, back {back_s:.1f} s after it was well"
    return Finding(figure, failures == 0 and asked <= 5 and back_s <= 5)


FAULTS = [
    Fault(
        "T11",
        "overload",
        "goodput ≥ 90 %, 429 in < 100 ms, p99 ≤ 2 × unloaded + line, recovery < 10 s",
        t11,
        tier=ALONE,
    ),
    Fault("T13", "profiler slow or failing", "0 failed, ≤ deadline", t13, tier=ALONE),
    Fault("T15", "250 clients leave", "≤ 2 s, 0", t15),
    Fault("T24", "an arm fails and comes back", "≤ 5 failures", t24, tier=TEST),
]
