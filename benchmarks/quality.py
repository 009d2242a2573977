"""How well it decides, beside its peers, on recorded public streams: `make bench-quality`.

Every strategy plays the same streams with the same features and sees the score of the arm it chose only. Utility is
score - λ · cost, cost being an arm's mean cost as a share of the dearest arm's. Prints tables with 95 % intervals over
the shuffles, saves pictures and, with --json, all figures.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks import pictures, scenarios
from benchmarks.peers import PEERS
from benchmarks.portfolios import LAMBDAS, PORTFOLIOS, Portfolio, load
from policies.evaluate import play
from policies.registry import make_policy
from policies.types import Objective, Vector

OURS = "ours"
POINTS = 50  # of the curves over time
FOLDS = 5


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


def order_of(portfolio: Portfolio, shuffle: int, requests: int) -> Vector:
    """Row numbers of the prompts in this shuffle's order."""
    return np.random.default_rng(1000 + shuffle).permutation(len(portfolio.profiles))[:requests]


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
        policy = make_policy({OURS: "thompson", "random": "uniform"}.get(job.strategy, job.strategy), arms)
    rng = np.random.default_rng((job.shuffle, PORTFOLIOS.index(job.portfolio), round(100 * job.cost_weight)))
    trace = play(policy, stream, Objective(cost_weight=job.cost_weight), rng)
    at = np.linspace(0, len(trace.utility) - 1, POINTS).astype(int)
    row: dict[str, Any] = {"portfolio": job.portfolio, "cost_weight": job.cost_weight, "shuffle": job.shuffle}
    row |= {"strategy": job.strategy, "variant": job.variant, "utility": float(trace.utility.mean())}
    row |= {"score": float(trace.score.mean()), "cost": float(trace.cost_usd.mean())}
    return row | {"curve": np.cumsum(trace.utility)[at].tolist(), "at": (at + 1).tolist()}


def references(name: str, cost_weight: float, shuffles: int, requests: int, splits: Any, data: Any) -> dict[str, float]:
    """What is possible: the best fixed arm, the oracle, and ridge regression on all arms' scores, cross-fitted."""
    portfolio = load(name, splits, data)
    utility = portfolio.scores - cost_weight * portfolio.cost
    predicted = ridge(portfolio.features, portfolio.scores) - cost_weight * portfolio.cost
    routed = utility[np.arange(len(utility)), predicted.argmax(axis=1)]
    rows = [order_of(portfolio, shuffle, requests) for shuffle in range(shuffles)]
    fixed = np.mean([utility[row].mean(axis=0) for row in rows], axis=0)
    found = {f"always {arm}": float(value) for arm, value in zip(portfolio.arms, fixed, strict=True)}
    found["best single"] = float(np.mean([utility[row].mean(axis=0).max() for row in rows]))
    found["offline ridge"] = float(np.mean([routed[row].mean() for row in rows]))
    return found | {"oracle": float(np.mean([utility[row].max(axis=1).mean() for row in rows]))}


def ridge(features: Vector, scores: Vector, penalty: float = 3.0) -> Vector:
    """[M, K] scores predicted by ridge regression fitted on the other folds."""
    fold = np.random.default_rng(0).permutation(len(features)) % FOLDS
    predicted = np.zeros_like(scores)
    for f in range(FOLDS):
        x, y = features[fold != f], scores[fold != f]
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
        predicted[fold == f] = features[fold == f] @ weights
    return predicted


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
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("var"), help="folder of the pictures")
    parser.add_argument("--json", type=Path, help="all figures into this file")
    parser.add_argument("--scenario", help="worlds that change, see benchmarks/scenarios.py")
    arguments = parser.parse_args()
    todo = list(jobs(arguments))
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = list(tqdm(pool.map(run, todo, chunksize=8), total=len(todo), unit="run"))
    frame = pd.DataFrame(rows)
    given = (arguments.shuffles, arguments.requests, tuple(arguments.split), arguments.data)
    known = {(p, w): references(p, w, *given) for p in arguments.portfolio for w in LAMBDAS}
    table = summarise(frame, known)
    print(table.round(4).to_markdown(index=False))
    if "gap closed" in table:
        ahead = (table.ours > table["best peer, defaults"]).sum(), (table.ours > table["best peer, grid"]).sum()
        print(f"\nahead of every peer at its defaults in {ahead[0]} of {len(table)} cells, at its best of the grid in")
        print(f"{ahead[1]}; mean share of the gap to the better of best single and ridge closed: ", end="")
        print(f"{table['gap closed'].mean():.2f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in (pictures.regret(frame, known, arguments.out), pictures.frontier(frame, known, arguments.out)):
        print(f"picture: {path}")
    if arguments.json:
        found = {"cells": table.to_dict("records"), "runs": frame.drop(columns=["curve", "at"]).to_dict("records")}
        references_ = [{"portfolio": p, "cost_weight": w, **values} for (p, w), values in known.items()]
        arguments.json.write_text(json.dumps(found | {"references": references_}, indent=1))


if __name__ == "__main__":
    main()
