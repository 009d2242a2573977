"""Checks of failing parts and of models scaled to zero, as clients see them (see catalogue.py)."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from deployments.models.report import failure
from tests.faults.catalogue import ALONE, TEST, Fault, Finding
from tests.faults.overload import open_loop, percentile, post
from tests.support.fakes import failing
from tests.support.gateway import Gateway
from tests.support.hostile_input import ASK

WISH_S = (
    30.0  # within which the router must want a model at zero that was asked by name
)
PROMPT = "canary-prompt-81c2"
SECRET = "secret-81c2 in /srv/router/deployments/memory.py line 7"
WORDS = ("81c2", "Traceback", ".py", "/srv", "site-packages", "Error(", 'File "')
KEYS = {"message", "type", "param", "code"}  # of an OpenAI error
ERRORS = (
    ValueError,
    RuntimeError,
    KeyError,
    OSError,
    TypeError,
    ConnectionError,
    MemoryError,
    TimeoutError,
)
RAY_ERROR = f"ray::ServeReplica:large:generate() (pid=7)\n  Traceback (most recent call last):\n ValueError: {SECRET}"


def reporting(
    status: int, after: int
) -> Callable[[str, dict[str, Any]], AsyncIterator[tuple[bytes, Any]]]:
    """An engine that reports an error with this status after a number of chunks."""

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        for i in range(after):
            yield b"data: %d\n\n" % i, None
        yield b"", failure(SECRET, status)

    return script


def t18(folder: Path) -> Finding:
    """Cause more than 20 kinds of internal errors, with and without streaming, and search the answers for leaks."""
    gateway = Gateway(folder)
    kinds = 0
    leaks = []
    odd = []
    scripts: dict[str, Any] = {
        f"{e.__name__} after {n}": failing(e(SECRET), n) for e in ERRORS for n in (0, 2)
    }
    scripts |= {
        "Ray's own words": failing(RuntimeError(RAY_ERROR)),
        "in mid-stream": failing(RuntimeError(RAY_ERROR), 1),
    }
    scripts |= {
        f"status {s} after {n}": reporting(s, n) for s in (500, 503) for n in (0, 2)
    }
    router = gateway.router.thing
    parts: dict[str, tuple[Any, str]] = {
        "deciding": (gateway.ingress, "_profiled"),
        "profiling": (gateway.profiler.thing, "profile"),
        "the router's decision": (router, "decide"),
        "the router's summary": (router, "summary"),
        "the router's record": (router, "record"),
        "the router's feedback": (router, "feedback"),
    }

    def look(what: str, answers: list[Any]) -> None:
        nonlocal kinds
        kinds += 1
        for answer in answers:
            if any(word in answer.text for word in WORDS):
                leaks.append(what)
            if answer.status_code >= 400 and set(answer.json()["error"]) != KEYS:
                odd.append(what)

    def everything() -> list[Any]:
        asked = {"messages": [{"role": "user", "content": PROMPT}]}
        found = [
            gateway.chat(**asked, model=model, stream=s)
            for model in ("auto", "large")
            for s in (False, True)
        ]
        found.append(
            gateway.client.post(
                "/v1/feedback", json={"decision_id": "dec-7", "score": 0.5}
            )
        )
        return [
            *found,
            *(
                gateway.client.get(f"/v1/router/{path}")
                for path in ("state", "decisions/dec-7")
            ),
        ]

    with gateway.client:
        gateway.tune(breaker={"failure_threshold": 10**6})
        for what, script in scripts.items():
            for model in gateway.models.values():
                model.script = script
            look(what, everything())
        for model in gateway.models.values():
            model.script = None
        for what, (thing, name) in parts.items():
            with ExitStack() as stack:
                stack.enter_context(
                    mock.patch.object(thing, name, side_effect=RuntimeError(SECRET))
                )
                look(what, everything())
    figure = f"{kinds} kinds, {len(leaks)} bodies leak {sorted(set(leaks)) or ''}, {len(odd)} in another shape"
    return Finding(figure, kinds >= 20 and not leaks and not odd)


def t25(folder: Path) -> Finding:
    """Scale one of two models to zero, ask it by name, and start it as soon as the router has demand for it."""
    gateway = Gateway(folder)
    asked = list[float]()
    gateway.replicas["large"] = 0

    async def recorded(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        asked.append(time.perf_counter())
        async for item in gateway.models["large"]._say_name(task, body):
            yield item

    async def run() -> tuple[list[tuple[Any, float]], Any, bool, int, int]:
        async with gateway.at_once() as client:
            gateway.models["large"].script = recorded
            while gateway.ingress.router_client.replicas("large"):
                await asyncio.sleep(0.1)
            found = await open_loop(10.0, 10.0, lambda: post(gateway.client.app, ASK))
            by_name = {**ASK, "model": "large"}
            cold = await client.post("/v1/chat/completions", json=by_name)
            began = time.perf_counter()
            while not await gateway.router.thing.demand("large"):
                if time.perf_counter() - began > WISH_S:
                    return found, cold, False, len(asked), 0
                await asyncio.sleep(0.1)
            calls = len(asked)
            gateway.replicas["large"] = 1  # what the autoscaler does then
            while not gateway.ingress.router_client.replicas("large"):
                await asyncio.sleep(0.1)
            warm = await client.post("/v1/chat/completions", json=by_name)
            return found, cold, True, calls, warm.status_code

    found, cold, wanted, calls, warm = asyncio.run(run())
    statuses = Counter(status for (status, _), _ in found)
    longest = max(took for _, took in found)
    wish = "then" if wanted else "but never"
    figure = (
        f"{statuses[200]} of {len(found)} answered, p99 {percentile([s for _, s in found], 99):.2f} s, longest "
        f"{longest:.2f} s; {calls} requests sent to it; by name: {cold.status_code}, {wish} wanted by the router; with "
        f"a replica: {warm}"
    )
    return Finding(
        figure,
        set(statuses) == {200}
        and longest < 1
        and calls == 0
        and cold.status_code == 503
        and int(cold.headers["retry-after"]) > 0
        and warm == 200,
    )


def t12(folder: Path) -> Finding:
    """Measure the latency of everything but HTTP and Ray, at 50 requests a second to models that answer at once."""
    gateway = Gateway(folder)
    rng = random.Random(12)

    async def run() -> list[float]:
        async with gateway.at_once():
            app: Any = gateway.client.app
            kinds = ["auto", "large"]
            await open_loop(50, 2, lambda: post(app, {**ASK, "model": "auto"}))
            found = await open_loop(
                50, 15, lambda: post(app, {**ASK, "model": rng.choice(kinds)})
            )
            return [took for (status, _), took in found if status == 200]

    took = asyncio.run(run())
    at = "/".join(f"{1000 * percentile(took, q):.1f}" for q in (50, 95, 99))
    return Finding(
        f"p50/p95/p99 {at} ms of {len(took)}",
        percentile(took, 50) <= 0.01 and percentile(took, 99) <= 0.04,
    )


FAULTS = [
    Fault(
        "T12",
        "what the gateway's own code takes, with the router's",
        "p50 ≤ 10 ms, p99 ≤ 40 ms at 50/s",
        t12,
        tier=ALONE,
    ),
    Fault("T18", "internal errors", "0 leak", t18, tier=TEST),
    Fault("T25", "an arm is scaled to zero", "0 wait, wanted", t25),
]
