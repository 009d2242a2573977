"""Checks of a running system (see catalogue.py).

Checks that kill or inspect processes touch only those with the mark of the system in `--state`, which
deployments/operations/launcher.py sets, since other systems on this machine have processes with the same names.
Requests carry the key in ROUTER_API_KEY if it is set.
"""

import asyncio
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import psutil
import pytest

from assets.tasks import make_task
from deployments.operations.launcher import MARK, ROOT, Cluster, load
from tests.faults.catalogue import ALONE, Fault, Finding, System
from tests.faults.overload import open_loop, percentile
from tests.support.balancer import KEYLESS, Balancer, within
from tests.support.debian import debian
from tests.support.hostile_input import CORPUS, JSON, openai_shape

CHAT = "/v1/chat/completions"
ASK = {
    "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
    "temperature": 0,
    "max_tokens": 16,
}
# requests a second; low, since the generator shares the processor with the system
RATE = 10.0


def headers() -> dict[str, str]:
    """Headers of a request, with the API key if one is set."""
    key = os.environ.get("ROUTER_API_KEY")
    return {**JSON, **({"authorization": f"Bearer {key}"} if key else {})}


def cluster(system: System) -> Cluster:
    """The launcher's cluster of a system; the port of its URL gives the offset of all ports.

    It leaves out the models that the system was started without: those in ROUTER_WITHOUT.
    """
    assert system.state is not None
    config = ROOT / "serve_config.yaml"
    without = os.environ.get("ROUTER_WITHOUT", "").split()
    return load(
        config,
        system.state,
        (httpx.URL(system.url).port or 80) - load(config, system.state, 0).gateway_port,
        without=without,
    )


async def ask(client: httpx.AsyncClient, stream: bool = False) -> str:
    """Ask once; returns `ok`, `refused` (failed before the first byte) or `broken` (failed after it)."""
    began = False
    try:
        async with client.stream(
            "POST", CHAT, json={**ASK, "model": "auto", "stream": stream}
        ) as answer:
            if answer.status_code != 200:
                return "refused"
            text = ""
            async for part in answer.aiter_text():
                began = True
                text = text + part
            cut_off = stream and "[DONE]" not in text
            return "broken" if cut_off or '"server_error"' in text else "ok"
    except httpx.HTTPError:
        return "broken" if began else "refused"


def killed(
    system: System, title: str, times: int, bar: Callable[[Counter[str], float], bool]
) -> Finding:
    """Kill the system's process with this title every 20 s, under load of which half is streamed."""
    assert system.state is not None
    state = system.state

    async def run() -> tuple[Counter[str], list[float], int]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(
            base_url=system.url, timeout=90, limits=limits, headers=headers()
        ) as client:
            recoveries: list[float] = []
            count = 0

            async def kill() -> None:
                nonlocal count
                for _ in range(times):
                    await asyncio.sleep(5)
                    for process in processes(state, title)[:1]:
                        process.kill()  # psutil checks that the process id was not reused
                        count += 1
                    began = time.monotonic()
                    good = 0
                    while good < 10 and time.monotonic() - began < 60:
                        good = good + 1 if await ask(client) == "ok" else 0
                    recoveries.append(time.monotonic() - began)
                    await asyncio.sleep(15)

            streamed = iter(range(10**9))
            seconds = 25.0 * times
            answers, _ = await asyncio.gather(
                open_loop(
                    RATE, seconds, lambda: ask(client, stream=next(streamed) % 2 == 0)
                ),
                kill(),
            )
            return Counter(how for how, _ in answers), recoveries, count

    if not processes(state, title):
        return Finding(f"the system in {state} has no process '{title}'", False)
    statuses, recoveries, count = asyncio.run(run())
    worst = max(recoveries)
    figure = (
        f"{count} kills, {sum(statuses.values())} requests: {statuses['refused']} failed before the first byte, "
        f"{statuses['broken']} streams broke, well after {statistics.median(recoveries):.1f} s, at most {worst:.1f}"
    )
    return Finding(figure, count == times and bar(statuses, worst))


def processes(state: Path, title: str = "") -> list[psutil.Process]:
    """Processes of the system in this folder whose command line contains the title."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mine = process.environ().get(MARK) == str(state.resolve())
            if (
                mine
                and title in " ".join(process.cmdline())
                and process.pid != os.getpid()
            ):
                found.append(process)
    return found


def t1(system: System) -> Finding:
    """Kill a replica of a model."""
    return killed(
        system,
        "ServeReplica:small:",
        3,
        lambda s, worst: s["refused"] == 0 and worst <= 15,
    )


def t3(system: System) -> Finding:
    """Kill the router actor."""
    return killed(
        system,
        "ray::Router",
        3,
        lambda s, worst: s["refused"] + s["broken"] == 0 and worst <= 5,
    )


def t4(system: System) -> Finding:
    """Kill Serve's controller."""
    return killed(
        system,
        "ray::ServeController",
        2,
        lambda s, worst: s["refused"] + s["broken"] == 0,
    )


def t11(system: System) -> Finding:
    """Send ten times the usual load for half a minute, all of it long answers of the largest model.

    Uses aiohttp: httpx searches all of its connections for each request, and about a thousand are open here.
    """
    rng = random.Random(11)
    tasks = [make_task(rng, "story", wishes=False).question for _ in range(50)]

    async def run() -> list[tuple[tuple[int, float, str], float]]:
        limits = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(120)
        async with aiohttp.ClientSession(
            system.url, connector=limits, timeout=timeout, headers=headers()
        ) as client:

            async def once() -> tuple[int, float, str]:
                asked = {"messages": [{"role": "user", "content": rng.choice(tasks)}]}
                began = time.perf_counter()
                async with client.post(
                    CHAT, json={**ASK, **asked, "model": "large", "max_tokens": 400}
                ) as answer:
                    return (
                        answer.status,
                        time.perf_counter() - began,
                        answer.headers.get("retry-after", ""),
                    )

            return await open_loop(10 * RATE, 30.0, once)

    answers = [answer for answer, _ in asyncio.run(run())]
    statuses = Counter(status for status, _, _ in answers)
    late = [seconds for status, seconds, _ in answers if status == 429]
    retried = all(after.isdigit() for status, _, after in answers if status == 429)
    milliseconds = [1000 * percentile(late, q) for q in (50, 99)]
    figure = f"{dict(statuses)}, 429 in {milliseconds[0]:.0f} ms (median), {milliseconds[1]:.0f} (p99)"
    # without any 429 the load was no overload
    return Finding(
        figure, set(statuses) == {200, 429} and retried and percentile(late, 50) < 0.1
    )


def t15(system: System) -> Finding:
    """Open 60 streams whose clients leave after the first chunk."""

    async def run() -> float:
        async with httpx.AsyncClient(
            base_url=system.url, timeout=60, headers=headers()
        ) as client:
            body = {**ASK, "model": "auto", "stream": True, "max_tokens": 400}

            async def leave() -> None:
                async with client.stream("POST", CHAT, json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        return

            await asyncio.gather(*(leave() for _ in range(60)), return_exceptions=True)
            began = time.monotonic()
            while time.monotonic() - began < 30:
                models = (await client.get("/v1/router/state")).json()["models"]
                if not sum(model["in_flight"] for model in models.values()):
                    break
                await asyncio.sleep(0.1)
            return time.monotonic() - began

    freed_s = asyncio.run(run())
    return Finding(f"free after {freed_s:.1f} s", freed_s <= 2)


def t16(system: System) -> Finding:
    """Send the corpus of bad input through the real proxy."""
    server_errors = []
    shaped = 0
    with httpx.Client(base_url=system.url, timeout=60, headers=headers()) as client:
        for name, (content, _) in CORPUS.items():
            answer = client.post(CHAT, content=content)
            server_errors += [name] if answer.status_code >= 500 else []
            with suppress(ValueError):
                shaped += openai_shape(answer.json())
    figure = (
        f"{len(server_errors)} of {len(CORPUS)} were 5xx {server_errors or ''}, "
        f"{shaped / len(CORPUS):.0%} in shape"
    )
    return Finding(figure, not server_errors and shaped == len(CORPUS))


def t17(system: System) -> Finding:
    """Send headers that could change how a request is served; the load balancer must strip them."""
    try:
        debian("haproxy", "haproxy")
    except pytest.skip.Exception:
        changed = effective_headers(system.url)
        return Finding(
            f"no load balancer here; without one {len(changed)} had an effect {changed or ''}",
            not changed,
        )
    gateway: Any = SimpleNamespace(port=httpx.URL(system.url).port or 80)
    with tempfile.TemporaryDirectory() as folder:
        balancer = Balancer(Path(folder), [gateway, gateway], KEYLESS)
        try:
            within(10, lambda: httpx.get(f"{balancer.url}/readyz").status_code == 200)
            behind = effective_headers(balancer.url)
            bare = effective_headers(system.url)
        finally:
            balancer.close()
    return Finding(
        f"{len(behind)} had an effect {behind or ''}; without the balancer {len(bare)} {bare or ''}",
        not behind,
    )


def effective_headers(url: str) -> list[str]:
    """Those of ten hostile headers that had an effect."""
    sets: list[dict[str, Any]] = [
        {"x-request-timeout-seconds": value} for value in ("0", "-1", "nan", "0.001")
    ]
    sets += [
        {"x-request-disconnect-disabled": "1"},
        {"x-session-id": "a"},
        {"x-router-model": "large"},
    ]
    sets += [
        {"serve_multiplexed_model_id": "x"},
        {"x-request-id": "a" * 10_000},
        {"x-big": "a" * 100_000},
    ]
    changed = []
    with httpx.Client(base_url=url, timeout=60, headers=headers()) as client:
        for extra in sets:
            try:
                answer = client.post(CHAT, json={**ASK, "model": "auto"}, headers=extra)
                refusable = "x-big" in extra or "x-request-id" in extra  # too large
                good = answer.status_code == 200 or (
                    refusable and 400 <= answer.status_code < 500
                )
            except httpx.HTTPError:
                good = False
            if not good:
                ((name, value),) = extra.items()
                changed.append(f"{name}: {value[:8]}")
    return changed


def t26(system: System) -> Finding:
    """List the ports of the system that listen on more than loopback."""
    assert system.state is not None
    mine = {process.pid for process in processes(system.state)}
    outside = {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in mine
        if connection.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")
    }
    allowed = {httpx.URL(system.url).port or 80}
    return Finding(
        f"ports open to others: {sorted(outside - allowed) or 'none'}",
        not outside - allowed,
    )


FAULTS = [
    Fault(
        "T1",
        "a model's replica is killed",
        "0 before the first byte, ≤ 15 s",
        t1,
        needs="state",
    ),
    Fault("T3", "the router actor is killed", "0 failed, ≤ 5 s", t3, needs="state"),
    Fault("T4", "Serve's controller is killed", "0 failed", t4, needs="state"),
    Fault(
        "T11",
        "overload of the running system",
        "200 or 429 only, 429 in < 100 ms",
        t11,
        needs="url",
        tier=ALONE,
    ),
    Fault("T15", "60 clients of the running system leave", "≤ 2 s", t15, needs="url"),
    Fault("T16", "bad input, through the proxy", "0, 100 %", t16, needs="url"),
    Fault("T17", "hostile headers", "0 behind the load balancer", t17, needs="url"),
    Fault("T26", "sockets", "none but the gateway's", t26, needs="state"),
]
