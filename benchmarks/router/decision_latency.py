"""Microseconds of a decision and of learning its score, beside every peer.

Command: `python -m benchmarks.router.decision_latency`.

The benchmark runs in one process with one BLAS thread, and without garbage collection during a measurement. It
measures processor time, so the load of other programs does not count; the ratio to wall-clock time is also printed.

In each round every contender plays the same requests, so a slow phase of the machine affects all of them. Requests
are played alone (one decision, then its score) or in batches of 64 (64 decisions, then their 64 scores). The figure is
the median over the rounds, with the quartiles. Every contender has learned from some hundreds of requests before.

A peer is timed by its own calls: without a Decision, propensities or limits. If it has a call for batches (mabwiser),
that one is used. Ours is the complete default policy: quality, latency and cost, limits, propensities, and the record
of the decision.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.decisions.peers import PEERS
from deployments.settings import PolicySettings
from policies.profiling.features import D
from policies.registry import make_policy
from policies.thompson.hierarchical_posterior import HierarchicalPosterior
from policies.types import Arm, Objective, Request, TaskProfile, Vector

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
BATCH = 64
ARMS = 4
WARM_UP = 4 * BATCH  # requests before the first measurement
# Requests of each contender in a round; enough to include the policy's periodic work.
PER_ROUND = 2 * BATCH
GRID_ARMS = (2, 4, 8, 32)
GRID_DIMS = (16, 32, 64, 256)
SCALING_ROUNDS = 3

# Plays PER_ROUND requests. Arguments: number of the first request, whether in batches.
Play = Callable[[int, bool], None]


def contexts(count: int, dims: int) -> Vector:
    """Features [N, D] like those of features.py: the first is 1, the others are bounded."""
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (count, dims))
    x[:, 0] = 1.0
    return x


def arms_of(count: int) -> tuple[Arm, ...]:
    """Arms of which each costs twice as much as the one before."""
    return tuple(Arm(f"arm{k}", output_price_usd=1e-6 * 2.0**k) for k in range(count))


def ours(name: str, x: Vector, y: Vector) -> Play:
    """Play of our policy with this name, on features x [N, D] and scores y [N, K]."""
    policy: Any = make_policy(name, arms_of(y.shape[1]))
    rng = np.random.default_rng(0)
    objective = Objective(latency_weight=0.01, cost_weight=1.0)
    profiles = [TaskProfile(row, "chat", "question", 100) for row in x]
    requests = [
        Request(str(i), profile, objective) for i, profile in enumerate(profiles)
    ]
    column = {arm.name: k for k, arm in enumerate(policy.arms)}
    many = getattr(policy, "score_many", None)

    def play(start: int, batched: bool) -> None:
        size = BATCH if batched else 1
        for i in range(start, start + PER_ROUND, size):
            decisions = policy.decide(requests[i : i + size], {}, rng, i)
            scores = [
                float(y[i + j, column[decision.arm]])
                for j, decision in enumerate(decisions)
            ]
            if batched and many is not None:
                many(decisions, scores)
                continue
            for decision, score in zip(decisions, scores, strict=True):
                policy.score(decision, score)

    return play


def theirs(name: str, x: Vector, y: Vector) -> Play:
    """Play of a peer at its defaults, by its own calls."""
    kind, defaults, _ = PEERS[name]
    peer = kind(arms_of(y.shape[1]), 1.0, x.shape[1], 1, **defaults)

    def play(start: int, batched: bool) -> None:
        if not batched:
            for i in range(start, start + PER_ROUND):
                arm = peer.choose(x[i])
                peer.update(x[i], arm, float(y[i, arm]))
            return
        for i in range(start, start + PER_ROUND, BATCH):
            rows = x[i : i + BATCH]
            chosen = peer.choose_many(rows)
            peer.update_many(rows, chosen, y[np.arange(i, i + BATCH), chosen])

    return play


def learner(arms: int, dims: int, x: Vector, y: Vector) -> Play:
    """Play of the posterior of the scores alone: predict, draw, choose the best, add. Without propensities."""
    prior = np.zeros((arms, dims))
    prior[:, 0] = 0.5
    posterior = HierarchicalPosterior(prior, 0.15, 0.9995)
    rng = np.random.default_rng(0)
    many = getattr(posterior, "add_many", None)

    def play(start: int, batched: bool) -> None:
        size = BATCH if batched else 1
        for i in range(start, start + PER_ROUND, size):
            posterior.advance(i)
            rows = x[i : i + size]
            at = np.arange(i, i + size)
            mean, variance = posterior.predict(rows)
            chosen = (
                mean + np.sqrt(variance) * rng.standard_normal(mean.shape)
            ).argmax(axis=1)
            if batched and many is not None:
                many(chosen, rows, y[at, chosen], at)
                continue
            for j, k in enumerate(chosen.tolist()):
                posterior.add(k, rows[j], float(y[i + j, k]), i + j)

    return play


def timed(contenders: dict[str, Play], rounds: int) -> list[dict[str, Any]]:
    """A row for each contender, alone and in batches: quartiles of the microseconds a request over the rounds."""
    for play in contenders.values():
        for start in range(0, WARM_UP, PER_ROUND):
            play(start, True)
    found: dict[tuple[str, bool], list[tuple[float, float]]] = {
        (n, way): [] for n in contenders for way in (False, True)
    }
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for n in range(rounds):
            turn = n % len(contenders)  # each round starts with another contender
            names = [*list(contenders)[turn:], *list(contenders)[:turn]]
            for batched in (False, True):
                start = WARM_UP + (2 * n + batched) * PER_ROUND
                for name in names:
                    wall = perf_counter_ns()
                    busy = process_time_ns()
                    contenders[name](start, batched)
                    busy = process_time_ns() - busy
                    wall = perf_counter_ns() - wall
                    found[name, batched].append(
                        (busy / 1000 / PER_ROUND, wall / 1000 / PER_ROUND)
                    )
                    gc.collect(0)
    finally:
        gc.enable()
        gc.unfreeze()
    rows = []
    for (name, batched), values in found.items():
        (low, middle, high), wall_ = np.percentile(
            values, (25, 50, 75), axis=0
        ).T.tolist()
        asked = f"batches of {BATCH}" if batched else "alone"
        rows.append(
            {
                "who": name,
                "asked": asked,
                "low": low,
                "median": middle,
                "high": high,
                "wall": wall_[1],
            }
        )
    return rows


def shown(rows: list[dict[str, Any]], index: str = "who") -> str:
    """A table with a row for each contender: median and quartiles in microseconds a request."""
    frame = pd.DataFrame(rows)
    frame["µs"] = [
        f"{row['median']:.1f} ({row['low']:.1f} to {row['high']:.1f})" for row in rows
    ]
    table = frame.pivot(index=index, columns="asked", values="µs")
    return (
        table.reindex(frame[index].unique())
        .reset_index()
        .to_markdown(index=False, disable_numparse=True)
    )


def world(arms: int, dims: int, rounds: int) -> tuple[Vector, Vector]:
    """Features [N, D] and scores [N, K] for all rounds. The scores depend on the arm and on the features."""
    count = WARM_UP + 2 * rounds * PER_ROUND
    x = contexts(count, dims)
    rng = np.random.default_rng(1)
    chance = (
        0.5
        + 0.1 * np.linspace(-1, 1, arms)
        + 0.3 * x @ rng.normal(0, 1 / np.sqrt(dims), (dims, arms))
    )
    return x, (rng.random((count, arms)) < chance).astype(float)


def main() -> None:
    """Time every contender and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policy",
        nargs="+",
        default=[PolicySettings().name],
        help="our policies: names in policies/registry.py",
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="also time the posterior alone, by arms and features",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in ONE_THREAD.items()):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.router.decision_latency", *sys.argv[1:]],
            os.environ | ONE_THREAD,
        )
    x, y = world(ARMS, D, arguments.rounds)
    contenders = {f"ours ({name})": ours(name, x, y) for name in arguments.policy}
    rows = timed(
        contenders | {name: theirs(name, x, y) for name in PEERS}, arguments.rounds
    )
    what = f"median (quartiles) of {arguments.rounds} rounds of {PER_ROUND} requests"
    print(
        f"\ndecide + learn, µs a request, K = {ARMS}, d = {D} (the profile's features); {what}\n{shown(rows)}"
    )
    wall = np.median([row["wall"] / row["median"] for row in rows])
    print(f"wall-clock time, with the load of other programs: {wall:.2f} times as long")
    if arguments.scaling:
        sizes = [(k, d) for k in GRID_ARMS for d in GRID_DIMS]
        for k, d in tqdm(sizes, unit="size"):
            x, y = world(k, d, SCALING_ROUNDS)
            found = timed({f"K = {k}, d = {d}": learner(k, d, x, y)}, SCALING_ROUNDS)
            rows += [row | {"arms": k, "dims": d} for row in found]
        scaled = [row for row in rows if "arms" in row]
        print(
            f"\nthe posterior of the scores alone: predict, draw, choose, add; µs a request\n{shown(scaled)}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
