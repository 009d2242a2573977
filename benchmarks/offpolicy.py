"""Whether the statistics of promotion keep what they promise: `python -m benchmarks.offpolicy [--json OUT]`.

A small world with known truth: four kinds of requests, three sizes, rewards 0 or 1. Thompson sampling (one normal
posterior a kind and size, updated every ten requests) collects the logs, all at once; each is judged as if it were
the only one. Then challengers are planted, and regressions after their promotion. Minutes on one core.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from policies.gate import Watch, may_promote
from policies.offpolicy import Estimate, confidence_sequence, difference, estimate
from policies.overlap import Log, UnanswerableError
from policies.propensity import probability_best
from policies.types import Vector

BATCH = 10  # decisions between updates of the posterior
PLAIN, OURS = "uniform", "stabilised"
METHODS = (("ips", PLAIN), ("dr", PLAIN), ("ips", OURS), ("snips", OURS), ("dr", OURS))  # the gate uses the last
PARTS = ("coverage", "gate", "watch")
SIZES = ("nano", "small", "large")
# Mean reward of each size by kind of request, what it costs taken off; and a world where nothing makes a difference.
CLEAR = np.array([[0.80, 0.77, 0.75], [0.40, 0.77, 0.70], [0.30, 0.47, 0.80], [0.10, 0.27, 0.60]])
FLAT = np.full((4, 3), 0.5)


def rule(*sizes: int, noise: float = 0.1) -> Vector:
    """[4, 3] probabilities of a policy that mostly takes one size for each kind of request."""
    return (1 - noise) * np.eye(3)[list(sizes)] + noise / 3


CHAMPION, BETTER, WORSE = rule(0, 0, 2, 2), rule(0, 1, 2, 2), rule(0, 0, 1, 2)
TARGETS = {"uniform": rule(0, 0, 0, 0, noise=1.0), "always large": rule(2, 2, 2, 2, noise=0.0), "the better": BETTER}


@dataclass(frozen=True)
class World:
    """Where logs come from: means [4, 3], least propensity of each size, feedback rate of each size."""

    means: Vector
    floor: float = 0.03
    feedback: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def value(self, policy: Vector) -> float:
        """The true mean reward of a policy [4, 3]."""
        return float((policy * self.means).sum(axis=1).mean())


WORLDS = {
    "clear": World(CLEAR),
    "flat": World(FLAT),
    "clear, feedback 30, 50, 70 %": World(CLEAR, feedback=(0.3, 0.5, 0.7)),
    "clear, least propensity 1 %": World(CLEAR, floor=0.01),
    "clear, no least propensity": World(CLEAR, floor=0.0),
}


def best_of(mean: Vector, deviation: Vector) -> Vector:
    """See probability_best; a few rows at a time, so that they stay in the processor's cache."""
    parts = [slice(i, i + 64) for i in range(0, len(mean), 64)]
    return np.vstack([probability_best(mean[p], deviation[p], np.ones(mean[p].shape, dtype=bool)) for p in parts])


def collect(world: World, logs: int, decisions: int, seed: int) -> Iterator[tuple[Log, NDArray[np.int64]]]:
    """Adaptive logs, each with the kinds [N] of its requests, of a Thompson-sampling policy that starts anew."""
    rng, rows = np.random.default_rng(seed), np.arange(logs)
    kinds = rng.integers(4, size=(logs, decisions))
    chosen = np.zeros((logs, decisions), dtype=np.int64)
    rewards = np.zeros((logs, decisions))
    propensities, predictions = np.zeros((2, logs, decisions, 3))
    count, total = np.zeros((2, logs, 4, 3))
    for begin in tqdm(range(0, decisions, BATCH), desc="collecting", leave=False):
        mean, deviation = (0.5 + total) / (1 + count), 0.5 / np.sqrt(1 + count)
        table = (1 - 3 * world.floor) * best_of(mean.reshape(-1, 3), deviation.reshape(-1, 3)) + world.floor
        table = table.reshape(logs, 4, 3)
        batch = range(begin, min(decisions, begin + BATCH))
        for t in batch:
            kind = kinds[:, t]
            p = table[rows, kind]
            arm = np.minimum((p.cumsum(axis=1) < rng.random((logs, 1))).sum(axis=1), 2)
            propensities[:, t], predictions[:, t], chosen[:, t] = p, mean[rows, kind], arm
            heard = rng.random(logs) < np.array(world.feedback)[arm]
            rewards[:, t] = np.where(heard, rng.random(logs) < world.means[kind, arm], np.nan)
        for t in batch:
            got = np.flatnonzero(~np.isnan(rewards[:, t]))
            cells = (got, kinds[got, t], chosen[got, t])
            np.add.at(count, cells, 1.0)
            np.add.at(total, cells, rewards[got, t])
    for i in range(logs):
        yield Log(chosen[i], propensities[i], rewards[i], predictions[i]), kinds[i]


def coverage(name: str, logs: int, decisions: int, seed: int) -> list[dict[str, object]]:
    """How often each interval holds the truth, and the confidence sequence at all times together."""
    world = WORLDS[name]
    seen: dict[tuple[str, str], list[tuple[bool, float, float]]] = defaultdict(list)
    refused: dict[str, int] = defaultdict(int)

    def note(target: str, method: str, found: Estimate, truth: float) -> None:
        seen[target, method].append((found.low <= truth <= found.high, found.value - truth, found.high - found.low))

    for data, kinds in tqdm(collect(world, logs, decisions, seed), total=logs, desc=name):
        pairs = {target: (policy,) for target, policy in TARGETS.items()} | {"better - champion": (BETTER, CHAMPION)}
        for target, policies in pairs.items():
            tables = [policy[kinds] for policy in policies]
            truth = world.value(policies[0]) - (world.value(policies[1]) if len(policies) > 1 else 0.0)
            try:
                for method in METHODS:
                    if len(tables) == 1:
                        found = estimate(data, tables[0], *method)
                    else:
                        found = difference(data, tables[1], tables[0], *method)
                    note(target, f"{method[0].upper()}, {method[1]}", found, truth)
            except UnanswerableError:
                refused[target] += 1
                continue
            low, high = confidence_sequence(data, *tables)
            always = bool(((low <= truth) & (truth <= high)).all())
            seen[target, "confidence sequence"].append((always, (low[-1] + high[-1]) / 2 - truth, high[-1] - low[-1]))
    rows = []
    for (target, method), values in seen.items():
        covered, bias, width = np.array(values, dtype=float).reshape(-1, 3).T
        row = {"world": name, "target": target, "method": method, "refused": refused[target] / logs}
        figures = {"cover": covered, "bias": bias, "width": width}
        rows.append(row | {key: float(v.mean()) if len(v) else float("nan") for key, v in figures.items()})
    return rows


def gate(runs: int, lengths: list[int], seed: int) -> list[dict[str, object]]:
    """How often a planted challenger passes, by the length of the log."""
    planted = {
        "worse": (World(CLEAR), WORSE),
        "worse, no least propensity": (World(CLEAR, floor=0.0), WORSE),
        "better": (World(CLEAR), BETTER),
        "better, no least propensity": (World(CLEAR, floor=0.0), BETTER),
        "as good (flat world)": (World(FLAT), rule(2, 2, 0, 0)),
    }
    rows = []
    for name, (world, challenger) in planted.items():
        passed: dict[tuple[int, bool], int] = defaultdict(int)
        for data, kinds in tqdm(collect(world, runs, max(lengths), seed), total=runs, desc=f"challenger {name}"):
            for n in lengths:
                part = Log(data.chosen[:n], data.propensities[:n], data.rewards[:n], data.predictions[:n])  # type: ignore[index]
                for repeated in (False, True):
                    report = may_promote(part, CHAMPION[kinds[:n]], challenger[kinds[:n]], repeated=repeated)
                    passed[n, repeated] += bool(report["promote"])
        gain = world.value(challenger) - world.value(CHAMPION)
        for n in lengths:
            shares = {"promoted": passed[n, False] / runs, "promoted, confidence sequence": passed[n, True] / runs}
            rows.append({"challenger": name, "true gain": gain, "decisions": n, **shares})
    return rows


def watch_once(watch: Watch, rng: np.random.Generator, change: int, drop: float, share: float, most: int) -> int:
    """Requests until the watch rolls back, or -1; the level of 0.7 drops at request `change`."""
    old = rng.random(most) < share
    level = np.where(old | (np.arange(most) < change), 0.7, 0.7 - drop)
    rewards = rng.random(most) < level
    for n in range(most):
        if watch.observe(float(rewards[n]), bool(old[n])):
            return n + 1
    return -1


def watching(runs: int, most: int, seed: int) -> list[dict[str, object]]:
    """Requests until a planted regression is rolled back, and false alarms where there is none."""
    modes = {"reference 0.7": (0.7, 0.0), "10 % to the predecessor": (None, 0.1)}
    plans = [(0, 0.2), (0, 0.1), (2000, 0.2), (2000, 0.1), (0, 0.0)]
    rows = []
    todo = [(mode, change, drop) for mode in modes for change, drop in plans]
    for mode, change, drop in todo:
        reference, share = modes[mode]
        ends = [
            watch_once(Watch(reference), np.random.default_rng((seed, run)), change, drop, share, most)
            for run in tqdm(range(runs), desc=f"watch, {mode}, drop {drop} at {change}")
        ]
        stopped = np.array([end for end in ends if end > 0])
        early = float((stopped <= change).sum() / runs) if drop else len(stopped) / runs
        row: dict[str, object] = {"test": mode, "drop": drop, "from request": change, "false alarms": early}
        if drop:
            after = np.array([end - change if end > change else most for end in ends if not 0 < end <= change])
            row |= {"rolled back": float((after < most).mean()), "median": float(np.median(after))}
            row |= {"p90": float(np.quantile(after, 0.9))}
        rows.append(row)
    return rows


def main() -> None:
    """Run all three parts and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=WORLDS, help="of the part coverage")
    parser.add_argument("--logs", type=int, default=1000, help="adaptive logs of each world")
    parser.add_argument("--decisions", type=int, default=2000, help="in each of them")
    parser.add_argument("--runs", type=int, default=200, help="with a planted challenger, and with a regression")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000], help="of the gate's logs")
    parser.add_argument("--watched", type=int, default=20_000, help="requests that are watched")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, object]]] = {}
    if "coverage" in arguments.parts:
        results["coverage"] = []
        for name in arguments.worlds:
            seed = arguments.seed + list(WORLDS).index(name)
            results["coverage"] += coverage(name, arguments.logs, arguments.decisions, seed)
        wide = pd.DataFrame(results["coverage"]).pivot_table(
            index=["world", "target", "refused"], columns="method", values="cover", sort=False
        )
        print(
            f"\n95 % intervals that hold the truth, {arguments.logs} adaptive logs of {arguments.decisions} decisions\n"
        )
        print((100 * wide).round(1).reset_index().to_markdown(index=False))
    if "gate" in arguments.parts:
        results["gate"] = gate(arguments.runs, arguments.lengths, arguments.seed + 100)
        print(f"\nShare of planted challengers that pass, {arguments.runs} runs\n")
        print(pd.DataFrame(results["gate"]).round(4).to_markdown(index=False))
    if "watch" in arguments.parts:
        results["watch"] = watching(arguments.runs, arguments.watched, arguments.seed + 200)
        print(f"\nRequests from a regression to the roll-back, {arguments.runs} runs of {arguments.watched}\n")
        print(pd.DataFrame(results["watch"]).round(4).to_markdown(index=False))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
