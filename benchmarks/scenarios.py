"""Worlds that change, on the recorded streams: `python -m benchmarks.quality --scenario drift`, or this module.

drift: half-way, the favourite silently answers half as well. price: half-way, the dearest arm costs a tenth. new-arm:
half-way, the best arm appears. delay: scores come 200 requests late. missing-feedback: half of the scores never come;
both beside the same stream with all scores at once, and with as many as came, but at once: `lost` says how much better
the last 250 requests are with these. budget: the mean cost has a ceiling (budget.py). Ours beside ParetoBandit, which
forgets and paces, too. Where a portfolio has fewer prompts than the stream, they come again in another order. Figures
are means over the shuffles with 95 % intervals; a picture of the shares around the change is saved as well.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks import budget, pictures
from benchmarks.peers import ParetoBandit
from benchmarks.portfolios import PORTFOLIOS, Portfolio, load
from policies.evaluate import Stream, Trace, play
from policies.registry import make_policy, rearm
from policies.types import Objective, Vector

CHANGES = ("drift", "price", "new-arm")
SCENARIOS = (*CHANGES, "delay", "missing-feedback", "budget")
PARETO: dict[str, dict[str, float]] = {"paretobandit": {}, "paretobandit, alpha 0.1": {"alpha": 0.1}}
STRATEGIES = ("thompson", *PARETO)
DEFAULT = ("routellm_mmlu", "mmlupro_llama31", "pareto_k4")
COST_WEIGHT = {"price": 0.3}  # else 0.1; at 0.3 the dearest arm is not worth its price before it drops
WINDOW = 50  # requests over which a share is measured
LONG = 250  # requests that tell the share before the change, and the final one
LEAST = 0.2  # change of a share that counts as one
DELAY, COVERAGE = 200, 0.5


@dataclass(frozen=True)
class Job:
    """One strategy in one world."""

    scenario: str
    portfolio: str
    shuffle: int
    strategy: str
    requests: int
    data: str | None


def weight(scenario: str) -> float:
    """The scenario's cost weight."""
    return COST_WEIGHT.get(scenario, 0.1)


def reordered(portfolio: Portfolio, best_last: bool) -> Portfolio:
    """The same arms with the favourite in the last column, if it is to appear later."""
    utility = (portfolio.scores - weight("new-arm") * portfolio.cost).mean(axis=0)
    order = np.argsort(utility, kind="stable") if best_last else np.arange(len(utility))
    arms = tuple(portfolio.arms[k] for k in order)
    return replace(portfolio, arms=arms, scores=portfolio.scores[:, order], cost=portfolio.cost[order])


def world(scenario: str, portfolio: Portfolio, shuffle: int, requests: int) -> tuple[Stream, int, int]:
    """The stream, the request at which it changes, and the arm (its column) that this is about."""
    rng = np.random.default_rng(1000 + shuffle)
    rows = len(portfolio.profiles)
    order = np.concatenate([rng.permutation(rows) for _ in range(-(-requests // rows))])[:requests]
    change = requests // 2
    scores = portfolio.scores[order]
    costs = np.tile(portfolio.cost, (requests, 1))
    best = int((portfolio.scores - weight(scenario) * portfolio.cost).mean(axis=0).argmax())
    if scenario == "drift":
        scores[change:, best] *= rng.random(requests - change) < 0.5
    if scenario == "price":
        best = int(portfolio.cost.argmax())
        costs[change:, best] /= 10
    return portfolio.stream(order, scores, costs), change, best


def run(job: Job, trouble: bool = True, most: float = inf) -> Trace:
    """Play one world to one strategy; without its trouble, scores come at once and always, until so many came."""
    portfolio = reordered(load(job.portfolio, data=job.data), job.scenario == "new-arm")
    stream, change, _ = world(job.scenario, portfolio, job.shuffle, job.requests)
    visible = stream.arms[:-1] if job.scenario == "new-arm" else stream.arms
    arms, later = stream.arms_at(0, visible), stream.arms_at(change)
    cost_weight, switch = weight(job.scenario), rearm
    if job.strategy in PARETO:
        given = arms, cost_weight, len(stream.profiles[0].features), job.shuffle
        policy: Any = ParetoBandit(*given, **PARETO[job.strategy])
        switch = ParetoBandit.rearm  # type: ignore[assignment]
    else:
        policy = make_policy(job.strategy, arms)
    switches: dict[int, Callable[[Any], Any]] = {}
    if job.scenario in ("price", "new-arm"):
        switches[change] = lambda now: switch(now, later)
    delay = DELAY if job.scenario == "delay" and trouble else 0
    coverage = COVERAGE if job.scenario == "missing-feedback" and trouble else 1.0
    rng = np.random.default_rng((job.shuffle, SCENARIOS.index(job.scenario)))
    return play(policy, stream, Objective(cost_weight=cost_weight), rng, delay, coverage, switches, most=most)


def until_moved(mine: Vector, change: int) -> float:
    """Requests after the change until 80 % of the final reallocation, NaN if the share hardly moves.

    Args:
        mine: [N] 1 where the arm was chosen; or shares of it over several streams.
        change: the request at which the world changed.
    """
    before, final = mine[change - LONG : change].mean(), mine[-LONG:].mean()
    if abs(final - before) < LEAST:
        return float("nan")
    share: Vector = np.convolve(mine[change + 1 - WINDOW :], np.ones(WINDOW) / WINDOW, mode="valid")  # at change, on
    reached = (share - before) * np.sign(final - before) >= 0.8 * abs(final - before)
    return float(reached.argmax() + 1)


def measure(job: Job) -> list[dict[str, Any]]:
    """What a strategy made of a world, for `budget` beside the peer with its own pacer; `curve` is for the picture."""
    row: dict[str, Any] = {"scenario": job.scenario, "portfolio": job.portfolio, "shuffle": job.shuffle}
    if job.scenario == "budget":
        portfolio = load(job.portfolio, data=job.data)
        stream, _, _ = world(job.scenario, portfolio, job.shuffle, job.requests)
        return [row | found for found in budget.measure(stream, job.strategy, job.shuffle)]
    trace = run(job)
    row |= {"strategy": job.strategy, "utility": trace.utility.mean()}
    if job.scenario not in CHANGES:
        row["utility without it"] = run(job, trouble=False).utility.mean()
        mine, full = (t.utility[-LONG:].mean() for t in (trace, run(job, False, trace.scores)))
        row |= {"utility of the last 250": mine, "as many scores, at once": full, "lost, %": 100 * (1 - mine / full)}
        return [row | {"curve": []}]
    portfolio = reordered(load(job.portfolio, data=job.data), job.scenario == "new-arm")
    _, change, arm = world(job.scenario, portfolio, job.shuffle, job.requests)
    mine = (trace.chosen == arm).astype(float)
    row |= {"utility before": trace.utility[:change].mean(), "utility after": trace.utility[change:].mean()}
    row |= {"utility of the last 250": trace.utility[-LONG:].mean()}
    row |= {"share before": mine[change - LONG : change].mean(), "share of the next 50": mine[change:][:WINDOW].mean()}
    row |= {"share at the end": mine[-LONG:].mean(), "requests until moved": until_moved(mine, change)}
    return [row | {"moved": float(np.isfinite(row["requests until moved"])), "curve": mine.tolist()}]


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a portfolio and strategy: the mean of each figure, and where there are several shuffles its interval."""
    rows = []
    for (portfolio, strategy), runs in frame.groupby(["portfolio", "strategy"], sort=False):
        row: dict[str, Any] = {"portfolio": portfolio, "strategy": strategy}
        for name in frame.columns.drop(["scenario", "portfolio", "strategy", "shuffle", "curve"]):
            values = runs[name].dropna()
            digits = 0 if "until" in name else 2 if "%" in name else 4
            row[name] = f"{values.mean():.{digits}f}" if len(values) else ""
            if len(values) > 1 and name not in ("moved", "binds"):
                row[name] += f" ± {1.96 * values.std() / np.sqrt(len(values)):.{digits}f}"
        if frame.scenario.iloc[0] in CHANGES:  # of the mean share, which scatters less than that of one stream
            share = np.mean(runs.curve.tolist(), axis=0)
            row["until the mean share moved"] = f"{until_moved(share, len(share) // 2):.0f}"
        rows.append(row)
    return pd.DataFrame(rows)


def main(given: Sequence[str] | None = None) -> None:
    """Play the worlds, and show what each strategy made of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the recorded streams; default: ROUTER_DATA")
    parser.add_argument("--scenario", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--portfolio", nargs="+", default=list(DEFAULT), choices=PORTFOLIOS)
    parser.add_argument("--strategy", nargs="+", default=list(STRATEGIES), help=f"policies, and {tuple(PARETO)}")
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("var"), help="folder of the picture")
    parser.add_argument("--json", type=Path, help="all figures into this file")
    arguments = parser.parse_args(given)
    ours = [name for name in arguments.strategy if name not in PARETO]
    todo = [
        Job(scenario, portfolio, shuffle, strategy, arguments.requests, arguments.data)
        for portfolio in arguments.portfolio
        for scenario in arguments.scenario
        for shuffle in range(arguments.shuffles)
        for strategy in (ours if scenario == "budget" else arguments.strategy)
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = [row for found in tqdm(pool.map(measure, todo), total=len(todo), unit="world") for row in found]
    frame = pd.DataFrame(rows)
    for scenario in arguments.scenario:
        table = summarise(frame[frame.scenario == scenario].dropna(axis=1, how="all"))
        print(f"\n{scenario}, λ = {0.0 if scenario == 'budget' else weight(scenario)}\n")
        print(table.to_markdown(index=False, disable_numparse=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if path := pictures.changes(frame, arguments.out):
        print(f"\npicture: {path}")
    if arguments.json:
        frame.drop(columns="curve").to_json(arguments.json, orient="records", indent=1)


if __name__ == "__main__":
    main()
