"""How well it decides, beside its peers, on recorded public streams: `make bench-quality`.

Every strategy plays the same streams with the same features and sees the score of the arm it chose only. Utility is
score - λ · cost, cost being an arm's mean cost as a share of the dearest arm's. Prints tables with 95 % intervals over
the shuffles, the two-model sets by RouteLLM's measures (apgr.py) and microseconds (micro.py), saves pictures and, with
--json, all figures.
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

from benchmarks import apgr, micro, pictures, scenarios, tables
from benchmarks.peers import PEERS
from benchmarks.portfolios import LAMBDAS, PORTFOLIOS, load
from benchmarks.references import by_shuffle, order_of
from benchmarks.resume import digest, play_all
from deployments.settings import PolicySettings
from policies.evaluate import play
from policies.registry import make_policy
from policies.types import Objective

OURS = "ours"
OUR_POLICY = PolicySettings().name  # what serve_config.yaml takes if it names none
POINTS = 50  # of the curves over time


@dataclass(frozen=True)
class Job:
    """One strategy on one stream; `options` differ from the strategy's defaults."""

    portfolio: str
    cost_weight: float
    shuffle: int
    strategy: str
    variant: int  # 0 is the documented default; the others are its grid
    requests: int
    splits: tuple[str, ...]
    data: str | None


def run(job: Job) -> dict[str, Any]:
    """Play it; mean utility, score and cost, and the cumulative utility at POINTS places."""
    portfolio = load(job.portfolio, job.splits, job.data)
    stream = portfolio.stream(order_of(portfolio, job.shuffle, job.requests))
    arms = stream.arms_at(0)
    if job.strategy in PEERS:
        kind, defaults, grid = PEERS[job.strategy]
        options = defaults | (grid[job.variant - 1] if job.variant else {})
        dims = len(stream.profiles[0].features)
        policy: Any = kind(arms, job.cost_weight, dims, job.shuffle, **options)
    else:
        policy = make_policy({OURS: OUR_POLICY, "random": "uniform"}.get(job.strategy, job.strategy), arms)
    rng = np.random.default_rng((job.shuffle, PORTFOLIOS.index(job.portfolio), round(100 * job.cost_weight)))
    trace = play(policy, stream, Objective(cost_weight=job.cost_weight), rng)
    at = np.linspace(0, len(trace.utility) - 1, POINTS).astype(int)
    row: dict[str, Any] = {"portfolio": job.portfolio, "cost_weight": job.cost_weight, "shuffle": job.shuffle}
    row |= {"strategy": job.strategy, "variant": job.variant, "utility": float(trace.utility.mean())}
    row |= {"score": float(trace.score.mean()), "cost": float(trace.cost_usd.mean())}
    return row | {"curve": np.cumsum(trace.utility)[at].tolist(), "at": (at + 1).tolist()}


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """Everything to play, with the strategies of one stream next to each other."""
    for portfolio in arguments.portfolio:
        for shuffle in range(arguments.shuffles):
            for cost_weight in LAMBDAS:
                for strategy in arguments.strategy:
                    grid = PEERS[strategy][2] if strategy in PEERS and not arguments.defaults_only else ()
                    for variant in range(1 + len(grid)):
                        yield Job(
                            *(portfolio, cost_weight, shuffle, strategy, variant, arguments.requests),
                            *(tuple(arguments.split), arguments.data),
                        )


_WORLD = ("benchmarks/portfolios.py", "benchmarks/references.py", "policies/features.py", "policies/evaluate.py")


@lru_cache
def _digest(*patterns: str) -> str:
    return digest(*patterns)


def _code(job: Job) -> str:
    """Digest of what a run's result depends on."""
    return _digest(*_WORLD, "benchmarks/peers.py" if job.strategy in PEERS else "policies/*.py")


def summarise(frame: pd.DataFrame, known: dict[tuple[str, float], dict[str, float]]) -> pd.DataFrame:
    """A row a cell: our utility, the best peer at its defaults and of its grid, and the share of the gap closed."""
    rows = []
    for (portfolio, cost_weight), references_ in known.items():
        cell = frame[(frame.portfolio == portfolio) & (frame.cost_weight == cost_weight)]
        mean = cell.groupby(["strategy", "variant"]).utility.mean()
        peers = mean[[name in PEERS for name in mean.index.get_level_values(0)]]
        ours = cell[cell.strategy == OURS].utility
        top = max(references_["best single"], references_["offline ridge"])
        row: dict[str, Any] = {"portfolio": portfolio, "λ": cost_weight, "ours": ours.mean()}
        row["±"] = 1.96 * ours.std() / np.sqrt(len(ours))
        if len(peers):
            defaults = peers[peers.index.get_level_values(1) == 0]
            row["best peer, defaults"], row["best peer, grid"] = defaults.max(), peers.max()
            row["which"] = defaults.idxmax()[0]
            row["gap closed"] = (row["ours"] - defaults.max()) / (top - defaults.max())
        row |= {key: references_[key] for key in ("best single", "offline ridge", "oracle")}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Play everything and show it."""
    if any(given.partition("=")[0] == "--scenario" for given in sys.argv[1:]):
        return scenarios.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the recorded streams; default: ROUTER_DATA")
    parser.add_argument("--portfolio", nargs="+", default=list(PORTFOLIOS), choices=PORTFOLIOS)
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--split", nargs="+", default=["train", "dev"], choices=("train", "dev"))
    parser.add_argument("--strategy", nargs="+", default=[OURS, "static", "random", *PEERS])
    parser.add_argument("--defaults-only", action="store_true", help="leave out the peers' grids")
    parser.add_argument("--skip", nargs="+", default=[], choices=("apgr", "micro"), help="leave out these parts")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("var"), help="folder of the pictures")
    parser.add_argument("--resume", type=Path, help="keep what was played in this file, and go on from it")
    parser.add_argument("--json", type=Path, help="all figures into this file")
    parser.add_argument("--scenario", help="worlds that change, see benchmarks/scenarios.py")
    arguments = parser.parse_args()
    todo = list(jobs(arguments))
    with Pool(arguments.jobs) as pool:
        rows = list(tqdm(play_all(run, todo, pool, _code, arguments.resume), total=len(todo), unit="run"))
        given = (arguments.portfolio, OUR_POLICY, LAMBDAS, arguments.shuffles, arguments.requests, arguments.data)
        pairs = [] if "apgr" in arguments.skip else apgr.trials(*given)
        ranked = [row for found in tqdm(pool.imap(apgr.measure, pairs), total=len(pairs), unit="run") for row in found]
    frame = pd.DataFrame(rows).sort_values(["portfolio", "cost_weight", "strategy", "variant", "shuffle"])
    range_ = (arguments.shuffles, arguments.requests, tuple(arguments.split), arguments.data)
    possible = {(p, w): by_shuffle(p, w, *range_) for p in arguments.portfolio for w in LAMBDAS}
    known = {cell: {key: float(values.mean()) for key, values in found.items()} for cell, found in possible.items()}
    table = summarise(frame, known)
    print(table.round(4).to_markdown(index=False))
    if "gap closed" in table:
        ahead = (table.ours > table["best peer, defaults"]).sum(), (table.ours > table["best peer, grid"]).sum()
        print(f"\nahead of every peer at its defaults in {ahead[0]} of {len(table)} cells, at its best of the grid in")
        print(f"{ahead[1]}; mean share of the gap to the better of best single and ridge closed: ", end="")
        print(f"{table['gap closed'].mean():.2f}")
    short = tables.shortfall(frame, known).round(4)
    print(f"\nshort of the better of best single and ridge, utility a request\n{short.to_markdown(index=False)}")
    for portfolio, strategies in tables.by_strategy(frame, possible).items():
        print(f"\n{portfolio}: mean utility ± 95 %\n{strategies.to_markdown(index=False, disable_numparse=True)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = [pictures.regret(frame, known, arguments.out), pictures.frontier(frame, known, arguments.out)]
    if ranked:
        two = pd.DataFrame(ranked)
        shown = apgr.summarise(two).to_markdown(index=False, disable_numparse=True)
        print(f"\nTwo models, strong and weak\n{shown}\n{apgr.NOTE}")
        paths.append(pictures.performance(two, arguments.out))
    for path in paths:
        print(f"picture: {path}")
    timed = [] if "micro" in arguments.skip else micro.in_a_process_of_its_own()
    if arguments.json:
        found = {"cells": table.to_dict("records"), "runs": frame.drop(columns=["curve", "at"]).to_dict("records")}
        found |= {"apgr": ranked, "micro": timed}
        references_ = [{"portfolio": p, "cost_weight": w, **values} for (p, w), values in known.items()]
        arguments.json.write_text(json.dumps(found | {"references": references_}, indent=1))


if __name__ == "__main__":
    main()
