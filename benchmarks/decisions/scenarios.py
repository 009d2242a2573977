"""Worlds that change, on the recorded streams: `python -m benchmarks.decisions.run --scenario drift`, or this module.

- drift: half-way, the quality of the best arm silently halves.
- price: half-way, the price of the dearest arm falls to a tenth.
- new-arm: half-way, the best arm appears.
- delay: scores arrive 200 requests late.
- missing-feedback: half of the scores never arrive.
- budget: the mean cost has a ceiling (budget.py).
- budget-delay: the same, and the router learns of a decision and its cost 0 to 300 requests later.

For delay and missing-feedback the same stream is also played with all scores at once, and with the same number of
scores at once; `lost` compares the last 250 requests with the latter. Our policy is measured beside ParetoBandit,
which also forgets and has a budget pacer. If a portfolio has fewer prompts than the stream, they repeat in another
order. Figures are means over the shuffles with 95 % intervals. A picture shows the shares around the change.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.decisions import budget, plots
from benchmarks.decisions.peers import ParetoBandit
from benchmarks.decisions.streams import PORTFOLIOS, Portfolio, load
from policies.evaluation.simulate import (
    FeedbackPlan,
    SimulationResult,
    Stream,
    simulate,
)
from policies.registry import make_policy, rearm
from policies.types import Objective, Vector

CHANGES = ("drift", "price", "new-arm")
BUDGETS = ("budget", "budget-delay")
SCENARIOS = (*CHANGES, "delay", "missing-feedback", *BUDGETS)
PARETO: dict[str, dict[str, float]] = {
    "paretobandit": {},
    "paretobandit, alpha 0.1": {"alpha": 0.1},
}
STRATEGIES = ("thompson", *PARETO)
DEFAULT = ("routellm_mmlu", "mmlupro_llama31", "pareto_k4")
# At 0.3 the dearest arm is not worth its price before the price drops. Other scenarios: 0.1.
COST_WEIGHT = {"price": 0.3}
WINDOW = 50  # requests over which a share is measured
LONG = 250  # requests over which the first and the final share are measured
MIN_CHANGE = 0.2  # smallest change of a share that counts as a reallocation
DELAY = 200  # requests between a decision and its score
COVERAGE = 0.5  # share of the decisions that get a score


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
    """Cost weight λ of the scenario."""
    return COST_WEIGHT.get(scenario, 0.1)


def reordered(portfolio: Portfolio, best_last: bool) -> Portfolio:
    """The same arms; with `best_last` the best arm is in the last column, so that it can appear later."""
    utility = (portfolio.scores - weight("new-arm") * portfolio.cost).mean(axis=0)
    order = np.argsort(utility, kind="stable") if best_last else np.arange(len(utility))
    arms = tuple(portfolio.arms[k] for k in order)
    return replace(
        portfolio,
        arms=arms,
        scores=portfolio.scores[:, order],
        cost=portfolio.cost[order],
    )


def order_of(
    portfolio: Portfolio, requests: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[N] row numbers of the prompts of a stream."""
    rows = len(portfolio.profiles)
    return np.concatenate([rng.permutation(rows) for _ in range(-(-requests // rows))])[
        :requests
    ]


def world(
    scenario: str, portfolio: Portfolio, shuffle: int, requests: int
) -> tuple[Stream, int, int]:
    """The stream, the request at which it changes, and the column of the arm that changes."""
    rng = np.random.default_rng(1000 + shuffle)
    order = order_of(portfolio, requests, rng)
    change = requests // 2
    scores = portfolio.scores[order]
    costs = np.tile(portfolio.cost, (requests, 1))
    best = int(
        (portfolio.scores - weight(scenario) * portfolio.cost).mean(axis=0).argmax()
    )
    if scenario == "drift":
        scores[change:, best] *= rng.random(requests - change) < 0.5
    if scenario == "price":
        best = int(portfolio.cost.argmax())
        costs[change:, best] /= 10
    return portfolio.stream(order, scores, costs), change, best


def run(job: Job, trouble: bool = True, most: float = inf) -> SimulationResult:
    """Play one scenario with one strategy.

    Args:
        job: strategy and scenario.
        trouble: False gives every score at once, in place of the scenario's delay or missing scores.
        most: number of scores after which no more are given.
    """
    portfolio = reordered(load(job.portfolio, data=job.data), job.scenario == "new-arm")
    stream, change, _ = world(job.scenario, portfolio, job.shuffle, job.requests)
    visible = stream.arms[:-1] if job.scenario == "new-arm" else stream.arms
    arms = stream.arms_at(0, visible)
    later = stream.arms_at(change)
    cost_weight = weight(job.scenario)
    switch = rearm
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
    return simulate(
        policy,
        stream,
        Objective(cost_weight=cost_weight),
        rng,
        FeedbackPlan(coverage, delay=delay, most=most),
        switches,
    )


def until_moved(mine: Vector, change: int) -> float:
    """Requests after the change until 80 % of the final reallocation; NaN if the share hardly changes.

    Args:
        mine: [N] 1 if the arm was chosen, else 0; or its mean over several streams.
        change: request at which the scenario changes.
    """
    before = mine[change - LONG : change].mean()
    final = mine[-LONG:].mean()
    if abs(final - before) < MIN_CHANGE:
        return float("nan")
    # shares of the windows that end at the change or later
    recent = mine[change + 1 - WINDOW :]
    share: Vector = np.convolve(recent, np.ones(WINDOW) / WINDOW, mode="valid")
    reached = (share - before) * np.sign(final - before) >= 0.8 * abs(final - before)
    return float(reached.argmax() + 1)


def measure(job: Job) -> list[dict[str, Any]]:
    """Figures of one job. `budget` also has rows of the peer with its own pacer. `curve` is for the picture."""
    row: dict[str, Any] = {
        "scenario": job.scenario,
        "portfolio": job.portfolio,
        "shuffle": job.shuffle,
    }
    if job.scenario == "budget":
        portfolio = load(job.portfolio, data=job.data)
        stream, _, _ = world(job.scenario, portfolio, job.shuffle, job.requests)
        return [
            row | found for found in budget.measure(stream, job.strategy, job.shuffle)
        ]
    if job.scenario == "budget-delay":
        portfolio = load(job.portfolio, data=job.data)
        rng = np.random.default_rng(1000 + job.shuffle)
        order = order_of(portfolio, job.requests, rng)
        delayed = budget.measure_delays(
            portfolio.stream(order), portfolio.paid[order], job.strategy, job.shuffle
        )
        return [row | found for found in delayed]
    trace = run(job)
    row |= {"strategy": job.strategy, "utility": trace.utility.mean()}
    if job.scenario not in CHANGES:
        row["utility without it"] = run(job, trouble=False).utility.mean()
        mine, full = (
            t.utility[-LONG:].mean() for t in (trace, run(job, False, trace.scores))
        )
        row |= {
            "utility of the last 250": mine,
            "as many scores, at once": full,
            "lost, %": 100 * (1 - mine / full),
        }
        return [row | {"curve": []}]
    portfolio = reordered(load(job.portfolio, data=job.data), job.scenario == "new-arm")
    _, change, arm = world(job.scenario, portfolio, job.shuffle, job.requests)
    mine = (trace.chosen == arm).astype(float)
    moved = until_moved(mine, change)
    row |= {
        "utility before": trace.utility[:change].mean(),
        "utility after": trace.utility[change:].mean(),
        "utility of the last 250": trace.utility[-LONG:].mean(),
        "share before": mine[change - LONG : change].mean(),
        "share of the next 50": mine[change:][:WINDOW].mean(),
        "share at the end": mine[-LONG:].mean(),
        "requests until moved": moved,
        "moved": float(np.isfinite(moved)),
        "curve": mine.tolist(),
    }
    return [row]


def _digits(figure: str) -> int:
    """Decimal places of a figure in the table."""
    if "until" in figure:
        return 0
    return 2 if "%" in figure else 4


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each portfolio and strategy: the mean of each figure, with its interval over the shuffles."""
    rows = []
    for (portfolio, strategy), runs in frame.groupby(
        ["portfolio", "strategy"], sort=False
    ):
        row: dict[str, Any] = {"portfolio": portfolio, "strategy": strategy}
        for name in frame.columns.drop(
            ["scenario", "portfolio", "strategy", "shuffle", "curve"]
        ):
            values = runs[name].dropna()
            digits = _digits(name)
            row[name] = f"{values.mean():.{digits}f}" if len(values) else ""
            if len(values) > 1 and name not in ("moved", "binds"):
                row[name] += (
                    f" ± {1.96 * values.std() / np.sqrt(len(values)):.{digits}f}"
                )
        if frame.scenario.iloc[0] in CHANGES:
            # the mean share scatters less than the share of one stream
            share = np.mean(runs.curve.tolist(), axis=0)
            row["until the mean share moved"] = (
                f"{until_moved(share, len(share) // 2):.0f}"
            )
        rows.append(row)
    return pd.DataFrame(rows)


def parse_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="folder of the recorded streams; default: ROUTER_DATA"
    )
    parser.add_argument(
        "--scenario", nargs="+", default=list(SCENARIOS), choices=SCENARIOS
    )
    parser.add_argument(
        "--portfolio", nargs="+", default=list(DEFAULT), choices=PORTFOLIOS
    )
    parser.add_argument(
        "--strategy",
        nargs="+",
        default=list(STRATEGIES),
        help=f"names of policies, or {tuple(PARETO)}",
    )
    parser.add_argument("--shuffles", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument(
        "--out", type=Path, default=Path("var"), help="folder of the picture"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(given)


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    """All jobs. The scenarios of a budget are played with our policies only; `budget` itself adds ParetoBandit."""
    ours = [name for name in arguments.strategy if name not in PARETO]
    for portfolio in arguments.portfolio:
        for scenario in arguments.scenario:
            strategies = ours if scenario in BUDGETS else arguments.strategy
            for shuffle in range(arguments.shuffles):
                for strategy in strategies:
                    yield Job(
                        scenario,
                        portfolio,
                        shuffle,
                        strategy,
                        arguments.requests,
                        arguments.data,
                    )


def main(given: Sequence[str] | None = None) -> None:
    """Play the scenarios, print a table for each and save the picture."""
    arguments = parse_arguments(given)
    todo = list(jobs(arguments))
    rows = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        results = pool.map(measure, todo)
        for found in tqdm(results, total=len(todo), unit="world"):
            rows += found
    frame = pd.DataFrame(rows)
    for scenario in arguments.scenario:
        table = summarise(frame[frame.scenario == scenario].dropna(axis=1, how="all"))
        cost_weight = 0.0 if scenario in BUDGETS else weight(scenario)
        print(f"\n{scenario}, λ = {cost_weight}\n")
        print(table.to_markdown(index=False, disable_numparse=True))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if path := plots.changes(frame, arguments.out):
        print(f"\npicture: {path}")
    if arguments.json:
        frame.drop(columns="curve").to_json(arguments.json, orient="records", indent=1)


if __name__ == "__main__":
    main()
