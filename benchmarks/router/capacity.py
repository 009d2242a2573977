"""Capacity of one router, and of several that share what they learn: `python -m benchmarks.router.capacity`.

The benchmark needs no running server. Each of its three parts uses the results of the part before.

1. Measured: the Router class with its journal on disk, as the actor runs it, but without Ray's calls. Figures:
   processor time of a decision and of an outcome by the size of the batch, and of a decision by the number of arms.
2. Measured: calls from another process to a Ray actor whose methods do nothing. Figure: the processor time that a call
   itself costs the router's process.
3. Simulated by discrete events: Poisson arrivals of up to 100,000 requests a second. Each ingress batches its waiting
   requests into one call to its router (batching.py). A router serves its calls one by one in the measured times.
   Figures: how long a request waits for its decision, and how busy each router is.

Several routers can share what they learn, because posteriors add up (posterior.py): each router learns alone, and from
time to time all get the sum. The benchmark checks on the policy itself that two halves add up to the whole.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from deployments.dispatch.outcome_reporter import SEND_EVERY_S
from deployments.journal.ids import IdFactory
from deployments.router.actor import Router
from deployments.settings import GatewaySettings
from policies.events import Decision, Outcome
from policies.profiling.features import D
from policies.registry import make_policy
from policies.types import Arm, ModelState, Objective, Request, TaskProfile

BATCHES = (1, 4, 16, 64)
ARMS = (2, 4, 8, 16, 32)
DEFAULT_ARMS = 4  # arms in the measurements by batch
DECISIONS = 2_048  # measured decisions of each batch size
INGRESS_RATE = 250.0  # requests a second of one ingress in the simulation
MAX_BATCH = 64  # requests in a call, as in batching.py
MAX_CALLS = 2  # concurrent calls of an ingress, as in batching.py
REPORTERS = 8  # ingresses that report at the same time; their outcomes share a write
MAX_BUSY = 0.6  # utilisation of a router above which another one is added
RATES = (100.0, 1_000.0, 5_000.0, 10_000.0, 30_000.0, 100_000.0)


@dataclass(frozen=True)
class Costs:
    """Processor seconds of a router.

    call_s, decision_s: of a call to `decide`, and of each decision in it.
    report_s, outcome_s: of a call to `observe`, and of each outcome in it.
    """

    call_s: float
    decision_s: float
    report_s: float
    outcome_s: float


def settings(arms: int, folder: str) -> GatewaySettings:
    """Settings of a gateway with this number of models and a journal in this folder."""
    models = {
        f"arm{k}": {"output_price_usd_per_million": 0.1 * 2.0**k} for k in range(arms)
    }
    given = {
        "models": models,
        "journal": f"sqlite:///{folder}/journal.db",
        "profiler": {"embedder": "assets/embedder"},
    }
    return GatewaySettings.model_validate(given)


def requests(
    identity: IdFactory, arms: int, count: int, rng: np.random.Generator
) -> list[Request]:
    """Requests like those of an ingress, with random features."""
    x = rng.uniform(-0.5, 0.5, (count, D))
    x[:, 0] = 1.0
    chances = {f"arm{k}": 0.5 for k in range(arms)}
    return [
        Request(
            identity.new_id(time.time()),
            TaskProfile(
                row,
                "chat",
                "question",
                100,
                reasons=("kind 'question'",),
                sufficiency=chances,
            ),
            Objective(0.4, 1500.0),
            prompt_hash="0" * 32,
        )
        for row in x
    ]


def outcome_of(decision: Decision, rng: np.random.Generator) -> Outcome:
    """A random outcome of an answer that was not streamed."""
    tokens = int(rng.integers(1, 60))
    latency_s = float(rng.lognormal(-2, 0.5))
    return Outcome(
        decision.id, "ok", 0.0, latency_s, 100, tokens, 1e-6 * tokens, "stop"
    )


async def measure(arms: int, batch: int, count: int) -> dict[str, float]:
    """Median microseconds of processor time for a decision and for an outcome, in calls of this size.

    The outcomes include the time of the journal's writer thread.
    """
    rng = np.random.default_rng(0)
    took = []
    with tempfile.TemporaryDirectory() as folder:
        router = Router(settings(arms, folder), lambda _: {})
        identity = IdFactory(await router.salt())
        await router.snapshot()  # every ingress does so at its start
        for number in range(2 + count // batch // REPORTERS):
            asked = [requests(identity, arms, batch, rng) for _ in range(REPORTERS)]
            clock = time.process_time_ns
            began = clock()
            made = [
                await router.decide(given, "ingress", {"arm0": 2}) for given in asked
            ]
            decided = clock()
            ended = [
                [(decision, outcome_of(decision, rng)) for decision in decisions]
                for decisions in made
            ]
            ready = clock()
            await asyncio.gather(
                *(
                    router.observe(pairs, str(i), {"arm0": 2})
                    for i, pairs in enumerate(ended)
                )
            )
            if number >= 2:
                took.append((decided - began, clock() - ready))
    decide, observe = np.array(took).T / 1000 / batch / REPORTERS
    return {
        "arms": arms,
        "batch": batch,
        "decide_us": float(np.median(decide)),
        "observe_us": float(np.median(observe)),
        "decisions_per_s": 1e6 / float(np.median(decide)),
    }


class Idle:
    """An actor with the arguments and results of the router, which does no work."""

    def __init__(self, decisions: list[Decision]):
        self._decisions = decisions

    async def decide(
        self, asked: list[Request], ingress: str, in_flight: dict[str, int]
    ) -> list[Decision]:
        """Return prepared decisions."""
        return self._decisions[: len(asked)]

    async def observe(
        self,
        ended: list[tuple[Decision, Outcome]],
        ingress: str,
        in_flight: dict[str, int],
    ) -> None:
        """Do nothing."""

    async def used_s(self) -> float:
        """Processor seconds of this process so far."""
        return time.process_time()


async def measure_calls(address: str, count: int) -> list[dict[str, float]]:
    """Microseconds of the actor's processor time for a call that does nothing, by the size of its batch."""
    import ray

    rng = np.random.default_rng(0)
    rows = []
    policy = make_policy("thompson", settings(DEFAULT_ARMS, "/tmp").arms(), {})
    asked = requests(IdFactory(b"0" * 32), DEFAULT_ARMS, max(BATCHES), rng)
    decisions = policy.decide(asked, {}, rng, 0)
    ray.init(address, log_to_driver=False, configure_logging=False)
    try:
        actor: Any = (
            ray.remote(Idle).options(num_cpus=0, max_concurrency=1000).remote(decisions)
        )
        outcomes = [(decision, outcome_of(decision, rng)) for decision in decisions]
        loads: dict[str, list[Any]] = {"decide": asked, "observe": outcomes}
        for verb, batch in product(loads, BATCHES):
            method = getattr(actor, verb)
            load = loads[verb][:batch]
            for turn in range(2):  # the first only warms up
                before = await actor.used_s.remote()
                for _ in range(count if turn else count // 10):
                    await method.remote(load, "ingress", {"arm0": 2})
                used = await actor.used_s.remote() - before
            rows.append({"call": verb, "batch": batch, "us": 1e6 * used / count})
    finally:
        ray.shutdown()
    return rows


def fit_line(batch: list[int], us: list[float]) -> tuple[float, float]:
    """Seconds of a call and of each item in it: least squares on the relative errors of microseconds a call."""
    x = np.array(batch, float)
    y = np.array(us)
    design = np.stack([1 / y, x / y], axis=1)
    fixed, each = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0]
    return max(float(fixed), 0.0) / 1e6, max(float(each), 0.0) / 1e6


def costs(measured: pd.DataFrame, calls: pd.DataFrame) -> Costs:
    """Costs fitted to the measurements as straight lines over the size of the batch."""
    alone = (
        measured[measured.arms == DEFAULT_ARMS]
        .drop_duplicates("batch")
        .set_index("batch")
    )
    found = []
    for verb in ("decide", "observe"):
        way = calls[calls.call == verb].set_index("batch").us
        each = alone[f"{verb}_us"]
        found += fit_line(list(BATCHES), [float(each[b] * b + way[b]) for b in BATCHES])
    return Costs(*found)


def simulate(
    rate: float, routers: int, costs: Costs, seconds: float, seed: int = 0
) -> dict[str, float]:
    """Simulate one router of several, with its ingresses and its share of the requests, by discrete events.

    An ingress sends its waiting requests in one call as soon as fewer than MAX_CALLS of its calls are in flight. The
    router serves calls in the order of their arrival. Reports of outcomes also take the router's time.
    """
    rng = np.random.default_rng(seed)
    mine = rate / routers
    ingresses = max(1, round(mine / INGRESS_RATE))
    count = rng.poisson(mine * seconds)
    times = np.sort(rng.uniform(0, seconds, count))
    at = rng.integers(0, ingresses, count)
    every = np.concatenate(
        [np.arange(i % 50 / 1000, seconds, SEND_EVERY_S) for i in range(ingresses)]
    )
    reports = deque(np.sort(every).tolist())
    per_report = mine / ingresses * SEND_EVERY_S
    waiting: list[deque[float]] = [deque() for _ in range(ingresses)]
    in_flight = [0] * ingresses
    calls = deque[tuple[float, int, list[float]]]()
    free_s = busy_s = 0.0
    waits: list[float] = []
    arrivals = deque(zip(times.tolist(), at.tolist(), strict=True))

    def send(now: float, i: int) -> None:
        while waiting[i] and in_flight[i] < MAX_CALLS:
            size = min(MAX_BATCH, len(waiting[i]))
            calls.append((now, i, [waiting[i].popleft() for _ in range(size)]))
            in_flight[i] += 1

    while arrivals or calls:
        # requests that arrive before the router is free wait at their ingress or are in flight
        horizon = max(free_s, calls[0][0]) if calls else arrivals[0][0]
        while arrivals and arrivals[0][0] <= horizon:
            now, i = arrivals.popleft()
            waiting[i].append(now)
            send(now, i)
        if not calls:
            continue
        while reports and reports[0] <= horizon:
            took = costs.report_s + costs.outcome_s * per_report
            free_s = max(free_s, reports.popleft()) + took
            busy_s = busy_s + took
        began, i, batch = calls.popleft()
        took = costs.call_s + costs.decision_s * len(batch)
        free_s = max(free_s, began) + took
        busy_s = busy_s + took
        waits += [free_s - came for came in batch]
        in_flight[i] -= 1
        send(free_s, i)
    p50, p99 = np.percentile(waits, (50, 99)) if waits else (0.0, 0.0)
    sized = {"requests_per_s": rate, "routers": routers, "ingresses_each": ingresses}
    return sized | {
        "busy": busy_s / max(seconds, free_s),
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
    }


def planned(costs: Costs, seconds: float) -> list[dict[str, float]]:
    """For each rate the smallest number of routers, a power of two, at which none is busier than MAX_BUSY.

    `routers_if_decided_there` is the number if the ingresses decide on snapshots, so that the routers only learn.
    """
    rows = []
    routers = 1
    for rate in tqdm(RATES, desc="simulating", unit="rate"):
        while (row := simulate(rate, routers, costs, seconds))["busy"] > MAX_BUSY:
            routers *= 2
        reports = max(1.0, rate / INGRESS_RATE) / SEND_EVERY_S
        learning = reports * costs.report_s + rate * costs.outcome_s
        row["routers_if_decided_there"] = ceil(learning / MAX_BUSY)
        rows.append(row)
    return rows


def merged(events: int = 2_000) -> dict[str, float]:
    """Compare one router that learns from all answers with the sum of two that learn from half of them each.

    Returns the largest difference of an expected quality, the share of equal choices and the size of the state.
    """
    arms = tuple(Arm(f"arm{k}") for k in range(DEFAULT_ARMS))
    whole, *halves = (make_policy("thompson", arms, {}) for _ in range(3))
    rng = np.random.default_rng(0)
    asked = requests(
        IdFactory(b"0" * 32), DEFAULT_ARMS, events, np.random.default_rng(1)
    )
    for i, request in enumerate(asked):
        decision = whole.decide([request], {}, rng, i)[0]
        score = float(rng.random() < 0.6)
        outcome = outcome_of(decision, rng)
        halves[i % 2].advance(i)
        for policy in (whole, halves[i % 2]):
            policy.learn(decision, outcome)
            policy.score(decision, score)
    for policy in (whole, *halves):
        policy.advance(events + 1_000)  # the same clock for all
    states = [policy.state() for policy in (whole, *halves)]
    added = {
        n: a if n.endswith("reference") else a + states[2][n]
        for n, a in states[1].items()
    }
    both = make_policy("thompson", arms, {})
    both.restore(added)
    ask = asked[:256]
    live = dict[str, ModelState]()
    for policy in (whole, both):
        policy.decide(ask[:1], live, np.random.default_rng(2), events + 1_000)
    one = whole.decide(ask, live, np.random.default_rng(2), events + 1_000)
    sum_ = both.decide(ask, live, np.random.default_rng(2), events + 1_000)
    off = 0.0
    equal = []
    for a, b in zip(one, sum_, strict=True):
        equal.append(a.arm == b.arm)
        for k in (0, 1):
            off = max(off, abs(a.estimates[k].quality - b.estimates[k].quality))
    same = float(np.mean(equal))
    return {
        "most_off": off,
        "same_choice": same,
        "kib": sum(a.nbytes for a in added.values()) / 1024,
    }


def main() -> None:
    """Measure, simulate, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="simulated seconds of each rate"
    )
    parser.add_argument(
        "--ray",
        default="local",
        help="address of a running Ray; by default one is started",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    sizes = [(DEFAULT_ARMS, batch) for batch in BATCHES]
    sizes += [(arms, 64) for arms in ARMS if arms != DEFAULT_ARMS]
    rows = []
    for arms, batch in tqdm(sizes):
        count = DECISIONS // (8 if batch < 4 else 2)
        rows.append(asyncio.run(measure(arms, batch, count)))
    measured = pd.DataFrame(rows)
    calls = pd.DataFrame(asyncio.run(measure_calls(options.ray, 1_000)))
    found = costs(measured, calls)
    result = planned(found, options.seconds)
    sums = merged()
    print(
        f"\nRouter alone, journal on, D = {D}\n\n{measured.to_markdown(index=False, floatfmt='.1f')}"
    )
    print(
        f"\ncall of an actor that does nothing, its processor time\n\n{calls.to_markdown(index=False, floatfmt='.0f')}"
    )
    print(
        f"\nprocessor time of a router: {found}\n\n{pd.DataFrame(result).to_markdown(index=False, floatfmt='.2f')}"
    )
    print(
        f"\nsum of two routers, compared with one that learned from all answers: {sums}"
    )
    if options.json:
        machine = {"cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        everything = {
            "machine": machine,
            "router": rows,
            "calls": calls.to_dict("records"),
            "costs": vars(found),
        }
        options.json.write_text(
            json.dumps(everything | {"simulated": result, "merged": sums}, indent=1)
        )


if __name__ == "__main__":
    main()
