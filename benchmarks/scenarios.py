"""Worlds that change, on the recorded streams: `python -m benchmarks.scenarios`.

drift: half-way, the favourite silently answers half as well. price: the dearest arm costs a tenth. new-arm: the best
arm appears. delay: scores come 200 requests late. missing-feedback: half of the scores never come. Ours beside
ParetoBandit, which forgets, too; the figures are means over the shuffles.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.peers import ParetoBandit
from benchmarks.portfolios import PORTFOLIOS, Portfolio, load
from policies.evaluate import Stream, Trace, play
from policies.registry import make_policy, rearm
from policies.types import Objective, Vector

SCENARIOS = ("drift", "price", "new-arm", "delay", "missing-feedback")
OURS = ("thompson", "hierarchical")
COST_WEIGHT = 0.1
WINDOW = 50  # requests over which a share is measured
DELAY, COVERAGE = 200, 0.5


def reordered(portfolio: Portfolio, best_last: bool) -> Portfolio:
    """The same arms with the favourite in the last column, if it is to appear later."""
    utility = (portfolio.scores - COST_WEIGHT * portfolio.cost).mean(axis=0)
    order = np.argsort(utility, kind="stable") if best_last else np.arange(len(utility))
    arms = tuple(portfolio.arms[k] for k in order)
    return replace(portfolio, arms=arms, scores=portfolio.scores[:, order], cost=portfolio.cost[order])


def world(scenario: str, portfolio: Portfolio, shuffle: int, requests: int) -> tuple[Stream, int, int]:
    """The stream, the request at which it changes, and the arm (its column) that this is about."""
    rng = np.random.default_rng(1000 + shuffle)
    order = rng.permutation(len(portfolio.profiles))[:requests]
    change = len(order) // 2
    scores = portfolio.scores[order]
    costs = np.tile(portfolio.cost, (len(order), 1))
    best = int((portfolio.scores - COST_WEIGHT * portfolio.cost).mean(axis=0).argmax())
    if scenario == "drift":
        scores[change:, best] *= rng.random(len(order) - change) < 0.5
    if scenario == "price":
        best = int(portfolio.cost.argmax())
        costs[change:, best] /= 10
    return portfolio.stream(order, scores, costs), change, best


def run(scenario: str, name: str, portfolio: Portfolio, shuffle: int, requests: int) -> Trace:
    """Play one world to one policy."""
    stream, change, _ = world(scenario, portfolio, shuffle, requests)
    visible = stream.arms[:-1] if scenario == "new-arm" else stream.arms
    arms, later = stream.arms_at(0, visible), stream.arms_at(change)
    switches: dict[int, Callable[[Any], Any]] = {}
    if name in OURS:
        policy: Any = make_policy(name, arms)
        switch: Callable[[Any], Any] = lambda now: rearm(now, later)  # noqa: E731
    else:
        policy = ParetoBandit(arms, COST_WEIGHT, len(stream.profiles[0].features), shuffle)
        switch = lambda now: now.rearm(later)  # noqa: E731
    if scenario in ("price", "new-arm"):
        switches[change] = switch
    delay = DELAY if scenario == "delay" else 0
    coverage = COVERAGE if scenario == "missing-feedback" else 1.0
    rng = np.random.default_rng((shuffle, SCENARIOS.index(scenario)))
    return play(policy, stream, Objective(cost_weight=COST_WEIGHT), rng, delay, coverage, switches)


def until_moved(trace: Trace, arm: int, change: int) -> float:
    """Requests after the change until 80 % of the arm's final reallocation; NaN if its share hardly moves."""
    mine = (trace.chosen == arm).astype(float)
    before, final = mine[change - 5 * WINDOW : change].mean(), mine[-5 * WINDOW :].mean()
    if abs(final - before) < 0.1:
        return float("nan")
    share: Vector = np.convolve(mine[change:], np.ones(WINDOW) / WINDOW, mode="valid")
    reached = np.abs(share - before) >= 0.8 * abs(final - before)
    return float(reached.argmax() + WINDOW)


def main() -> None:
    """Play the worlds, and print what each policy made of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the recorded streams; default: ROUTER_DATA")
    parser.add_argument("--scenario", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--portfolio", nargs="+", default=["pareto_k4", "mmlupro_llama31"], choices=PORTFOLIOS)
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2500)
    arguments = parser.parse_args()
    rows = []
    todo = [(s, p, i) for s in arguments.scenario for p in arguments.portfolio for i in range(arguments.shuffles)]
    for scenario, portfolio_name, shuffle in tqdm(todo, unit="world"):
        portfolio = reordered(load(portfolio_name, data=arguments.data), scenario == "new-arm")
        _, change, arm = world(scenario, portfolio, shuffle, arguments.requests)
        for name in (*OURS, ParetoBandit.name):
            trace = run(scenario, name, portfolio, shuffle, arguments.requests)
            mine = trace.chosen == arm
            rows.append(
                {
                    "scenario": scenario,
                    "portfolio": portfolio_name,
                    "policy": name,
                    "utility before": trace.utility[:change].mean(),
                    "utility after": trace.utility[change:].mean(),
                    "last quarter": trace.utility[-(len(mine) // 4) :].mean(),
                    "share before": mine[change - 5 * WINDOW : change].mean(),
                    "share of the next 50": mine[change : change + WINDOW].mean(),
                    "share at the end": mine[-5 * WINDOW :].mean(),
                    "requests until moved": until_moved(trace, arm, change),
                }
            )
    table = pd.DataFrame(rows).groupby(["scenario", "portfolio", "policy"], sort=False).mean().reset_index()
    print(table.round(3).to_markdown(index=False))


if __name__ == "__main__":
    main()
