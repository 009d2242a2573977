"""Coverage and error rates of the promotion statistics: `python -m benchmarks.statistics.offpolicy [--json OUT]`.

The world is small and its truth is known: four kinds of requests, three sizes, rewards 0 or 1. Thompson sampling, with
one normal posterior for each kind and size and an update every ten requests, collects many logs in parallel. Each log
is evaluated as if it were the only one. The benchmark also plants challengers of known quality, and regressions after
a promotion. It takes minutes on one core.
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

from policies.evaluation.offpolicy import (
    Estimate,
    confidence_sequence,
    difference,
    estimate,
)
from policies.evaluation.overlap import LoggedDecisions, UnanswerableError
from policies.rollout.promotion_gate import may_promote
from policies.rollout.regression_watch import RegressionTest
from policies.thompson.propensity import probability_best
from policies.types import Vector

BATCH = 10  # decisions between updates of the posterior
PLAIN = "uniform"
OURS = "stabilised"
# the promotion gate uses the last one
METHODS = (
    ("ips", PLAIN),
    ("dr", PLAIN),
    ("ips", OURS),
    ("snips", OURS),
    ("dr", OURS),
)
PARTS = ("coverage", "gate", "watch")
SIZES = ("nano", "small", "large")
# mean reward minus cost of each size [3], by kind of request [4]
CLEAR = np.array(
    [[0.80, 0.77, 0.75], [0.40, 0.77, 0.70], [0.30, 0.47, 0.80], [0.10, 0.27, 0.60]]
)
FLAT = np.full((4, 3), 0.5)  # all sizes are equally good


def rule(*sizes: int, noise: float = 0.1) -> Vector:
    """Probabilities [4, 3] of a policy that mostly chooses one given size for each kind of request."""
    return (1 - noise) * np.eye(3)[list(sizes)] + noise / 3


CHAMPION = rule(0, 0, 2, 2)
BETTER = rule(0, 1, 2, 2)
WORSE = rule(0, 0, 1, 2)
TARGETS = {
    "uniform": rule(0, 0, 0, 0, noise=1.0),
    "always large": rule(2, 2, 2, 2, noise=0.0),
    "the better": BETTER,
}


@dataclass(frozen=True)
class World:
    """A world that produces logs.

    means: [4, 3] mean rewards.
    floor: minimum propensity of each size.
    feedback: share of the decisions with feedback, by size.
    """

    means: Vector
    floor: float = 0.03
    feedback: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def value(self, policy: Vector) -> float:
        """True mean reward of a policy [4, 3]."""
        return float((policy * self.means).sum(axis=1).mean())


WORLDS = {
    "clear": World(CLEAR),
    "flat": World(FLAT),
    "clear, feedback 30, 50, 70 %": World(CLEAR, feedback=(0.3, 0.5, 0.7)),
    "clear, least propensity 1 %": World(CLEAR, floor=0.01),
    "clear, no least propensity": World(CLEAR, floor=0.0),
}


def best_of(mean: Vector, deviation: Vector) -> Vector:
    """See probability_best. Computes 64 rows at a time, so that they stay in the processor's cache."""
    parts = []
    for start in range(0, len(mean), 64):
        rows = slice(start, start + 64)
        allowed = np.ones(mean[rows].shape, dtype=bool)
        parts.append(probability_best(mean[rows], deviation[rows], allowed))
    return np.vstack(parts)


def collect(
    world: World, logs: int, decisions: int, seed: int
) -> Iterator[tuple[LoggedDecisions, NDArray[np.int64]]]:
    """Logs of Thompson-sampling policies that start without data, each with the kinds [N] of its requests."""
    rng = np.random.default_rng(seed)
    rows = np.arange(logs)
    kinds = rng.integers(4, size=(logs, decisions))
    chosen = np.zeros((logs, decisions), dtype=np.int64)
    rewards = np.zeros((logs, decisions))
    propensities, predictions = np.zeros((2, logs, decisions, 3))
    count, total = np.zeros((2, logs, 4, 3))
    for begin in tqdm(range(0, decisions, BATCH), desc="collecting", leave=False):
        mean = (0.5 + total) / (1 + count)
        deviation = 0.5 / np.sqrt(1 + count)
        table = (1 - 3 * world.floor) * best_of(
            mean.reshape(-1, 3), deviation.reshape(-1, 3)
        ) + world.floor
        table = table.reshape(logs, 4, 3)
        batch = range(begin, min(decisions, begin + BATCH))
        for t in batch:
            kind = kinds[:, t]
            p = table[rows, kind]
            arm = np.minimum((p.cumsum(axis=1) < rng.random((logs, 1))).sum(axis=1), 2)
            propensities[:, t] = p
            predictions[:, t] = mean[rows, kind]
            chosen[:, t] = arm
            scored = rng.random(logs) < np.array(world.feedback)[arm]
            rewards[:, t] = np.where(
                scored, rng.random(logs) < world.means[kind, arm], np.nan
            )
        for t in batch:
            got = np.flatnonzero(~np.isnan(rewards[:, t]))
            cells = (got, kinds[got, t], chosen[got, t])
            np.add.at(count, cells, 1.0)
            np.add.at(total, cells, rewards[got, t])
    for i in range(logs):
        yield (
            LoggedDecisions(chosen[i], propensities[i], rewards[i], predictions[i]),
            kinds[i],
        )


def coverage(
    name: str, logs: int, decisions: int, seed: int
) -> list[dict[str, object]]:
    """Share of the intervals that contain the truth; a confidence sequence counts if it does at all times."""
    world = WORLDS[name]
    seen: dict[tuple[str, str], list[tuple[bool, float, float]]] = defaultdict(list)
    refused: dict[str, int] = defaultdict(int)

    def note(target: str, method: str, found: Estimate, truth: float) -> None:
        seen[target, method].append(
            (
                found.low <= truth <= found.high,
                found.value - truth,
                found.high - found.low,
            )
        )

    for data, kinds in tqdm(
        collect(world, logs, decisions, seed), total=logs, desc=name
    ):
        pairs = {target: (policy,) for target, policy in TARGETS.items()} | {
            "better - champion": (BETTER, CHAMPION)
        }
        for target, policies in pairs.items():
            tables = [policy[kinds] for policy in policies]
            truth = world.value(policies[0]) - (
                world.value(policies[1]) if len(policies) > 1 else 0.0
            )
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
            seen[target, "confidence sequence"].append(
                (always, (low[-1] + high[-1]) / 2 - truth, high[-1] - low[-1])
            )
    rows = []
    for (target, method), values in seen.items():
        covered, bias, width = np.array(values, dtype=float).reshape(-1, 3).T
        row = {
            "world": name,
            "target": target,
            "method": method,
            "refused": refused[target] / logs,
        }
        figures = {"cover": covered, "bias": bias, "width": width}
        rows.append(
            row
            | {
                key: float(v.mean()) if len(v) else float("nan")
                for key, v in figures.items()
            }
        )
    return rows


def gate(runs: int, lengths: list[int], seed: int) -> list[dict[str, object]]:
    """Share of the planted challengers that pass the promotion gate, by the length of the log."""
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
        for data, kinds in tqdm(
            collect(world, runs, max(lengths), seed),
            total=runs,
            desc=f"challenger {name}",
        ):
            for n in lengths:
                part = LoggedDecisions(
                    data.chosen[:n],
                    data.propensities[:n],
                    data.rewards[:n],
                    data.predictions[:n],
                )  # type: ignore[index]
                for repeated in (False, True):
                    report = may_promote(
                        part,
                        CHAMPION[kinds[:n]],
                        challenger[kinds[:n]],
                        repeated=repeated,
                    )
                    passed[n, repeated] += bool(report["promote"])
        gain = world.value(challenger) - world.value(CHAMPION)
        for n in lengths:
            shares = {
                "promoted": passed[n, False] / runs,
                "promoted, confidence sequence": passed[n, True] / runs,
            }
            rows.append(
                {"challenger": name, "true gain": gain, "decisions": n, **shares}
            )
    return rows


def watch_once(
    watch: RegressionTest,
    rng: np.random.Generator,
    change: int,
    drop: float,
    share: float,
    most: int,
) -> int:
    """Number of requests until the roll-back, or -1. The mean reward of 0.7 drops at request `change`."""
    old = rng.random(most) < share
    level = np.where(old | (np.arange(most) < change), 0.7, 0.7 - drop)
    rewards = rng.random(most) < level
    for n in range(most):
        if watch.observe(float(rewards[n]), bool(old[n])):
            return n + 1
    return -1


def watching(runs: int, most: int, seed: int) -> list[dict[str, object]]:
    """Requests until a planted regression is rolled back, and the rate of false alarms."""
    modes = {"reference 0.7": (0.7, 0.0), "10 % to the predecessor": (None, 0.1)}
    plans = [(0, 0.2), (0, 0.1), (2000, 0.2), (2000, 0.1), (0, 0.0)]
    rows = []
    todo = [(mode, change, drop) for mode in modes for change, drop in plans]
    for mode, change, drop in todo:
        reference, share = modes[mode]
        ends = [
            watch_once(
                RegressionTest(reference),
                np.random.default_rng((seed, run)),
                change,
                drop,
                share,
                most,
            )
            for run in tqdm(range(runs), desc=f"watch, {mode}, drop {drop} at {change}")
        ]
        stopped = np.array([end for end in ends if end > 0])
        early = float((stopped <= change).sum() / runs) if drop else len(stopped) / runs
        row: dict[str, object] = {
            "test": mode,
            "drop": drop,
            "from request": change,
            "false alarms": early,
        }
        if drop:
            delays = []
            for end in ends:
                if end > change:
                    delays.append(end - change)
                elif end <= 0:
                    delays.append(most)
            after = np.array(delays)
            row |= {
                "rolled back": float((after < most).mean()),
                "median": float(np.median(after)),
                "p90": float(np.quantile(after, 0.9)),
            }
        rows.append(row)
    return rows


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--worlds",
        nargs="+",
        default=list(WORLDS),
        choices=WORLDS,
        help="worlds of the part coverage",
    )
    parser.add_argument("--logs", type=int, default=1000, help="logs of each world")
    parser.add_argument(
        "--decisions", type=int, default=2000, help="length of each log"
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=200,
        help="runs for each challenger and each regression",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1000, 2000, 4000],
        help="lengths of the gate's logs",
    )
    parser.add_argument(
        "--watched", type=int, default=20_000, help="requests after each promotion"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def run_coverage(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure the coverage of intervals in the chosen worlds, and print it."""
    rows = []
    for name in arguments.worlds:
        seed = arguments.seed + list(WORLDS).index(name)
        rows += coverage(name, arguments.logs, arguments.decisions, seed)
    wide = pd.DataFrame(rows).pivot_table(
        index=["world", "target", "refused"],
        columns="method",
        values="cover",
        sort=False,
    )
    print(
        f"\n95 % intervals that hold the truth, {arguments.logs} adaptive logs of {arguments.decisions} decisions\n"
    )
    print((100 * wide).round(1).reset_index().to_markdown(index=False))
    return rows


def run_gate(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure the share of planted challengers that pass the gate, and print it."""
    rows = gate(arguments.runs, arguments.lengths, arguments.seed + 100)
    print(f"\nShare of planted challengers that pass, {arguments.runs} runs\n")
    print(pd.DataFrame(rows).round(4).to_markdown(index=False))
    return rows


def run_watch(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure the time from a regression to the roll-back, and print it."""
    rows = watching(arguments.runs, arguments.watched, arguments.seed + 200)
    print(
        f"\nRequests from a regression to the roll-back, {arguments.runs} runs of {arguments.watched}\n"
    )
    print(pd.DataFrame(rows).round(4).to_markdown(index=False))
    return rows


def main() -> None:
    """Run the chosen parts and print a table for each."""
    arguments = parse_arguments()
    runs = {"coverage": run_coverage, "gate": run_gate, "watch": run_watch}
    results = {}
    for part, run in runs.items():
        if part in arguments.parts:
            results[part] = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
