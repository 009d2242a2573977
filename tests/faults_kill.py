"""Kills, hangs and whole restarts of a running system (see faults_live.py), and the two soaks: `--minutes`."""

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

from deployments.journal import Journal
from deployments.memory import Memory
from policies.registry import make_policy
from tests.balancer import KEYLESS, Balancer, within
from tests.faults import Fault, Finding, System
from tests.faults_live import ASK, CHAT, RATE, ask, cluster, headers, killed, processes
from tests.faults_load import open_loop, percentile
from tests.test_durability import difference, settled

VICTIMS = ("ServeReplica:small:", "ServeReplica:gateway:Ingress", "ray::Router", "haproxy -db", "ray::ServeController")
KILL_EVERY_S = 10.0


def answers(system: System, model: str, patience_s: float = 180.0) -> float:
    """Seconds until this model has answered."""
    began = time.monotonic()
    with httpx.Client(base_url=system.url, timeout=10, headers=headers()) as client:
        while time.monotonic() - began < patience_s:
            with suppress(httpx.HTTPError):
                if client.post(CHAT, json={**ASK, "model": model}).status_code == 200:
                    break
            time.sleep(0.5)
    return time.monotonic() - began


def engine_of(system: System, model: str) -> tuple[psutil.Process, psutil.Process, list[psutil.Process]]:
    """A replica that is ready, its engine, and all its descendants; an earlier check may have killed the one before."""
    assert system.state is not None
    answers(system, model)
    for replica in processes(system.state, f"ServeReplica:{model}:"):
        family = replica.children(recursive=True)
        for engine in family:
            if "EngineCore" in " ".join(engine.cmdline()):
                return replica, engine, family
    raise AssertionError(f"no replica of {model} has an engine")


def t2_orphans(system: System) -> Finding:
    """A replica is killed; its engine and that one's workers are other processes."""
    replica, _, family = engine_of(system, "small")
    replica.kill()
    began = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=30)
    gone_s = time.monotonic() - began
    back_s = answers(system, "small")
    figure = (
        f"{len(alive)} of its {len(family)} processes left after {gone_s:.1f} s; another answers after {back_s:.0f} s"
    )
    return Finding(figure, not alive)


def t2_hang(system: System) -> Finding:
    """An engine is stopped (SIGSTOP), with a request in flight."""
    replica, engine, family = engine_of(system, "nano")
    engine.suspend()
    began = time.monotonic()
    try:
        with suppress(httpx.HTTPError):
            httpx.post(system.url + CHAT, json={**ASK, "model": "nano"}, headers=headers(), timeout=2)
        psutil.wait_procs([replica], timeout=120)
        noticed_s = time.monotonic() - began
        _, alive = psutil.wait_procs(family, timeout=15)
    finally:
        with suppress(psutil.Error):
            engine.resume()
    back_s = answers(system, "nano")
    figure = f"replaced after {noticed_s:.0f} s, {len(alive)} processes left, another answers {back_s:.0f} s later"
    return Finding(figure, noticed_s <= 60 and not alive and back_s < 180)


def t4(system: System) -> Finding:
    """The proxy in front of the ingress dies; this machine has one."""
    return killed(system, "haproxy -db", 2, lambda _, worst: worst <= 5)


def t5(system: System) -> Finding:
    """Every process is killed under load, and the system started again. Its journal holds all that it ever learned."""
    assert system.state is not None
    whole, state = cluster(system), system.state
    given: list[str] = []

    async def load() -> None:
        async with httpx.AsyncClient(base_url=system.url, timeout=10, headers=headers()) as client:

            async def once() -> None:
                with suppress(httpx.HTTPError, KeyError):
                    answer = await client.post(CHAT, json={**ASK, "model": "auto"})
                    await asyncio.sleep(0.5)  # before that it may be on its way to the router, and a score held for it
                    score = {"decision_id": answer.headers["x-router-decision-id"], "score": 0.5, "source": "t5"}
                    if (await client.post("/v1/feedback", json=score)).status_code == 200:
                        given.append(score["decision_id"])

            async def end() -> None:
                await asyncio.sleep(10)
                while victims := whole.processes():  # one may have begun another before it died
                    for process in victims:
                        with suppress(psutil.Error):
                            process.kill()
                    await asyncio.to_thread(psutil.wait_procs, victims, 20)

            await asyncio.gather(open_loop(RATE, 12, once), end())

    asyncio.run(load())
    copy = state / "t5.db"
    with sqlite3.connect(state / "journal.db") as source, sqlite3.connect(copy) as target:
        source.backup(target)
    journal = Journal(f"sqlite:///{copy}")
    lost = sum(not any(getattr(e, "source", "") == "t5" for e in found) for found in journal.find_all(given).values())
    arms = next(a for a in whole.config["applications"] if a["import_path"].endswith(":gateway"))["args"]
    from deployments.settings import GatewaySettings

    settings = GatewaySettings.model_validate(arms)
    memory = Memory(journal, lambda: make_policy(settings.policy.name, settings.arms(), settings.policy.options))
    snapshot = settled(memory.policy, memory.sequence)  # type: ignore[arg-type]
    memory.policy = make_policy(settings.policy.name, settings.arms(), settings.policy.options)
    memory._restore(whole=True)
    anew = settled(memory.policy, memory.sequence)  # type: ignore[arg-type]
    apart = difference(snapshot, anew)
    copy.unlink()
    began = time.monotonic()
    launch = [sys.executable, "-m", "deployments.launch", "up", "--state", str(state), "--offset", str(whole.offset)]
    subprocess.run(launch, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
    up_s = time.monotonic() - began
    after = httpx.get(f"{system.url}/v1/router/state", headers=headers(), timeout=30).json()["decisions"]
    figure = (
        f"{lost} of {len(given)} acknowledged scores lost, posterior from the snapshot and from all rows {apart:.0e} "
    )
    figure += f"apart, decision {after} of at least {memory.sequence}, up after {up_s:.0f} s"
    return Finding(figure, bool(given) and lost == 0 and apart <= 1e-9 and after >= memory.sequence)


def t6(system: System) -> Finding:
    """Something is killed every 10 s; asked through the load balancer, where there is one, or else directly."""
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
    """One of VICTIMS every KILL_EVERY_S, under load at this URL."""
    assert system.state is not None
    state, rng, kills, seconds = system.state, random.Random(6), Counter[str](), 60.0 * system.minutes
    good: list[float] = []
    lost: Counter[str] = Counter()  # by who was killed last
    last = ""

    async def run() -> Counter[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=url, timeout=90, limits=limits, headers=headers()) as client:

            async def once() -> str:
                how = await ask(client, stream=rng.random() < 0.5)
                if how == "ok":
                    good.append(time.monotonic())
                else:
                    lost[last] += 1
                return how

            async def kill() -> None:
                nonlocal last
                ends = time.monotonic() + seconds - 15  # and then it has to get well
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
    back_s = answers(system, "small")
    figure = (
        f"{system.minutes:g} min, {sum(kills.values())} kills {dict(kills)}: {share:.2%} of {sum(statuses.values())} "
    )
    how = f"{statuses['refused']} failed, {statuses['broken']} streams broke: {dict(lost)}"
    figure += f"answered ({how}), longest gap {outage:.1f} s, "
    return Finding(figure + f"well {back_s:.0f} s after the last", share >= 0.99 and back_s < 180)


def t21(system: System) -> Finding:
    """Load with a tenth of the clients leaving; memory and files of every kind of process."""
    assert system.state is not None
    state, seconds, rng = system.state, 60.0 * system.minutes, random.Random(21)
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
        async with httpx.AsyncClient(base_url=system.url, timeout=60, headers=headers()) as client:

            async def once() -> None:
                start = time.monotonic()
                with suppress(httpx.HTTPError):
                    if rng.random() < 0.1:
                        body = {**ASK, "model": "auto", "stream": True, "max_tokens": 200}
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
                                seen[title].append((now, process.memory_info().rss / 2**20, process.num_fds()))
                    await asyncio.sleep(10)

            await asyncio.gather(open_loop(2 * RATE, seconds, once), sample())

    asyncio.run(run())
    parts, steepest, warm_s = [], 0.0, seconds / 4
    for title, rows in seen.items():
        late = np.array([row for row in rows if row[0] >= warm_s])
        slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * 3600
        parts.append(f"{title.split(':')[-1]} {slope:+.1f} MB/h, {int(late[-1, 2] - late[0, 2]):+d} files")
        steepest = max(steepest, slope if title.startswith(("gateway", "ray::Router", "ray::Tracker")) else 0.0)
    thirds = [percentile([s for t, s in took if a <= t / seconds < a + 0.25], 99) for a in (0.25, 0.75)]
    drift = thirds[1] / thirds[0] - 1
    figure = f"{system.minutes:g} min, {len(took)} answered: {'; '.join(parts)}; p99 {drift:+.0%}"
    return Finding(figure, steepest < 5 and drift < 0.1)


FAULTS = [
    Fault("T2", "a replica is killed: orphans", "0 after 30 s", t2_orphans, needs="state"),
    Fault("T2", "an engine hangs", "replaced in ≤ 60 s, 0 left", t2_hang, needs="state"),
    Fault("T4", "the proxy is killed", "≤ 5 s", t4, needs="state"),
    Fault("T5", "everything is killed under load, and started again", "0 lost, ≤ 1e-9", t5, needs="state"),
    Fault("T6", "soak: something is killed every 10 s", "≥ 99 %, well again", t6, needs="minutes"),
    Fault("T21", "soak: memory", "ours < 5 MB/h, p99 < +10 %", t21, needs="minutes"),
]
