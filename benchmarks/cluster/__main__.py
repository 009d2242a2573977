"""Size choice under load, in a simulated cluster: `python -m benchmarks.cluster`.

Every router gets the same arrivals, prompts, replicas and admission. docs/benchmarks/cluster.md says what is simulated
and what is not. The command prints a table for each load and event; --json and --pictures save all figures.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.cluster import capacity, hardware, plots, report, routers, simulation
from benchmarks.cluster.workload import TRACES, workload
from benchmarks.decisions.streams import ALL_PORTFOLIOS, load
from benchmarks.validation import DEFAULT_FILE, sentence_of
from policies.types import Objective

EVENTS = ("", "degrade", "death", "price")
LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3)
HINDSIGHT = "hindsight"


@dataclass(frozen=True)
class Setting:
    """What all routers of a run have in common."""

    portfolio: str
    trace: str
    event: str
    load: float
    seed: int


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """All settings that the options ask for."""
    first = arguments.first_seed
    for portfolio in arguments.portfolio:
        for trace in arguments.trace:
            for event in arguments.event:
                for rate in arguments.load:
                    for seed in range(first, first + arguments.seeds):
                        yield Setting(portfolio, trace, event, rate, seed)


def world_of(setting: Setting, arguments: argparse.Namespace) -> routers.World:
    """The sizes, the requests and the calibration prompts of a setting."""
    portfolio = load(setting.portfolio, data=arguments.data)
    order = np.random.default_rng((setting.seed, 7)).permutation(
        len(portfolio.profiles)
    )
    kept, rows = order[: arguments.calibrate], order[arguments.calibrate :]
    requests = workload(
        setting.trace,
        portfolio,
        rows,
        arguments.requests,
        setting.seed,
        arguments.data,
    )
    sizes = hardware.sizes(portfolio.arms)
    work = capacity.work(sizes, requests.prompts, requests.answers)
    rate = setting.load * capacity.highest_rate(sizes, work)
    objective = Objective(
        latency_weight=arguments.latency_weight, cost_weight=arguments.cost_weight
    )
    return routers.World(
        sizes, portfolio, requests, objective, rate, kept, setting.seed
    )


def measure(
    setting: Setting, arguments: argparse.Namespace, progress: tqdm | None = None
) -> list[report.Figures]:
    """The figures of all routers in a setting."""
    world = world_of(setting, arguments)
    plan = simulation.Plan(
        world.rate,
        scored=arguments.scored,
        event=setting.event,
    )
    runs = {}
    wanted = arguments.router or routers.names(world)
    for name in dict.fromkeys([*wanted, HINDSIGHT]):
        fixed = name.startswith(routers.FIXED)
        priced = name != routers.UNPRICED
        made = simulation.Simulation(
            world.sizes,
            world.load,
            plan if priced else replace(plan, scarcity=None),
            world.cost,
            world.objective,
            setting.seed,
        )
        runs[name] = made.run(
            routers.make(name, world),
            name.removeprefix(routers.FIXED) if fixed else "",
            routers.reprice(world),
        )
        if progress is not None:
            progress.update()
    best = float(runs[HINDSIGHT].utility(world.objective).mean())
    rows = []
    for name in dict.fromkeys([*wanted, HINDSIGHT]):
        where = (
            setting.portfolio,
            setting.trace,
            setting.event,
            setting.load,
            setting.seed,
            name,
        )
        rows.append(
            report.figures(runs[name], world.objective, best, where, len(world.sizes))
        )
    return rows


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the recordings; default: ROUTER_DATA")
    parser.add_argument(
        "--portfolio", nargs="+", default=["mmlupro_qwen15"], choices=ALL_PORTFOLIOS
    )
    parser.add_argument("--trace", nargs="+", default=["azure_conv"], choices=TRACES)
    parser.add_argument(
        "--load",
        nargs="+",
        type=float,
        default=list(LOADS),
        help="shares of the highest rate that the cluster can carry",
    )
    parser.add_argument(
        "--event",
        nargs="+",
        default=[""],
        choices=EVENTS,
        help='what happens half of the way; with "" among them, a table says how soon each router is back',
    )
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--router", nargs="+", help="by default all")
    parser.add_argument(
        "--scored", type=float, default=0.1, help="share of the answers with a score"
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        default=200,
        help="prompts that every size has answered beforehand, for all routers that learn",
    )
    parser.add_argument(
        "--latency-weight", type=float, default=0.01, help="score points a second"
    )
    parser.add_argument(
        "--cost-weight",
        type=float,
        default=0.1,
        help="score points for the cost of the dearest size",
    )
    parser.add_argument(
        "--validation",
        type=Path,
        help=f"file of benchmarks.live.validation, whose error is printed; default: {DEFAULT_FILE}, if it is there",
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    parser.add_argument(
        "--quick", action="store_true", help="few requests, two loads, one seed"
    )
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.portfolio = ["pareto_k4"]
        arguments.load = [0.5, 1.0]
        arguments.requests, arguments.seeds = 500, 1
    return arguments


def main(given: list[str] | None = None) -> None:
    """Simulate, print the tables, and save the figures."""
    arguments = parse(given)
    error = sentence_of(arguments.validation)
    rows: list[report.Figures] = []
    with tqdm(unit="run") as progress:
        for setting in settings(arguments):
            rows += measure(setting, arguments, progress)
    groups: dict[tuple[str, str, str], list[report.Figures]] = {}
    for row in rows:
        groups.setdefault((row.portfolio, row.trace, row.event), []).append(row)
    for (portfolio, trace, event), group in groups.items():
        for rate in sorted({row.load for row in group}):
            at = [row for row in group if row.load == rate]
            title = f"{portfolio} on {trace}, load {rate:g}" + (event and f", {event}")
            print(f"\n{title}\n\n{report.table(at)}\n\n{error}")
        print(f"\n{portfolio} on {trace}{event and f', {event}'}, all loads")
        for router in (routers.OURS, routers.COLD):
            print(f"\n{report.comparison(group, router)}")
        undisturbed = groups.get((portfolio, trace, ""))
        if event and undisturbed:
            print(f"\n{report.recovery(group, undisturbed)}")
        if arguments.pictures:
            name = "-".join(
                part for part in ("cluster", portfolio, trace, event) if part
            )
            print(plots.draw(group, arguments.pictures / f"{name}.png"))
    if arguments.json:
        options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
        }
        saved = {"options": options, "error": error, "rows": report.plain(rows)}
        arguments.json.write_text(json.dumps(saved, indent=1, allow_nan=True))


if __name__ == "__main__":
    main()
