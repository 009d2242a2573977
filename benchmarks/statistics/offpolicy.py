"""Coverage and error rates of the promotion statistics: `python -m benchmarks.statistics.offpolicy [--json OUT]`.

The worlds (worlds.py, sparse.py) are small and their truth is known. Each log is evaluated as if it were the only one.
The benchmark also plants challengers of known quality, and regressions after a promotion. It takes minutes on one core.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.statistics import sparse
from benchmarks.statistics.regression import PROMOTIONS, rolled_back, watching
from benchmarks.statistics.worlds import (
    BETTER,
    CHAMPION,
    CLEAR,
    FLAT,
    WORSE,
    World,
    collect,
    rule,
)
from policies.evaluation.offpolicy import (
    Estimate,
    confidence_sequence,
    difference,
    estimate,
)
from policies.evaluation.overlap import UnanswerableError
from policies.rollout.promotion_gate import may_promote

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
PARTS = ("coverage", "sparse", "gate", "watch", "rollback")
TARGETS = {
    "uniform": rule(0, 0, 0, 0, noise=1.0),
    "always large": rule(2, 2, 2, 2, noise=0.0),
    "the better": BETTER,
}
WORLDS = {
    "clear": World(CLEAR),
    "flat": World(FLAT),
    "clear, feedback 30, 50, 70 %": World(CLEAR, feedback=(0.3, 0.5, 0.7)),
    "clear, least propensity 1 %": World(CLEAR, floor=0.01),
    "clear, no least propensity": World(CLEAR, floor=0.0),
}


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
                part = data.head(n)
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
    parser.add_argument(
        "--sparse",
        nargs="+",
        default=list(sparse.WORLDS),
        choices=sparse.WORLDS,
        help="worlds of the part sparse",
    )
    parser.add_argument(
        "--promotions",
        nargs="+",
        default=list(PROMOTIONS),
        choices=PROMOTIONS,
        help="promotions of the part rollback",
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


def run_sparse(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure the coverage of intervals in worlds with few scores, and print it."""
    rows = sparse.coverage(arguments.logs, arguments.sparse, arguments.seed + 300)
    print(f"\n95 % intervals with few scores, {arguments.logs} logs of each world\n")
    print(pd.DataFrame(rows).round(4).to_markdown(index=False))
    return rows


def run_rollback(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measure how often a better and a worse policy is rolled back with few scores, and print it."""
    rows = rolled_back(
        arguments.promotions, arguments.runs, arguments.watched, arguments.seed + 400
    )
    print(
        f"\nPromotions that are rolled back, {arguments.runs} runs of {arguments.watched} requests\n"
    )
    print(pd.DataFrame(rows).round(4).to_markdown(index=False))
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
    runs = {
        "coverage": run_coverage,
        "sparse": run_sparse,
        "gate": run_gate,
        "watch": run_watch,
        "rollback": run_rollback,
    }
    results = {}
    for part, run in runs.items():
        if part in arguments.parts:
            results[part] = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
