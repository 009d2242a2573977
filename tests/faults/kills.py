"""Checks that kill, stop and restart a running system, and the two soaks (see running_system.py)."""

import asyncio
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil

from deployments.journal.journal import Journal
from deployments.operations.launcher import Cluster
from deployments.router.learner import Learner
from policies.registry import make_policy
from tests.deployments.journal.test_durability import difference, settled
from tests.faults.catalogue import ALONE, Fault, Finding, System
from tests.faults.overload import open_loop, percentile
from tests.faults.running_system import (
    ASK,
    CHAT,
    RATE,
    ask,
    cluster,
    headers,
    killed,
    processes,
)
from tests.support.balancer import KEYLESS, Balancer, within

VICTIMS = (
    "ServeReplica:small:",
    "ServeReplica:gateway:Ingress",
    "ray::Router",
    "haproxy -db",
    "ray::ServeController",
)
KILL_EVERY_S = 10.0


def seconds_until_answer(system: System, model: str, timeout_s: float = 180.0) -> float:
    """Seconds until this model answers, at most about `timeout_s`."""
    began = time.monotonic()
    with httpx.Client(base_url=system.url, timeout=10, headers=headers()) as client:
        while time.monotonic() - began < timeout_s:
            with suppress(httpx.HTTPError):
                if client.post(CHAT, json={**ASK, "model": model}).status_code == 200:
                    break
            time.sleep(0.5)
    return time.monotonic() - began


def engine_of(
    system: System, model: str
) -> tuple[psutil.Process, psutil.Process, list[psutil.Process]]:
    """A ready replica, its engine, and all its descendants. Waits, since an earlier check may have killed a replica."""
    assert system.state is not None
    seconds_until_answer(system, model)
    for replica in processes(system.state, f"ServeReplica:{model}:"):
        family = replica.children(recursive=True)
        for engine in family:
            if "EngineCore" in " ".join(engine.cmdline()):
                return replica, engine, family
    raise AssertionError(f"no replica of {model} has an engine")


def t2_orphans(system: System) -> Finding:
    """Kill a replica; its engine and the engine's workers, which are processes of their own, must also end."""
    replica, _, family = engine_of(system, "small")
    replica.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=30)
    gone_s = time.monotonic() - began
    back_s = seconds_until_answer(system, "small")
    figure = (
        f"{len(alive)} of its {len(family)} processes left after {gone_s:.1f} s; "
        f"another answers after {back_s:.0f} s"
    )
    return Finding(figure, not alive)


def t2_hang(system: System) -> Finding:
    """Stop an engine by SIGSTOP, with a request in flight."""
    replica, engine, family = engine_of(system, "nano")
    engine.suspend()
    began = time.monotonic()
    try:
        with suppress(httpx.HTTPError):
            httpx.post(
                system.url + CHAT,
                json={**ASK, "model": "nano"},
                headers=headers(),
                timeout=2,
            )
        psutil.wait_procs([replica], timeout=120)
        noticed_s = time.monotonic() - began
        _, alive = psutil.wait_procs(family, timeout=15)
    finally:
        with suppress(psutil.Error):
            engine.resume()
    back_s = seconds_until_answer(system, "nano")
    figure = f"replaced after {noticed_s:.0f} s, {len(alive)} processes left, another answers {back_s:.0f} s later"
    return Finding(figure, noticed_s <= 60 and not alive and back_s < 180)


def t4(system: System) -> Finding:
    """Kill the only HAProxy in front of the ingresses."""
    return killed(system, "haproxy -db", 2, lambda _, worst: worst <= 5)


async def kill_all(system: Cluster) -> None:
    """Kill every process of a system; repeated, since a process may start another one before it is killed."""
    while victims := system.processes():
        for process in victims:
            with suppress(psutil.Error):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, victims, 20)


async def scores_until_killed(system: System) -> list[str]:
    """Ask and send scores for 12 s while all processes are killed; returns the decisions with acknowledged scores."""
    acknowledged: list[str] = []
    async with httpx.AsyncClient(
        base_url=system.url, timeout=10, headers=headers()
    ) as client:

        async def once() -> None:
            with suppress(httpx.HTTPError, KeyError):
                answer = await client.post(CHAT, json={**ASK, "model": "auto"})
                # until then the decision may not have reached the router, which would keep the score pending
                await asyncio.sleep(0.5)
                score = {
                    "decision_id": answer.headers["x-router-decision-id"],
                    "score": 0.5,
                    "source": "t5",
                }
                response = await client.post("/v1/feedback", json=score)
                if response.status_code == 200:
                    acknowledged.append(score["decision_id"])

        async def end() -> None:
            await asyncio.sleep(10)
            await kill_all(cluster(system))

        await asyncio.gather(open_loop(RATE, 12, once), end())
    return acknowledged


def t5(system: System) -> Finding:
    """Kill every process under load and start the system again; the journal must contain all acknowledged scores."""
    assert system.state is not None
    whole = cluster(system)
    state = system.state
    given = asyncio.run(scores_until_killed(system))
    copy = state / "t5.db"
    with (
        sqlite3.connect(state / "journal.db") as source,
        sqlite3.connect(copy) as target,
    ):
        source.backup(target)
    journal = Journal(f"sqlite:///{copy}")
    lost = sum(
        not any(getattr(e, "source", "") == "t5" for e in found)
        for found in journal.find_all(given).values()
    )
    arms = next(
        a for a in whole.config["applications"] if a["import_path"].endswith(":gateway")
    )["args"]
    from deployments.settings import GatewaySettings

    settings = GatewaySettings.model_validate(arms)
    memory = Learner(
        journal,
        lambda: make_policy(
            settings.policy.name, settings.arms(), settings.policy.options
        ),
    )
    snapshot = settled(memory.policy, memory.sequence)  # type: ignore[arg-type]
    memory.policy = make_policy(
        settings.policy.name, settings.arms(), settings.policy.options
    )
    memory._replay_journal(ignore_snapshot=True)
    anew = settled(memory.policy, memory.sequence)  # type: ignore[arg-type]
    apart = difference(snapshot, anew)
    copy.unlink()
    began = time.monotonic()
    launch = [
        sys.executable,
        "-m",
        "deployments.commands",
        "up",
        "--state",
        str(state),
        "--offset",
        str(whole.offset),
    ]
    subprocess.run(
        launch, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    )
    up_s = time.monotonic() - began
    after = httpx.get(
        f"{system.url}/v1/router/state", headers=headers(), timeout=30
    ).json()["decisions"]
    figure = (
        f"{lost} of {len(given)} acknowledged scores lost, posterior from the "
        f"snapshot and from all rows {apart:.0e} "
    )
    figure += (
        f"apart, decision {after} of at least {memory.sequence}, up after {up_s:.0f} s"
    )
    return Finding(
        figure, bool(given) and lost == 0 and apart <= 1e-9 and after >= memory.sequence
    )


def t6(system: System) -> Finding:
    """Kill a random process every 10 s under load; requests pass the load balancer if HAProxy is installed."""
    if shutil.which("haproxy") is None:
        return killed_at_random(system, system.url)
    gateway: Any = SimpleNamespace(port=httpx.URL(system.url).port or 80)
    with tempfile.TemporaryDirectory() as folder:
        balancer = Balancer(Path(folder), [gateway], KEYLESS)
        try:
            within(10, lambda: httpx.get(f"{balancer.url}/readyz").status_code == 200)
            return killed_at_random(system, balancer.url)
        finally:
            balancer.close()


def killed_at_random(system: System, url: str) -> Finding:
    """Kill one of VICTIMS every KILL_EVERY_S, under load at this URL."""
    assert system.state is not None
    state = system.state
    rng = random.Random(6)
    kills = Counter[str]()
    seconds = 60.0 * system.minutes
    good: list[float] = []
    lost: Counter[str] = Counter()  # by the process that was killed last
    last = ""

    async def run() -> Counter[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(
            base_url=url, timeout=90, limits=limits, headers=headers()
        ) as client:

            async def once() -> str:
                how = await ask(client, stream=rng.random() < 0.5)
                if how == "ok":
                    good.append(time.monotonic())
                else:
                    lost[last] += 1
                return how

            async def kill() -> None:
                nonlocal last
                # the last 15 s are for the recovery
                ends = time.monotonic() + seconds - 15
                while time.monotonic() < ends:
                    await asyncio.sleep(KILL_EVERY_S)
                    title = rng.choice(VICTIMS)
                    for process in processes(state, title)[:1]:
                        process.kill()
                        last = title.strip(":").split(":")[-1].split()[0]
                        kills[last] += 1

            found, _ = await asyncio.gather(open_loop(RATE, seconds, once), kill())
            return Counter(how for how, _ in found)

    statuses = asyncio.run(run())
    share = statuses["ok"] / max(1, sum(statuses.values()))
    outage = max(np.diff(sorted(good)), default=0.0)
    back_s = seconds_until_answer(system, "small")
    figure = (
        f"{system.minutes:g} min, {sum(kills.values())} kills {dict(kills)}: "
        f"{share:.2%} of {sum(statuses.values())} "
    )
    how = f"{statuses['refused']} failed, {statuses['broken']} streams broke: {dict(lost)}"
    figure += f"answered ({how}), longest gap {outage:.1f} s, "
    return Finding(
        figure + f"well {back_s:.0f} s after the last", share >= 0.99 and back_s < 180
    )


def t21(system: System) -> Finding:
    """Watch memory and open files of every kind of process under load; a tenth of the clients leave early."""
    assert system.state is not None
    state = system.state
    seconds = 60.0 * system.minutes
    rng = random.Random(21)
    seen: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    took: list[tuple[float, float]] = []
    titles = (
        "gateway:Ingress",
        "gateway:Profiler",
        "ray::Router",
        "ray::Tracker",
        "ray::ServeController",
        "haproxy -db",
    )

    async def run() -> None:
        began = time.monotonic()
        async with httpx.AsyncClient(
            base_url=system.url, timeout=60, headers=headers()
        ) as client:

            async def once() -> None:
                start = time.monotonic()
                with suppress(httpx.HTTPError):
                    if rng.random() < 0.1:
                        body = {
                            **ASK,
                            "model": "auto",
                            "stream": True,
                            "max_tokens": 200,
                        }
                        async with client.stream("POST", CHAT, json=body) as answer:
                            async for _ in answer.aiter_bytes():
                                return
                    elif await ask(client) == "ok":
                        took.append((start - began, time.monotonic() - start))

            async def sample() -> None:
                while (now := time.monotonic() - began) < seconds:
                    for title in titles:
                        for process in processes(state, title)[:1]:
                            with suppress(psutil.Error):
                                seen[title].append(
                                    (
                                        now,
                                        process.memory_info().rss / 2**20,
                                        process.num_fds(),
                                    )
                                )
                    await asyncio.sleep(10)

            await asyncio.gather(open_loop(2 * RATE, seconds, once), sample())

    asyncio.run(run())
    parts = []
    steepest = 0.0
    warm_s = seconds / 4
    for title, rows in seen.items():
        late = np.array([row for row in rows if row[0] >= warm_s])
        slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * 3600
        parts.append(
            f"{title.split(':')[-1]} {slope:+.1f} MB/h, {int(late[-1, 2] - late[0, 2]):+d} files"
        )
        if title.startswith(("gateway", "ray::Router", "ray::Tracker")):
            steepest = max(steepest, slope)
    thirds = [
        percentile([s for t, s in took if a <= t / seconds < a + 0.25], 99)
        for a in (0.25, 0.75)
    ]
    drift = thirds[1] / thirds[0] - 1
    figure = f"{system.minutes:g} min, {len(took)} answered: {'; '.join(parts)}; p99 {drift:+.0%}"
    return Finding(figure, steepest < 5 and drift < 0.1)


FAULTS = [
    Fault(
        "T2", "a replica is killed: orphans", "0 after 30 s", t2_orphans, needs="state"
    ),
    Fault(
        "T2", "an engine hangs", "replaced in ≤ 60 s, 0 left", t2_hang, needs="state"
    ),
    Fault("T4", "the proxy is killed", "≤ 5 s", t4, needs="state"),
    Fault(
        "T5",
        "everything is killed under load, and started again",
        "0 lost, ≤ 1e-9",
        t5,
        needs="state",
    ),
    Fault(
        "T6",
        "soak: something is killed every 10 s",
        "≥ 99 %, well again",
        t6,
        needs="minutes",
        tier=ALONE,
    ),
    Fault(
        "T21",
        "soak: memory",
        "ours < 5 MB/h, p99 < +10 %",
        t21,
        needs="minutes",
        tier=ALONE,
    ),
]
