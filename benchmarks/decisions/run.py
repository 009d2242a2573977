"""Quality of decisions on recorded public streams, beside other routers: `make bench-quality`.

Every strategy plays the same streams with the same features. It sees only the score of the arm that it chose.
Utility is score - λ · cost; cost is the mean cost of an arm as a share of the dearest arm's.

The command prints tables with 95 % intervals over the shuffles, and RouteLLM's measures of the two-model sets
(apgr.py). It saves pictures and, with --json, all figures.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.checkpoint import digest, play_all
from benchmarks.decisions import apgr, plots, scenarios, tables
from benchmarks.decisions.bounds import by_shuffle, order_of
from benchmarks.decisions.peers import PEERS
from benchmarks.decisions.streams import LAMBDAS, PORTFOLIOS, load
from deployments.settings import PolicySettings
from policies.evaluation.simulate import simulate
from policies.registry import make_policy
from policies.types import Objective

# mean utility of the fixed arms, the ridge and the oracle, by portfolio and λ
References = dict[tuple[str, float], dict[str, float]]
OURS = "ours"
OUR_POLICY = PolicySettings().name  # the default of serve_config.yaml
POLICY_NAMES = {OURS: OUR_POLICY, "random": "uniform"}  # others are their own name
POINTS = 50  # points of a curve over time


@dataclass(frozen=True)
class Job:
    """One strategy on one stream.

    variant: 0 is the documented default of the strategy; 1, 2, … are the settings of its grid.
    """

    portfolio: str
    cost_weight: float
    shuffle: int
    strategy: str
    variant: int
    requests: int
    splits: tuple[str, ...]
    data: str | None


def run(job: Job) -> dict[str, Any]:
    """Play one job; returns mean utility, score and cost, and the cumulative utility at POINTS places."""
    portfolio = load(job.portfolio, job.splits, job.data)
    stream = portfolio.stream(order_of(portfolio, job.shuffle, job.requests))
    arms = stream.arms_at(0)
    if job.strategy in PEERS:
        kind, defaults, grid = PEERS[job.strategy]
        options = defaults | (grid[job.variant - 1] if job.variant else {})
        dims = len(stream.profiles[0].features)
        policy: Any = kind(arms, job.cost_weight, dims, job.shuffle, **options)
    else:
        policy = make_policy(POLICY_NAMES.get(job.strategy, job.strategy), arms)
    rng = np.random.default_rng(
        (job.shuffle, PORTFOLIOS.index(job.portfolio), round(100 * job.cost_weight))
    )
    trace = simulate(policy, stream, Objective(cost_weight=job.cost_weight), rng)
    at = np.linspace(0, len(trace.utility) - 1, POINTS).astype(int)
    return {
        "portfolio": job.portfolio,
        "cost_weight": job.cost_weight,
        "shuffle": job.shuffle,
        "strategy": job.strategy,
        "variant": job.variant,
        "utility": float(trace.utility.mean()),
        "score": float(trace.score.mean()),
        "cost": float(trace.cost_usd.mean()),
        "curve": np.cumsum(trace.utility)[at].tolist(),
        "at": (at + 1).tolist(),
    }


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """All jobs; the strategies of one stream come next to each other."""
    splits = tuple(arguments.split)
    for portfolio in arguments.portfolio:
        for shuffle in range(arguments.shuffles):
            for cost_weight in LAMBDAS:
                for strategy in arguments.strategy:
                    for variant in range(variants(strategy, arguments.defaults_only)):
                        yield Job(
                            portfolio,
                            cost_weight,
                            shuffle,
                            strategy,
                            variant,
                            arguments.requests,
                            splits,
                            arguments.data,
                        )


def variants(strategy: str, defaults_only: bool) -> int:
    """Number of settings with which a strategy is played."""
    if defaults_only or strategy not in PEERS:
        return 1
    return 1 + len(PEERS[strategy][2])


STREAM_SOURCES = (
    "benchmarks/decisions/streams.py",
    "benchmarks/decisions/bounds.py",
    "policies/profiling/features.py",
    "policies/evaluation/simulate.py",
)


@lru_cache
def _digest(*patterns: str) -> str:
    return digest(*patterns)


def _code(job: Job) -> str:
    """Digest of the source files on which a job's result depends."""
    is_peer = job.strategy in PEERS
    own = "benchmarks/decisions/peers.py" if is_peer else "policies/**/*.py"
    return _digest(*STREAM_SOURCES, own)


def summarise(frame: pd.DataFrame, known: References) -> pd.DataFrame:
    """A row for each cell: our utility, the best peer at its defaults and in its grid, and the gap closed.

    The gap goes from the best peer at its defaults to the better of the best single arm and the offline ridge.
    """
    rows = []
    for (portfolio, cost_weight), bounds in known.items():
        cell = frame[
            (frame.portfolio == portfolio) & (frame.cost_weight == cost_weight)
        ]
        mean = cell.groupby(["strategy", "variant"]).utility.mean()
        peers = mean[[name in PEERS for name in mean.index.get_level_values(0)]]
        ours = cell[cell.strategy == OURS].utility
        top = max(bounds["best single"], bounds["offline ridge"])
        row: dict[str, Any] = {
            "portfolio": portfolio,
            "λ": cost_weight,
            "ours": ours.mean(),
            "±": 1.96 * ours.std() / np.sqrt(len(ours)),
        }
        if len(peers):
            defaults = peers[peers.index.get_level_values(1) == 0]
            row["best peer, defaults"] = defaults.max()
            row["best peer, grid"] = peers.max()
            row["which"] = defaults.idxmax()[0]
            row["gap closed"] = (row["ours"] - defaults.max()) / (top - defaults.max())
        for bound in ("best single", "offline ridge", "oracle"):
            row[bound] = bounds[bound]
        rows.append(row)
    return pd.DataFrame(rows)


def play_jobs(
    arguments: argparse.Namespace,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The results of all jobs, and the rows of RouteLLM's measures."""
    todo = list(jobs(arguments))
    pairs = []
    if "apgr" not in arguments.skip:
        pairs = apgr.trials(
            arguments.portfolio,
            OUR_POLICY,
            LAMBDAS,
            arguments.shuffles,
            arguments.requests,
            arguments.data,
        )
    with Pool(arguments.jobs) as pool:
        results = play_all(run, todo, pool, _code, arguments.resume)
        rows = list(tqdm(results, total=len(todo), unit="run"))
        measured = pool.imap(apgr.measure, pairs)
        ranked = []
        for trial in tqdm(measured, total=len(pairs), unit="run"):
            ranked += trial
    order = ["portfolio", "cost_weight", "strategy", "variant", "shuffle"]
    return pd.DataFrame(rows).sort_values(order), ranked


def references(arguments: argparse.Namespace) -> dict[tuple[str, float], Any]:
    """For each portfolio and λ, the mean utility [shuffles] of the fixed arms, the ridge and the oracle."""
    found = {}
    for portfolio in arguments.portfolio:
        for cost_weight in LAMBDAS:
            found[portfolio, cost_weight] = by_shuffle(
                portfolio,
                cost_weight,
                arguments.shuffles,
                arguments.requests,
                tuple(arguments.split),
                arguments.data,
            )
    return found


def means(by_cell: dict[tuple[str, float], Any]) -> References:
    """Means of `references` over the shuffles."""
    found = {}
    for cell, bounds in by_cell.items():
        found[cell] = {name: float(values.mean()) for name, values in bounds.items()}
    return found


def print_summary(table: pd.DataFrame) -> None:
    """Print the table of cells, and in how many of them our policy is ahead of every peer."""
    print(table.round(4).to_markdown(index=False))
    if "gap closed" not in table:
        return
    defaults = (table.ours > table["best peer, defaults"]).sum()
    grid = (table.ours > table["best peer, grid"]).sum()
    print(
        f"\nahead of every peer at its defaults in {defaults} of {len(table)} cells, at its best of the grid in"
    )
    print(
        f"{grid}; mean share of the gap to the better of best single and ridge closed: {table['gap closed'].mean():.2f}"
    )


def print_strategies(
    frame: pd.DataFrame, by_cell: dict[tuple[str, float], Any], known: References
) -> None:
    """Print the shortfall of every strategy, and a table of all strategies for each portfolio."""
    short = tables.shortfall(frame, known).round(4)
    print(
        f"\nshort of the better of best single and ridge, utility a request\n{short.to_markdown(index=False)}"
    )
    for portfolio, strategies in tables.by_strategy(frame, by_cell).items():
        shown = strategies.to_markdown(index=False, disable_numparse=True)
        print(f"\n{portfolio}: mean utility ± 95 %\n{shown}")


def print_two_models(ranked: pd.DataFrame) -> None:
    """Print RouteLLM's measures."""
    shown = apgr.summarise(ranked).to_markdown(index=False, disable_numparse=True)
    print(f"\nTwo models, strong and weak\n{shown}\n{apgr.NOTE}")


def write_json(
    path: Path,
    table: pd.DataFrame,
    frame: pd.DataFrame,
    known: References,
    ranked: list[dict[str, Any]],
) -> None:
    """Write all figures."""
    bounds = []
    for (portfolio, cost_weight), values in known.items():
        bounds.append({"portfolio": portfolio, "cost_weight": cost_weight, **values})
    figures = {
        "cells": table.to_dict("records"),
        "runs": frame.drop(columns=["curve", "at"]).to_dict("records"),
        "apgr": ranked,
        "references": bounds,
    }
    path.write_text(json.dumps(figures, indent=1))


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="folder of the recorded streams; default: ROUTER_DATA"
    )
    parser.add_argument(
        "--portfolio", nargs="+", default=list(PORTFOLIOS), choices=PORTFOLIOS
    )
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument(
        "--split", nargs="+", default=["train", "dev"], choices=("train", "dev")
    )
    parser.add_argument(
        "--strategy", nargs="+", default=[OURS, "static", "random", *PEERS]
    )
    parser.add_argument(
        "--defaults-only", action="store_true", help="leave out the peers' grids"
    )
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        choices=("apgr",),
        help="leave out these parts",
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument(
        "--out", type=Path, default=Path("var"), help="folder of the pictures"
    )
    parser.add_argument(
        "--resume", type=Path, help="keep finished runs in this file and skip them"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--scenario", help="worlds that change, see benchmarks/decisions/scenarios.py"
    )
    return parser.parse_args()


def main() -> None:
    """Play all jobs, print the tables and save the pictures."""
    if any(given.partition("=")[0] == "--scenario" for given in sys.argv[1:]):
        return scenarios.main()
    arguments = parse_arguments()
    frame, ranked = play_jobs(arguments)
    by_cell = references(arguments)
    known = means(by_cell)
    table = summarise(frame, known)
    print_summary(table)
    print_strategies(frame, by_cell, known)
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = [
        plots.regret(frame, known, arguments.out),
        plots.frontier(frame, known, arguments.out),
    ]
    if ranked:
        two_models = pd.DataFrame(ranked)
        print_two_models(two_models)
        paths.append(plots.performance(two_models, arguments.out))
    for path in paths:
        print(f"picture: {path}")
    if arguments.json:
        write_json(arguments.json, table, frame, known, ranked)


if __name__ == "__main__":
    main()
