"""Two-phase load: while one size is saturated by traffic that names it, does `auto` move away in time?

    python -m benchmarks.surge --url http://127.0.0.1:8000   # the running system, real models, checked answers
    python -m benchmarks.surge --url http://127.0.0.1:8000 --apart nano   # that size with a core to itself
    python -m benchmarks.surge                               # engines that only wait, in a system of its own

Four phases, `auto` at the same rate in all of them (open loop: latency counts from the time at which a request should
have left): `learn`, with a short rush on each size, so that the router has seen load, and a rest until that is over and
its replicas are gone; `before`; `surge`, in which so many clients keep asking for long answers of the size that `auto`
liked best before; `after`. `auto` is asked tasks of every kind, or with `--easy` only those that every size can do.
Sizes on a cluster have hardware of their own; here they share the processor with all else, and whoever moves away from
a busy size meets it there again: `--apart` keeps the size that will be saturated, and its further replicas, on the
first core, and all others off it. On the waiting engines each replica answers so many at a time, the rest queue, and
Serve starts and stops replicas (which takes both cores of a small machine from all others: `--replicas 1` does not).
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pandas as pd
import yaml

from assets.tasks import EASY, KINDS, Task, check, make_task
from benchmarks import surgepictures
from benchmarks.apart import Apart
from benchmarks.serving import MODELS, ROOT, configuration
from deployments import launch

PATH = "/v1/chat/completions"
OFFSET = 170  # of all ports
TOKENS = 16  # of an answer of the waiting engines
LONG, END = 450, "2"  # tokens of an answer by name on the real models, and the token that would end it sooner
EVERY_S = 0.5  # between two looks at the router's state
REST_S = 300.0  # at most, after the rush on each size
PHASES = ("learn", "before", "surge", "after")


@dataclass(frozen=True)
class Plan:
    """rate: of `auto`, requests a second. clients: that keep asking for one size in the surge. seconds: by phase.

    real: the models answer tasks, which are checked; else all answers are right. apart: who has a core to itself.
    kinds: of tasks that `auto` is asked.
    """

    rate: float
    clients: int
    seconds: dict[str, float]
    real: bool
    apart: str = ""
    kinds: tuple[str, ...] = KINDS


@dataclass
class Record:
    """rows: one an answer. states: one a look at the router."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


class Surge:
    """One run against a gateway."""

    def __init__(self, session: aiohttp.ClientSession, plan: Plan, seed: int):
        self._session, self._plan, self._random = session, plan, random.Random(seed)
        self._began, self._phase, self.record = time.perf_counter(), "learn", Record()
        self._running: set[asyncio.Task[None]] = set()

    def _task(self) -> Task:
        return make_task(self._random, self._random.choice(self._plan.kinds), wishes=False)

    async def ask(self, model: str, intended: float, kind: str) -> None:
        """One request, and a score for what `auto` chose."""
        task, phase = self._task(), self._phase
        long = self._plan.real and kind == "forced"  # it is the size that shall be busy, not the way to it
        text = f"Tell me a long story about number {self._random.random()}." if long else task.question
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        body |= {"max_tokens": LONG, "logit_bias": {END: -100}} if long else {"max_tokens": 100}
        body |= {} if self._plan.real else {"max_tokens": TOKENS}
        row: dict[str, Any] = {"phase": phase, "kind": kind, "at_s": intended - self._began, "asked": model}
        try:
            async with self._session.post(PATH, json=body) as response:
                answer, headers = await response.json(), response.headers
                row |= {"status": response.status, "latency_s": time.perf_counter() - intended}
        except (aiohttp.ClientError, TimeoutError) as error:
            self.record.rows.append(row | {"status": type(error).__name__})
            return
        row["model"] = headers.get("x-router-model", "")
        self.record.rows.append(row)
        if response.status == 200 and kind == "auto":
            right = not self._plan.real or check(task, answer["choices"][0]["message"]["content"] or "")
            row["right"] = right
            score = {"decision_id": headers["x-router-decision-id"], "score": float(right), "source": "program"}
            async with self._session.post("/v1/feedback", json=score):
                pass

    async def auto(self, seconds: float) -> None:
        """The open loop."""
        begins = intended = time.perf_counter()
        while (intended := intended + self._random.expovariate(self._plan.rate)) < begins + seconds:
            if (wait := intended - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self._start(self.ask("auto", intended, "auto"))
        await asyncio.sleep(max(0.0, begins + seconds - time.perf_counter()))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def rush(self, model: str, clients: int, seconds: float) -> None:
        """The closed loop on one size."""
        ends = time.perf_counter() + seconds

        async def client() -> None:
            while (now := time.perf_counter()) < ends:
                await self.ask(model, now, "forced")

        await asyncio.gather(*(client() for _ in range(clients)))

    async def watch(self) -> None:
        """Look at the router's state until cancelled."""
        while True:
            async with self._session.get("/v1/router/state") as response:
                models = (await response.json())["models"]
            row: dict[str, Any] = {"at_s": time.perf_counter() - self._began, "phase": self._phase}
            for name, model in models.items():
                if "chat" in model["tasks"]:
                    row |= {f"replicas/{name}": model["replicas"], f"in_flight/{name}": model["in_flight"]}
            self.record.states.append(row)
            await asyncio.sleep(EVERY_S)

    async def run(self, names: list[str]) -> str:
        """All phases; the size that was saturated."""
        watching, favourite, seconds = [asyncio.create_task(self.watch())], "", self._plan.seconds
        watching += [asyncio.create_task(Apart(self._plan.apart).keep())] if self._plan.apart else []
        for phase in PHASES:
            self._phase = phase
            work = [self.auto(seconds[phase])]
            if phase == "learn":
                work.append(self._taste(names, seconds[phase]))
            if phase == "surge":
                chosen = Counter(r["model"] for r in self.record.rows if r["phase"] == "before" and r.get("model"))
                favourite = self._plan.apart or chosen.most_common(1)[0][0]
                work.append(self.rush(favourite, self._plan.clients, seconds[phase]))
            await asyncio.gather(*work)
            if phase == "learn":
                await self._rest()
        await asyncio.gather(*self._running)
        for task in watching:
            task.cancel()
        return favourite

    async def _rest(self) -> None:
        """Until nothing is in flight and there are as many replicas as at the beginning."""
        await asyncio.gather(*self._running)
        first, ends = self.record.states[0], time.perf_counter() + REST_S
        while time.perf_counter() < ends:
            await asyncio.sleep(2 * EVERY_S)
            now = self.record.states[-1]
            if all(now[k] <= (first[k] if "replicas" in k else 0) for k in now if "/" in k):
                return

    async def _taste(self, names: list[str], seconds: float) -> None:
        """A rush on each size in turn, half of the time."""
        for clients in (self._plan.clients // 3, self._plan.clients):
            for name in names:
                await self.rush(name, clients, seconds / 4 / len(names))
        await asyncio.sleep(seconds / 4)


def summary(record: Record, favourite: str) -> dict[str, Any]:
    """What came of it."""
    rows = pd.DataFrame(record.rows)
    auto, states = rows[(rows.kind == "auto") & (rows.status == 200)], pd.DataFrame(record.states)
    found: dict[str, Any] = {"saturated": favourite}
    for phase in PHASES[1:]:
        there = auto[auto.phase == phase]
        found[phase] = {
            "requests": len(there),
            "p50_s": float(there.latency_s.quantile(0.5)),
            "p95_s": float(there.latency_s.quantile(0.95)),
            "right": float(there.right.mean()),
            "shares": {n: float(c) for n, c in there.model.value_counts(normalize=True).items()},
        }
    there = rows[(rows.kind == "forced") & (rows.phase == "surge")]
    found["forced"] = {
        "requests": len(there),
        "p95_s": float(there.latency_s.quantile(0.95)),
        "refused": int((there.status != 200).sum()),
    }
    found["failed"] = int(((rows.kind == "auto") & (rows.status != 200)).sum())
    found["p95, surge / before"] = found["surge"]["p95_s"] / found["before"]["p95_s"]
    column = f"replicas/{favourite}"
    found["replicas"] = {p: int(states[states.phase == p][column].max()) for p in PHASES[1:]}
    found["replicas"]["end"] = int(states[column].iloc[-1])
    return found


def own_configuration(slots: int, replicas: int) -> dict[str, Any]:
    """The waiting engines behind our gateway: so many answers at a time for each replica, one to so many replicas."""
    config = configuration()
    config["applications"] = [a for a in config["applications"] if a["name"] in (*MODELS, "gateway")]
    for number, application in enumerate(config["applications"][: len(MODELS)]):
        waits = {"echo_ttft_s": 0.05 * (1 + number), "echo_tpot_s": 0.005 * (1 + number), "echo_slots": slots}
        application["args"]["experimental_configs"] |= waits
        application["args"]["deployment_config"] = {
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": replicas,
                "target_ongoing_requests": slots,
                "upscale_delay_s": 3,
                "downscale_delay_s": 8,
                "look_back_period_s": 4,
                "metrics_interval_s": 1,
            },
            "max_ongoing_requests": 1000,
            "ray_actor_options": {"num_cpus": 0},
        }
    return config


async def played(url: str, plan: Plan, names: list[str] | None, seed: int) -> tuple[Record, str]:
    """The run against this gateway; without names, all of its sizes."""
    timeout, connector = aiohttp.ClientTimeout(120), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        if names is None:
            async with session.get("/v1/router/state") as response:
                models = (await response.json())["models"]
            names = [name for name, model in models.items() if "chat" in model["tasks"]]
        surge = Surge(session, plan, seed)
        return surge.record, await surge.run(names)


def on_waiting_engines(
    state: Path, slots: int, replicas: int, play: Callable[[str], tuple[Record, str]]
) -> tuple[Record, str]:
    """Start a system of its own, play, and end it."""
    state.mkdir(parents=True, exist_ok=True)
    for old in state.glob("journal.db*"):
        old.unlink()
    path = state / "surge.yaml"
    path.write_text(yaml.safe_dump(own_configuration(slots, replicas)))
    os.environ["RAYLLM_VLLM_ENGINE_CLS"] = "benchmarks.echo:EchoEngine"
    cluster = launch.load(path, state, OFFSET)
    try:
        launch.up(cluster)
        return play(cluster.url("gateway"))
    finally:
        launch.down(cluster)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a running gateway")
    parser.add_argument("--rate", type=float, help="of auto; 3 a second, 10 on waiting engines")
    parser.add_argument("--apart", default="", metavar="SIZE", help="keep it on a core of its own, and saturate it")
    parser.add_argument("--easy", action="store_true", help="ask auto only what every size can do")
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8, help="answers at a time of a waiting engine")
    parser.add_argument("--replicas", type=int, default=3, help="at most, of a waiting engine")
    parser.add_argument("--seconds", type=float, nargs=4, default=[40, 40, 60, 40], metavar=("L", "B", "S", "A"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=ROOT / "var/surge")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, default=ROOT / "var/surge.png")
    options = parser.parse_args()
    seconds, kinds = dict(zip(PHASES, options.seconds, strict=True)), EASY if options.easy else KINDS
    real, rate = bool(options.url), options.rate or (3.0 if options.url else 10.0)
    plan = Plan(rate, options.clients, seconds, real, options.apart, kinds)

    def play(url: str) -> tuple[Record, str]:
        return asyncio.run(played(url, plan, None, options.seed))

    if options.url:
        record, favourite = play(options.url)
    else:
        record, favourite = on_waiting_engines(options.state, options.slots, options.replicas, play)
    found = summary(record, favourite)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"plan": vars(plan), "summary": found, **vars(record)}))
    surgepictures.draw(pd.DataFrame(record.rows), pd.DataFrame(record.states), favourite, options.picture)
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
