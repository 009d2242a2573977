"""How far it carries: `python -m benchmarks.scale`, no server needed.

Three parts, each resting on the one before.

1. Measured: the Router class alone, journal on disk, as the actor runs it, but without Ray's calls: processor time of a
   decision and of an outcome by the size of the batch, and of a decision by the number of arms.
2. Measured: one Ray actor's method called by another process with batches of requests, in which it does nothing: what
   the call itself costs the router's process.
3. Simulated: a day's rush by discrete events. Requests arrive by a Poisson process at ingresses that gather all that
   waits into one call (coalesce.py) to their router, which serves calls one by one, in the times measured. How long a
   request waits for its decision, and how busy each router is, up to 100,000 requests a second.

Several routers share by addition (posterior.py): each learns alone, and now and then all get the sum of all sums. That
the sum of two halves is the whole is checked here on the policy itself.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from deployments.decider import OBSERVE_EVERY_S
from deployments.identity import Identity
from deployments.router import Router
from deployments.settings import GatewaySettings
from policies.features import D
from policies.registry import make_policy
from policies.types import Arm, Decision, ModelState, Objective, Outcome, Request, TaskProfile

BATCHES, ARMS = (1, 4, 16, 64), (2, 4, 8, 16, 32)
SHARED = 4  # arms of the measurements by batch
PER_SIZE = 2_048  # decisions measured of each size
INGRESS_RATE = 250.0  # requests a second of one ingress in the simulation
LIMIT, CALLS = 64, 2  # of coalesce.py
CALLERS = 8  # ingresses that report at the same time: their outcomes share a write
BUSY = 0.6  # how busy a router may be before another one is started
RATES = (100.0, 1_000.0, 5_000.0, 10_000.0, 30_000.0, 100_000.0)


@dataclass(frozen=True)
class Costs:
    """Seconds of one router's processor: of a call, of each decision in it, and the same of outcomes."""

    call_s: float
    decision_s: float
    report_s: float
    outcome_s: float


def settings(arms: int, folder: str) -> GatewaySettings:
    """A gateway of so many models with a journal in this folder."""
    models = {f"arm{k}": {"output_price_usd_per_million": 0.1 * 2.0**k} for k in range(arms)}
    given = {"models": models, "journal": f"sqlite:///{folder}/journal.db", "profiler": {"embedder": "assets/embedder"}}
    return GatewaySettings.model_validate(given)


def requests(identity: Identity, arms: int, count: int, rng: np.random.Generator) -> list[Request]:
    """Requests as an ingress makes them, with random features."""
    x = rng.uniform(-0.5, 0.5, (count, D))
    x[:, 0] = 1.0
    chances = {f"arm{k}": 0.5 for k in range(arms)}
    return [
        Request(
            identity.new_id(time.time()),
            TaskProfile(row, "chat", "question", 100, reasons=("kind 'question'",), sufficiency=chances),
            Objective(0.4, 1500.0),
            prompt_hash="0" * 32,
        )
        for row in x
    ]


def answered(decision: Decision, rng: np.random.Generator) -> Outcome:
    """An answer in one piece."""
    tokens, latency_s = int(rng.integers(1, 60)), float(rng.lognormal(-2, 0.5))
    return Outcome(decision.id, "ok", 0.0, latency_s, 100, tokens, 1e-6 * tokens, "stop")


async def measure(arms: int, batch: int, count: int) -> dict[str, float]:
    """Microseconds of processor time a decision and an outcome, over calls of this size; the journal's writing thread
    counts for the outcomes.
    """
    rng, took = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        router = Router(settings(arms, folder), lambda _: {})
        identity = Identity(await router.salt())
        await router.snapshot()  # as every ingress does at its start
        for number in range(2 + count // batch // CALLERS):
            asked, clock = [requests(identity, arms, batch, rng) for _ in range(CALLERS)], time.process_time_ns
            began = clock()
            made = [await router.decide(given, "ingress", {"arm0": 2}) for given in asked]
            decided = clock()
            ended = [[(decision, answered(decision, rng)) for decision in decisions] for decisions in made]
            ready = clock()
            await asyncio.gather(*(router.observe(pairs, str(i), {"arm0": 2}) for i, pairs in enumerate(ended)))
            if number >= 2:
                took.append((decided - began, clock() - ready))
    decide, observe = np.array(took).T / 1000 / batch / CALLERS
    return {
        "arms": arms,
        "batch": batch,
        "decide_us": float(np.median(decide)),
        "observe_us": float(np.median(observe)),
        "decisions_per_s": 1e6 / float(np.median(decide)),
    }


class Idle:
    """An actor that takes what the router takes, gives what it gives, and does nothing."""

    def __init__(self, decisions: list[Decision]):
        self._decisions = decisions

    async def decide(self, asked: list[Request], ingress: str, in_flight: dict[str, int]) -> list[Decision]:
        """As Router.decide."""
        return self._decisions[: len(asked)]

    async def observe(self, ended: list[tuple[Decision, Outcome]], ingress: str, in_flight: dict[str, int]) -> None:
        """As Router.observe."""

    async def used_s(self) -> float:
        """Processor time of this process so far."""
        return time.process_time()


async def measure_calls(address: str, count: int) -> list[dict[str, float]]:
    """Microseconds of the actor's processor for a call that does nothing, by the size of its batch."""
    import ray

    rng, rows = np.random.default_rng(0), []
    policy = make_policy("thompson", settings(SHARED, "/tmp").arms(), {})
    asked = requests(Identity(b"0" * 32), SHARED, max(BATCHES), rng)
    decisions = policy.decide(asked, {}, rng, 0)
    ray.init(address, log_to_driver=False, configure_logging=False)
    try:
        actor: Any = ray.remote(Idle).options(num_cpus=0, max_concurrency=1000).remote(decisions)
        for verb, batch in [(verb, batch) for verb in ("decide", "observe") for batch in BATCHES]:
            method = getattr(actor, verb)
            load = asked[:batch] if verb == "decide" else [(d, answered(d, rng)) for d in decisions[:batch]]
            for turn in range(2):  # the first only warms up
                before = await actor.used_s.remote()
                for _ in range(count if turn else count // 10):
                    await method.remote(load, "ingress", {"arm0": 2})
                used = await actor.used_s.remote() - before
            rows.append({"call": verb, "batch": batch, "us": 1e6 * used / count})
    finally:
        ray.shutdown()
    return rows


def line(batch: list[int], us: list[float]) -> tuple[float, float]:
    """Seconds a call and an item: least squares on microseconds a call, relative errors alike."""
    x, y = np.array(batch, float), np.array(us)
    design = np.stack([1 / y, x / y], axis=1)
    fixed, each = np.linalg.lstsq(design, np.ones(len(y)), rcond=None)[0]
    return max(float(fixed), 0.0) / 1e6, max(float(each), 0.0) / 1e6


def costs(measured: pd.DataFrame, calls: pd.DataFrame) -> Costs:
    """What was measured, as straight lines over the batch."""
    alone = measured[measured.arms == SHARED].drop_duplicates("batch").set_index("batch")
    found = []
    for verb in ("decide", "observe"):
        way = calls[calls.call == verb].set_index("batch").us
        each = alone[f"{verb}_us"]
        found += line(list(BATCHES), [float(each[b] * b + way[b]) for b in BATCHES])
    return Costs(*found)


def simulate(rate: float, routers: int, costs: Costs, seconds: float, seed: int = 0) -> dict[str, float]:
    """One router of several, its ingresses and its share of the requests, by discrete events.

    Ingress i sends what waits there in one call when fewer than CALLS of its calls are under way, at once or when one
    comes back; the router works on calls in the order in which they come. Reports of outcomes take its time, too.
    """
    rng, mine = np.random.default_rng(seed), rate / routers
    ingresses = max(1, round(mine / INGRESS_RATE))
    count = rng.poisson(mine * seconds)
    times, at = np.sort(rng.uniform(0, seconds, count)), rng.integers(0, ingresses, count)
    every = np.concatenate([np.arange(i % 50 / 1000, seconds, OBSERVE_EVERY_S) for i in range(ingresses)])
    reports = deque(np.sort(every).tolist())
    per_report = mine / ingresses * OBSERVE_EVERY_S
    waiting: list[deque[float]] = [deque() for _ in range(ingresses)]
    under_way, calls = [0] * ingresses, deque[tuple[float, int, list[float]]]()
    free_s = busy_s = 0.0
    waits: list[float] = []
    arrivals = deque(zip(times.tolist(), at.tolist(), strict=True))

    def send(now: float, i: int) -> None:
        while waiting[i] and under_way[i] < CALLS:
            calls.append((now, i, [waiting[i].popleft() for _ in range(min(LIMIT, len(waiting[i])))]))
            under_way[i] += 1

    while arrivals or calls:
        # everything that arrives before the router is free waits, or is on its way
        horizon = max(free_s, calls[0][0]) if calls else arrivals[0][0]
        while arrivals and arrivals[0][0] <= horizon:
            now, i = arrivals.popleft()
            waiting[i].append(now)
            send(now, i)
        if not calls:
            continue
        while reports and reports[0] <= horizon:
            took = costs.report_s + costs.outcome_s * per_report
            free_s, busy_s = max(free_s, reports.popleft()) + took, busy_s + took
        began, i, batch = calls.popleft()
        took = costs.call_s + costs.decision_s * len(batch)
        free_s, busy_s = max(free_s, began) + took, busy_s + took
        waits += [free_s - came for came in batch]
        under_way[i] -= 1
        send(free_s, i)
    p50, p99 = np.percentile(waits, (50, 99)) if waits else (0.0, 0.0)
    sized = {"requests_per_s": rate, "routers": routers, "ingresses_each": ingresses}
    return sized | {"busy": busy_s / max(seconds, free_s), "p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99)}


def planned(costs: Costs, seconds: float) -> list[dict[str, float]]:
    """For each rate the fewest routers, in powers of two, none of which is busier than BUSY; and how many it would
    take if the ingresses decide on snapshots, so that the routers only learn.
    """
    rows, routers = [], 1
    for rate in tqdm(RATES, desc="simulating", unit="rate"):
        while (row := simulate(rate, routers, costs, seconds))["busy"] > BUSY:
            routers *= 2
        reports = max(1.0, rate / INGRESS_RATE) / OBSERVE_EVERY_S
        rows.append(
            row | {"routers_if_decided_there": ceil((reports * costs.report_s + rate * costs.outcome_s) / BUSY)}
        )
    return rows


def merged(events: int = 2_000) -> dict[str, float]:
    """Two routers that see every other answer each, and one that sees all: how far the sum of the two is off."""
    arms = tuple(Arm(f"arm{k}") for k in range(SHARED))
    whole, *halves = (make_policy("thompson", arms, {}) for _ in range(3))
    rng, asked = np.random.default_rng(0), requests(Identity(b"0" * 32), SHARED, events, np.random.default_rng(1))
    for i, request in enumerate(asked):
        decision = whole.decide([request], {}, rng, i)[0]
        score, outcome = float(rng.random() < 0.6), answered(decision, rng)
        halves[i % 2].advance(i)
        for policy in (whole, halves[i % 2]):
            policy.learn(decision, outcome)
            policy.score(decision, score)
    for policy in (whole, *halves):
        policy.advance(events + 1_000)  # the same clock for all
    states = [policy.state() for policy in (whole, *halves)]
    added = {n: a if n.endswith("reference") else a + states[2][n] for n, a in states[1].items()}
    both = make_policy("thompson", arms, {})
    both.restore(added)
    ask, live = asked[:256], dict[str, ModelState]()
    for policy in (whole, both):
        policy.decide(ask[:1], live, np.random.default_rng(2), events + 1_000)
    one, sum_ = (p.decide(ask, live, np.random.default_rng(2), events + 1_000) for p in (whole, both))
    off = max(
        abs(a.estimates[k].quality - b.estimates[k].quality) for a, b in zip(one, sum_, strict=True) for k in (0, 1)
    )
    same = float(np.mean([a.arm == b.arm for a, b in zip(one, sum_, strict=True)]))
    return {"most_off": off, "same_choice": same, "kib": sum(a.nbytes for a in added.values()) / 1024}


def main() -> None:
    """Measure, then simulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="simulated, of each rate")
    parser.add_argument("--ray", default="local", help="address of a running Ray; else one is started for some seconds")
    parser.add_argument("--json", type=Path, help="all figures into this file")
    options = parser.parse_args()
    sizes = [(SHARED, batch) for batch in BATCHES] + [(arms, 64) for arms in ARMS if arms != SHARED]
    rows = [asyncio.run(measure(arms, batch, PER_SIZE // (8 if batch < 4 else 2))) for arms, batch in tqdm(sizes)]
    measured, calls = pd.DataFrame(rows), pd.DataFrame(asyncio.run(measure_calls(options.ray, 1_000)))
    found = costs(measured, calls)
    result = planned(found, options.seconds)
    sums = merged()
    print(f"\nRouter alone, journal on, D = {D}\n\n{measured.to_markdown(index=False, floatfmt='.1f')}")
    print(
        f"\nan actor's call that does nothing, processor time there\n\n{calls.to_markdown(index=False, floatfmt='.0f')}"
    )
    print(f"\nof a router's processor: {found}\n\n{pd.DataFrame(result).to_markdown(index=False, floatfmt='.2f')}")
    print(f"\nthe sums of two routers, added, against one that saw all: {sums}")
    if options.json:
        machine = {"cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        everything = {"machine": machine, "router": rows, "calls": calls.to_dict("records"), "costs": vars(found)}
        options.json.write_text(json.dumps(everything | {"simulated": result, "merged": sums}, indent=1))


if __name__ == "__main__":
    main()
