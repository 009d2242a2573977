"""Checks of a running system: added latency, a hanging MLflow, secrets, configuration changes (see catalogue.py)."""

import asyncio
import copy
import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.faults.catalogue import ALONE, Fault, Finding, System
from tests.faults.overload import open_loop, percentile
from tests.faults.running_system import (
    ASK,
    CHAT,
    RATE,
    ask,
    cluster,
    headers,
    processes,
)

CANARY = "canary-5e1f-marmalade"


async def embeddings(
    client: httpx.AsyncClient, rate: float, seconds: float
) -> tuple[list[float], int]:
    """Ask for embeddings, whose engine takes almost no time; returns seconds of each answer, and number of failures."""

    async def once() -> int:
        with suppress(httpx.HTTPError):
            return (
                await client.post(
                    "/v1/embeddings", json={"model": "auto", "input": "Hello"}
                )
            ).status_code
        return 0

    found = await open_loop(rate, seconds, once)
    return [took for status, took in found if status == 200], sum(
        status != 200 for status, _ in found
    )


def t12(system: System) -> Finding:
    """Measure the latency that the gateway adds.

    The engine needs 0.2 ms for an embedding. Embeddings are profiled, decided and recorded like chats.
    """

    async def run() -> tuple[list[str], list[float], int]:
        figures = []
        failed = 0
        took = []
        async with httpx.AsyncClient(
            base_url=system.url, timeout=30, headers=headers()
        ) as client:
            await embeddings(client, 10, 3)
            for rate in (10, 50):
                took, bad = await embeddings(client, rate, 15)
                failed += bad
                at = "/".join(f"{1000 * percentile(took, q):.1f}" for q in (50, 95, 99))
                figures.append(f"{rate}/s: {at} ms")
        return figures, took, failed

    figures, took, failed = asyncio.run(run())
    held = (
        failed == 0 and percentile(took, 50) <= 0.010 and percentile(took, 99) <= 0.040
    )
    return Finding(f"p50/p95/p99 at {', '.join(figures)}", held)


def t14(system: System) -> Finding:
    """Stop MLflow by SIGSTOP for 30 s, so that the tracker's calls time out."""
    assert system.state is not None
    servers = processes(system.state, "mlflow")
    tracker = processes(system.state, "ray::Tracker")[0]

    async def run() -> tuple[list[float], list[float], int]:
        async with httpx.AsyncClient(
            base_url=system.url, timeout=30, headers=headers()
        ) as client:
            await embeddings(client, 10, 3)
            before, bad = await embeddings(client, 10, 30)
            for process in servers:
                process.suspend()
            try:
                during, worse = await embeddings(client, 10, 30)
            finally:
                for process in servers:
                    process.resume()
        return before, during, bad + worse

    before, during, failed = asyncio.run(run())
    grown = tracker.memory_info().rss / 2**20
    began = time.monotonic()
    status = 0
    while time.monotonic() - began < 60 and status != 200:
        with suppress(httpx.HTTPError):
            status = httpx.post(
                f"{system.url}/v1/router/versions", headers=headers(), timeout=30
            ).status_code
    caught_s = time.monotonic() - began
    p50, p99 = (
        1000 * (percentile(during, q) - percentile(before, q)) for q in (50, 99)
    )
    figure = f"{failed} of {len(before) + len(during)} failed, {p50:+.1f} ms at p50, {p99:+.1f} at p99, "
    figure += f"tracker {grown:.0f} MB, a version is published {caught_s:.1f} s after"
    return Finding(figure, failed == 0 and p50 < 1 and status == 200)


def t19(system: System) -> Finding:
    """Send a secret in 200 prompts, streams, errors and names, then search every file and page of the system for it."""
    assert system.state is not None

    async def run() -> int:
        async with httpx.AsyncClient(
            base_url=system.url, timeout=60, headers=headers()
        ) as client:

            async def once(i: int) -> None:
                text = f"{CANARY} {i}: what is 3 plus {i}?"
                body: dict[str, Any] = {
                    **ASK,
                    "model": "auto",
                    "messages": [{"role": "user", "content": text}],
                }
                body |= [
                    {},
                    {"stream": True},
                    {"max_tokens": -1},
                    {"user": CANARY},
                    {"nonsense": CANARY},
                ][i % 5]
                answer = await client.post(CHAT, json=body)
                if i % 5 == 0:
                    score = {
                        "decision_id": answer.headers["x-router-decision-id"],
                        "score": 1.0,
                    }
                    await client.post("/v1/feedback", json=score)

            for i in range(0, 200, 10):
                await asyncio.gather(*(once(j) for j in range(i, i + 10)))
            await asyncio.sleep(15)  # for buffered logs and the tracker's next run
        return 200

    sent = asyncio.run(run())
    folders = [system.state, *session(system.state)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    where = [str(path) for path in files if CANARY.encode() in path.read_bytes()]
    pages = [
        f"{system.url}/v1/router/state",
        cluster(system).url("HAProxy metrics") + "/metrics",
        *metrics(session(system.state)),
    ]
    with httpx.Client(timeout=10, headers=headers()) as client:
        where += [page for page in pages if CANARY in client.get(page).text]
    return Finding(
        f"{sent} prompts, found in {len(where)} of {len(files)} files and {len(pages)} pages {where}",
        not where,
    )


def session(state: Path) -> list[Path]:
    """Log folders of this system's Ray."""
    found = set()
    for process in processes(state, "raylet"):
        with suppress(psutil.Error):
            found |= {
                a.split("=", 1)[1]
                for a in process.cmdline()
                if a.startswith("--session_dir=")
            }
    return [Path(folder) / "logs" for folder in found]


def metrics(folders: list[Path]) -> list[str]:
    """URLs of Ray's metrics pages, from its service discovery file for Prometheus."""
    found = [
        folder.parents[1] / "prom_metrics_service_discovery.json" for folder in folders
    ]
    groups = [
        group
        for path in found
        if path.exists()
        for group in json.loads(path.read_text())
    ]
    return [
        f"http://{target}/metrics" for group in groups for target in group["targets"]
    ]


def t20(system: System) -> Finding:
    """Change the gateway's user_config every 5 s, under load."""
    whole = cluster(system)
    where = whole.url("Ray dashboard") + "/api/serve/applications/"
    http = {**whole.config["http_options"], "port": whole.gateway_port}
    seconds = 30.0
    live = list[float]()

    async def run() -> tuple[Counter[str], int, int]:
        async with httpx.AsyncClient(
            base_url=system.url, timeout=60, headers=headers()
        ) as client:

            async def learned() -> int:
                await asyncio.sleep(2)  # outcomes are reported in batches
                found: int = (await client.get("/v1/router/state")).json()["counts"][
                    "routed"
                ]
                return found

            async def change() -> None:
                for i in range(int(seconds / 5)):
                    config = {**copy.deepcopy(whole.config), "http_options": http}
                    gateway = next(
                        a
                        for a in config["applications"]
                        if a["import_path"].endswith(":gateway")
                    )
                    ingress = next(
                        d for d in gateway["deployments"] if d["name"] == "Ingress"
                    )
                    ingress["user_config"]["presets"][f"t20-{i}"] = {
                        "latency_weight": 1.0 + i
                    }
                    (await client.put(where, json=config)).raise_for_status()
                    began = time.monotonic()
                    while time.monotonic() - began < 20:
                        if f"auto:t20-{i}" in (await client.get("/v1/models")).text:
                            break
                        await asyncio.sleep(0.1)
                    live.append(time.monotonic() - began)
                    await asyncio.sleep(max(0.0, 5 - live[-1]))
                await client.put(where, json={**whole.config, "http_options": http})

            before = await learned()
            found, _ = await asyncio.gather(
                open_loop(RATE, seconds, lambda: ask(client)), change()
            )
            return Counter(how for how, _ in found), before, await learned()

    statuses, before, after = asyncio.run(run())
    failed = statuses.total() - statuses["ok"]
    figure = f"{failed} of {statuses.total()} failed in {len(live)} changes, live after {max(live):.1f} s at most, "
    return Finding(
        figure + f"decisions {before} → {after}",
        failed == 0 and max(live) <= 10 and after >= before + statuses["ok"],
    )


FAULTS = [
    Fault(
        "T12",
        "what the gateway adds",
        "p50 ≤ 10 ms, p99 ≤ 40 ms at 50/s",
        t12,
        needs="url",
        tier=ALONE,
    ),
    Fault(
        "T14", "MLflow hangs", "0 failed, p50 < +1 ms", t14, needs="state", tier=ALONE
    ),
    Fault("T19", "a secret in prompts", "0", t19, needs="state"),
    Fault(
        "T20",
        "the configuration changes under load",
        "0 failed, kept",
        t20,
        needs="state",
    ),
]
