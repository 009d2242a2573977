"""Reaction of `auto` to a model that is saturated by requests that name it.

    # the running system, real models, checked answers
    python -m benchmarks.serving.saturation --url http://127.0.0.1:8000
    # the same, with a CPU core reserved for the model `nano`, which is saturated
    python -m benchmarks.serving.saturation --url http://127.0.0.1:8000 --apart nano
    # engines that only sleep, in a system of its own
    python -m benchmarks.serving.saturation

`auto` is asked at the same rate in four phases. The loop is open: latency counts from the intended time of sending.

- learn: each model gets a short burst, so that the router has seen load. The phase ends when the burst is over and the
  additional replicas are gone.
- before: only `auto` is asked.
- surge: clients keep asking for long answers of one model, the one that `auto` chose most often in `before`.
- after: only `auto` is asked.

`auto` is asked tasks of every kind, or with `--easy` only the tasks that every model can do.

On a cluster each model has its own hardware. On one machine all models share the processor, so requests that avoid a
busy model still compete with it. `--apart` pins the saturated model and its replicas to the first core, and all other
models to the remaining cores.

Each replica of a sleeping engine answers a fixed number of requests at a time, further requests queue, and Serve adds
and removes replicas. A starting replica occupies both cores of a small machine; `--replicas 1` avoids that.
"""

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pandas as pd
import yaml

from assets.tasks import EASY, KINDS, Task, check, make_task
from benchmarks.serving import plots
from benchmarks.serving.cpu_pinning import CpuPinning
from benchmarks.serving.systems import MODELS, ROOT, configuration
from deployments.operations import launcher

PATH = "/v1/chat/completions"
PORT_OFFSET = 170  # added to every port of the benchmark's own system
ECHO_TOKENS = 16  # tokens of an answer of the sleeping engines
LONG_TOKENS = 450  # tokens of a long answer of a real model
END_TOKEN = "2"  # its bias keeps a long answer from ending early
SAMPLE_INTERVAL_S = 0.5  # seconds between two samples of the router's state
MAX_COOLDOWN_S = 300.0  # after the bursts of the phase `learn`
PHASES = ("learn", "before", "surge", "after")


@dataclass(frozen=True)
class SaturationPlan:
    """Parameters of a run.

    rate: requests a second to `auto`.
    clients: clients of the saturated model.
    seconds: duration of each phase.
    real: whether the models are real and their answers checked; otherwise every answer counts as right.
    apart: the model with a CPU core of its own; empty for none.
    kinds: kinds of the tasks that `auto` is asked.
    """

    rate: float
    clients: int
    seconds: dict[str, float]
    real: bool
    apart: str = ""
    kinds: tuple[str, ...] = KINDS


@dataclass
class Recording:
    """The results of a run: `rows`, one for each answer, and `states`, one for each sample of the router's state."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


class SaturationRun:
    """A run against one gateway."""

    def __init__(self, session: aiohttp.ClientSession, plan: SaturationPlan, seed: int):
        self._session = session
        self._plan = plan
        self._random = random.Random(seed)
        self._began = time.perf_counter()
        self._phase = "learn"
        self.recording = Recording()
        self._running: set[asyncio.Task[None]] = set()

    def _task(self) -> Task:
        return make_task(
            self._random, self._random.choice(self._plan.kinds), wishes=False
        )

    def _body(self, model: str, task: Task, kind: str) -> dict[str, Any]:
        """Body of a request. A real model that is asked by name writes a long answer, which saturates it."""
        text = task.question
        options: dict[str, Any] = {"max_tokens": 100}
        if not self._plan.real:
            options["max_tokens"] = ECHO_TOKENS
        elif kind == "forced":
            text = f"Tell me a long story about number {self._random.random()}."
            options = {"max_tokens": LONG_TOKENS, "logit_bias": {END_TOKEN: -100}}
        message = {"role": "user", "content": text}
        return {"model": model, "messages": [message], "temperature": 0, **options}

    async def ask(self, model: str, intended: float, kind: str) -> None:
        """Send one request, and a score for it if the model is `auto`."""
        task = self._task()
        body = self._body(model, task, kind)
        row: dict[str, Any] = {
            "phase": self._phase,
            "kind": kind,
            "at_s": intended - self._began,
            "asked": model,
        }
        try:
            async with self._session.post(PATH, json=body) as response:
                answer = await response.json()
                headers = response.headers
                row |= {
                    "status": response.status,
                    "latency_s": time.perf_counter() - intended,
                }
        except (aiohttp.ClientError, TimeoutError) as error:
            self.recording.rows.append(row | {"status": type(error).__name__})
            return
        row["model"] = headers.get("x-router-model", "")
        self.recording.rows.append(row)
        if response.status == 200 and kind == "auto":
            right = not self._plan.real or check(
                task, answer["choices"][0]["message"]["content"] or ""
            )
            row["right"] = right
            score = {
                "decision_id": headers["x-router-decision-id"],
                "score": float(right),
                "source": "program",
            }
            async with self._session.post("/v1/feedback", json=score):
                pass

    async def auto(self, seconds: float) -> None:
        """Ask `auto` in an open loop."""
        begins = intended = time.perf_counter()
        while True:
            intended += self._random.expovariate(self._plan.rate)
            if intended >= begins + seconds:
                break
            # uvloop counts in milliseconds, so a sleep may end too soon
            while (wait := intended - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self._start(self.ask("auto", intended, "auto"))
        await asyncio.sleep(max(0.0, begins + seconds - time.perf_counter()))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def saturate(self, model: str, clients: int, seconds: float) -> None:
        """Ask one model by name in a closed loop."""
        ends = time.perf_counter() + seconds

        async def client() -> None:
            while (now := time.perf_counter()) < ends:
                await self.ask(model, now, "forced")

        await asyncio.gather(*(client() for _ in range(clients)))

    async def watch(self) -> None:
        """Sample the router's state until cancelled."""
        while True:
            async with self._session.get("/v1/router/state") as response:
                models = (await response.json())["models"]
            row: dict[str, Any] = {
                "at_s": time.perf_counter() - self._began,
                "phase": self._phase,
            }
            for name, model in models.items():
                if "chat" in model["tasks"]:
                    row[f"replicas/{name}"] = model["replicas"]
                    row[f"in_flight/{name}"] = model["in_flight"]
            self.recording.states.append(row)
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def run(self, names: list[str]) -> str:
        """Play all phases; returns the saturated model."""
        background = [asyncio.create_task(self.watch())]
        if self._plan.apart:
            pinning = CpuPinning(self._plan.apart)
            background.append(asyncio.create_task(pinning.run()))
        saturated = ""
        seconds = self._plan.seconds
        for phase in PHASES:
            self._phase = phase
            work = [self.auto(seconds[phase])]
            if phase == "learn":
                work.append(self._warm_up(names, seconds[phase]))
            if phase == "surge":
                saturated = self._plan.apart or self._most_chosen()
                load = self.saturate(saturated, self._plan.clients, seconds[phase])
                work.append(load)
            await asyncio.gather(*work)
            if phase == "learn":
                await self._cool_down()
        await asyncio.gather(*self._running)
        for task in background:
            task.cancel()
        return saturated

    def _most_chosen(self) -> str:
        """The model that `auto` chose most often in the phase `before`."""
        chosen: Counter[str] = Counter()
        for row in self.recording.rows:
            if row["phase"] == "before" and row.get("model"):
                chosen[row["model"]] += 1
        return chosen.most_common(1)[0][0]

    async def _cool_down(self) -> None:
        """Wait until no request is in flight and the additional replicas are gone, at most MAX_COOLDOWN_S."""
        await asyncio.gather(*self._running)
        first = self.recording.states[0]
        allowed = {}
        for name, value in first.items():
            if "/" in name:
                allowed[name] = value if "replicas" in name else 0
        ends = time.perf_counter() + MAX_COOLDOWN_S
        while time.perf_counter() < ends:
            await asyncio.sleep(2 * SAMPLE_INTERVAL_S)
            now = self.recording.states[-1]
            if all(now[name] <= limit for name, limit in allowed.items()):
                return

    async def _warm_up(self, names: list[str], seconds: float) -> None:
        """Saturate each model in turn, first with few clients and then with all."""
        for clients in (self._plan.clients // 3, self._plan.clients):
            for name in names:
                await self.saturate(name, clients, seconds / 4 / len(names))
        await asyncio.sleep(seconds / 4)


def summary(recording: Recording, saturated: str) -> dict[str, Any]:
    """Figures of a run."""
    rows = pd.DataFrame(recording.rows)
    auto = rows[(rows.kind == "auto") & (rows.status == 200)]
    states = pd.DataFrame(recording.states)
    found: dict[str, Any] = {"saturated": saturated}
    for phase in PHASES[1:]:
        answers = auto[auto.phase == phase]
        shares = answers.model.value_counts(normalize=True)
        found[phase] = {
            "requests": len(answers),
            "p50_s": float(answers.latency_s.quantile(0.5)),
            "p95_s": float(answers.latency_s.quantile(0.95)),
            "right": float(answers.right.mean()),
            "shares": {name: float(share) for name, share in shares.items()},
        }
    forced = rows[(rows.kind == "forced") & (rows.phase == "surge")]
    found["forced"] = {
        "requests": len(forced),
        "p95_s": float(forced.latency_s.quantile(0.95)),
        "refused": int((forced.status != 200).sum()),
    }
    found["failed"] = int(((rows.kind == "auto") & (rows.status != 200)).sum())
    found["p95, surge / before"] = found["surge"]["p95_s"] / found["before"]["p95_s"]
    column = f"replicas/{saturated}"
    found["replicas"] = {
        p: int(states[states.phase == p][column].max()) for p in PHASES[1:]
    }
    found["replicas"]["end"] = int(states[column].iloc[-1])
    return found


def own_configuration(slots: int, replicas: int) -> dict[str, Any]:
    """Configuration of sleeping engines behind our gateway.

    Args:
        slots: concurrent answers of a replica.
        replicas: maximum number of replicas of a model.
    """
    config = configuration()
    config["applications"] = [
        a for a in config["applications"] if a["name"] in (*MODELS, "gateway")
    ]
    for number, application in enumerate(config["applications"][: len(MODELS)]):
        waits = {
            "echo_ttft_s": 0.05 * (1 + number),
            "echo_tpot_s": 0.005 * (1 + number),
            "echo_slots": slots,
        }
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


async def play(url: str, plan: SaturationPlan, seed: int) -> tuple[Recording, str]:
    """Run the plan against a gateway; returns the recording and the saturated model."""
    timeout = aiohttp.ClientTimeout(120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        url, connector=connector, timeout=timeout
    ) as session:
        async with session.get("/v1/router/state") as response:
            models = (await response.json())["models"]
        names = [name for name, model in models.items() if "chat" in model["tasks"]]
        run = SaturationRun(session, plan, seed)
        return run.recording, await run.run(names)


@contextmanager
def sleeping_engines(state: Path, slots: int, replicas: int) -> Iterator[str]:
    """A system of its own with sleeping engines; yields the URL of its gateway."""
    state.mkdir(parents=True, exist_ok=True)
    for old in state.glob("journal.db*"):
        old.unlink()
    path = state / "surge.yaml"
    path.write_text(yaml.safe_dump(own_configuration(slots, replicas)))
    os.environ["RAYLLM_VLLM_ENGINE_CLS"] = "benchmarks.serving.echo_engine:EchoEngine"
    cluster = launcher.load(path, state, PORT_OFFSET)
    try:
        launcher.start(cluster)
        yield cluster.url("gateway")
    finally:
        launcher.stop(cluster)


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="address of a running gateway")
    parser.add_argument(
        "--rate",
        type=float,
        help="requests a second to auto; default: 3, on sleeping engines 10",
    )
    parser.add_argument(
        "--apart",
        default="",
        metavar="MODEL",
        help="pin this model to a core of its own, and saturate it",
    )
    parser.add_argument(
        "--easy",
        action="store_true",
        help="ask auto only tasks that every model can do",
    )
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument(
        "--slots", type=int, default=8, help="concurrent answers of a sleeping engine"
    )
    parser.add_argument(
        "--replicas", type=int, default=3, help="maximum replicas of a sleeping engine"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=4,
        default=[40, 40, 60, 40],
        metavar=("L", "B", "S", "A"),
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=ROOT / "var/surge")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, default=ROOT / "var/surge.png")
    return parser.parse_args()


def main() -> None:
    """Play the plan, print the figures and save the picture."""
    options = parse_arguments()
    seconds = dict(zip(PHASES, options.seconds, strict=True))
    kinds = EASY if options.easy else KINDS
    real = bool(options.url)
    rate = options.rate or (3.0 if real else 10.0)
    plan = SaturationPlan(rate, options.clients, seconds, real, options.apart, kinds)
    if real:
        recording, saturated = asyncio.run(play(options.url, plan, options.seed))
    else:
        with sleeping_engines(options.state, options.slots, options.replicas) as url:
            recording, saturated = asyncio.run(play(url, plan, options.seed))
    found = summary(recording, saturated)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(
            json.dumps({"plan": vars(plan), "summary": found, **vars(recording)})
        )
    plots.draw_saturation(
        pd.DataFrame(recording.rows),
        pd.DataFrame(recording.states),
        saturated,
        options.picture,
    )
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
