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
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.checkpoint import digest, play_all
from benchmarks.decisions import apgr, plots, scenarios, tables
from benchmarks.decisions.bounds import by_shuffle, kept_back, order_of
from benchmarks.decisions.comparison import OURS, beside, distance_closed
from benchmarks.decisions.peers import PEERS
from benchmarks.decisions.streams import (
    ALL_PORTFOLIOS,
    LAMBDAS,
    PORTFOLIOS,
    Portfolio,
    load,
)
from deployments.settings import PolicySettings
from policies.base import Policy
from policies.evaluation.simulate import FeedbackPlan, simulate
from policies.events import Decision, Outcome
from policies.registry import make_policy
from policies.types import Objective, Vector

# mean utility of the fixed arms, the ridge and the oracle, by portfolio and λ
References = dict[tuple[str, float], dict[str, float]]
OUR_POLICY = PolicySettings().name  # the default of serve_config.yaml
POLICY_NAMES = {OURS: OUR_POLICY, "random": "uniform"}  # others are their own name
CALIBRATION = "calibration"  # policy_version of its decisions
POINTS = 50  # points of a curve over time


@dataclass(frozen=True)
class Condition:
    """What all strategies are given.

    scored: share of the answers that get a score.
    feedback: "judge", if it is known beforehand which answers will be scored, or "users".
    failures: probability that the dearest arm's answer fails.
    calibrate: number of prompts, none of them in the stream, whose answers by all arms are scored beforehand.
    first: share of a judge's scores that go to the first requests.
    pairs: whether our policy spends a judge's scores on pairs: a second arm answers in the background.
    """

    scored: float
    feedback: str
    failures: float
    calibrate: int
    first: float
    pairs: bool

    def __str__(self) -> str:
        parts = [f"{self.scored:.0%} scored by {self.feedback}"]
        if self.calibrate:
            parts.append(f"{self.calibrate} calibration prompts")
        if self.failures:
            parts.append(f"{self.failures:.0%} failures of the dearest arm")
        return ", ".join(parts)


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
    condition: Condition


def run(job: Job) -> dict[str, Any]:
    """Play one job; returns mean utility, score and cost, and the cumulative utility at POINTS places."""
    portfolio = load(job.portfolio, job.splits, job.data)
    given = job.condition
    order = order_of(portfolio, job.shuffle, job.requests, given.calibrate)
    stream = portfolio.stream(order)
    arms = stream.arms_at(0)
    if job.strategy in PEERS:
        kind, defaults, grid = PEERS[job.strategy]
        options = defaults | (grid[job.variant - 1] if job.variant else {})
        dims = len(stream.profiles[0].features)
        policy: Any = kind(arms, job.cost_weight, dims, job.shuffle, **options)
    else:
        policy = make_policy(POLICY_NAMES.get(job.strategy, job.strategy), arms)
    rng = np.random.default_rng(
        (job.shuffle, ALL_PORTFOLIOS.index(job.portfolio), round(100 * job.cost_weight))
    )
    objective = Objective(cost_weight=job.cost_weight)
    calibrate(policy, portfolio, kept_back(portfolio, job.shuffle, given.calibrate))
    judged = given.feedback == "judge"
    failures = [0.0] * (len(arms) - 1) + [given.failures]
    first = given.first if judged else 0.0
    pairs = given.pairs and job.strategy == OURS
    plan = FeedbackPlan(given.scored, first, sampled=judged, pairs=pairs)
    trace = simulate(policy, stream, objective, rng, plan, failures=failures)
    at = np.linspace(0, len(trace.utility) - 1, POINTS).astype(int)
    return {
        "portfolio": job.portfolio,
        "cost_weight": job.cost_weight,
        "shuffle": job.shuffle,
        "strategy": job.strategy,
        "variant": job.variant,
        "condition": str(given),
        "scores": trace.scores,
        "utility": float(trace.utility.mean()),
        "score": float(trace.score.mean()),
        "cost": float(trace.cost_usd.mean()),
        "curve": np.cumsum(trace.utility)[at].tolist(),
        "at": (at + 1).tolist(),
    }


def calibrate(policy: Policy, portfolio: Portfolio, rows: Vector) -> None:
    """Give a policy the scores of all arms' answers to these prompts."""
    for row in rows:
        profile = portfolio.profiles[row]
        for arm, score in zip(portfolio.arms, portfolio.scores[row].tolist()):
            decision = Decision(
                f"c{row} {arm}", arm, 0, CALIBRATION, profile, Objective(), scored=0
            )
            policy.learn(decision, Outcome(decision.id))
            policy.score(decision, score)


def conditions(arguments: argparse.Namespace) -> list[Condition]:
    """The conditions that the options ask for."""
    return [
        Condition(
            scored,
            arguments.feedback,
            failures,
            calibrated,
            arguments.first,
            arguments.pairs,
        )
        for scored in arguments.scored
        for calibrated in arguments.calibrate
        for failures in arguments.failures
    ]


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """All jobs; the strategies of one stream come next to each other."""
    splits = tuple(arguments.split)
    streams = product(
        arguments.portfolio,
        range(arguments.shuffles),
        LAMBDAS,
        conditions(arguments),
    )
    for portfolio, shuffle, cost_weight, condition in streams:
        for strategy in arguments.strategy:
            for variant in range(variants(strategy, arguments.defaults_only)):
                yield Job(
                    portfolio,
                    cost_weight,
                    shuffle,
                    strategy,
                    variant,
                    arguments.length,
                    splits,
                    arguments.data,
                    condition,
                )


def variants(strategy: str, defaults_only: bool) -> int:
    """Number of settings with which a strategy is played."""
    if defaults_only or strategy not in PEERS:
        return 1
    return 1 + len(PEERS[strategy][2])


STREAM_SOURCES = (
    "benchmarks/decisions/streams.py",
    "benchmarks/decisions/bounds.py",
    "policies/profiling/*.py",
    "deployments/profiler/reader.py",
    "assets/*/model.safetensors",
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
            arguments.length,
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


def references(
    arguments: argparse.Namespace, calibrated: int = 0
) -> dict[tuple[str, float], Any]:
    """For each portfolio and λ, the mean utility [shuffles] of the fixed arms, the ridge and the oracle."""
    found = {}
    for portfolio in arguments.portfolio:
        for cost_weight in LAMBDAS:
            found[portfolio, cost_weight] = by_shuffle(
                portfolio,
                cost_weight,
                arguments.shuffles,
                arguments.length,
                tuple(arguments.split),
                arguments.data,
                calibrated,
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


def print_comparison(frame: pd.DataFrame, known: References) -> None:
    """Print our policy beside each other strategy, cell by cell (comparison.py)."""
    top = {
        cell: max(bounds["best single"], bounds["offline ridge"])
        for cell, bounds in known.items()
    }
    compared = beside(frame, top)
    if not compared:
        return
    shown = pd.DataFrame([one.row() for one in compared])
    text = shown.to_markdown(index=False, disable_numparse=True)
    print(f"\nours beside each strategy\n{text}")
    closed = distance_closed(frame, top)
    if closed is not None:
        print(
            f"\nof the summed distance from the best default peer of each cell to the top, ours closes {closed:.2f}"
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


def figures(
    condition: Condition, table: pd.DataFrame, frame: pd.DataFrame, known: References
) -> dict[str, Any]:
    """All figures of one condition, as plain data."""
    bounds = []
    for (portfolio, cost_weight), values in known.items():
        bounds.append({"portfolio": portfolio, "cost_weight": cost_weight, **values})
    return {
        "condition": asdict(condition),
        "cells": table.to_dict("records"),
        "runs": frame.drop(columns=["curve", "at"]).to_dict("records"),
        "references": bounds,
    }


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="folder of the recorded streams; default: ROUTER_DATA"
    )
    parser.add_argument(
        "--portfolio", nargs="+", default=list(PORTFOLIOS), choices=ALL_PORTFOLIOS
    )
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument(
        "--length",
        type=int,
        default=2500,
        help="requests of a stream; prompts repeat if it is longer than all prompts",
    )
    parser.add_argument(
        "--scored",
        type=float,
        nargs="+",
        default=[0.05],
        help="shares of the answers that are scored",
    )
    parser.add_argument(
        "--feedback",
        choices=("judge", "users"),
        default="judge",
        help="whether it is known beforehand which answers will be scored",
    )
    parser.add_argument(
        "--first",
        type=float,
        default=0.5,
        help="share of the judge's scores that go to the first requests",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="our policy spends the judge's scores on pairs of answers",
    )
    parser.add_argument(
        "--failures",
        type=float,
        nargs="+",
        default=[0.0],
        help="probabilities that an answer of the dearest arm fails",
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        nargs="+",
        default=[0],
        help="numbers of prompts that all arms answer before the stream begins",
    )
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
    everything, ranked = play_jobs(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = []
    written = []
    for condition in conditions(arguments):
        frame = everything[everything.condition == str(condition)]
        by_cell = references(arguments, condition.calibrate)
        known = means(by_cell)
        table = summarise(frame, known)
        print(f"\n## {condition}\n")
        print_summary(table)
        print_comparison(frame, known)
        print_strategies(frame, by_cell, known)
        folder = arguments.out
        if len(conditions(arguments)) > 1:
            folder = folder / str(condition).replace(" ", "-").replace(",", "")
            folder.mkdir(exist_ok=True)
        paths.append(plots.regret(frame, known, folder))
        paths.append(plots.frontier(frame, known, folder))
        written.append(figures(condition, table, frame, known))
    if ranked:
        two_models = pd.DataFrame(ranked)
        print_two_models(two_models)
        paths.append(plots.performance(two_models, arguments.out))
    for path in paths:
        print(f"picture: {path}")
    if arguments.json:
        both = {"conditions": written, "apgr": ranked}
        arguments.json.write_text(json.dumps(both, indent=1))


if __name__ == "__main__":
    main()
