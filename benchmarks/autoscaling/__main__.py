"""Rules for the number of replicas, in the simulated cluster: `python -m benchmarks.autoscaling`.

Every rule gets the same requests, sizes, admission and router. The larger sizes begin without a replica.
docs/benchmarks/cluster.md says what is simulated. The command prints a table for each period; --json and --pictures
save all figures.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.autoscaling import plots, report
from benchmarks.autoscaling.periods import PERIODS, world
from benchmarks.autoscaling.rules import RULES, Rule
from benchmarks.autoscaling.scaler import RuleScaler
from benchmarks.cluster import routers
from benchmarks.cluster.simulation import Plan, Simulation
from benchmarks.decisions.streams import ALL_PORTFOLIOS
from benchmarks.validation import DEFAULT_FILE, sentence_of
from policies.types import Objective


def measure(
    rule: Rule, made: routers.World, period: str, scored: float
) -> report.Figures:
    """The figures of a rule on a period."""
    scaler = RuleScaler(rule, made.sizes, PERIODS[period].look_s)
    initial = scaler.initial(made.sizes)
    sizes = tuple(
        replace(size, replicas=number)
        for size, number in zip(made.sizes, initial, strict=True)
    )
    run = Simulation(
        sizes,
        made.load,
        Plan(made.rate, scored=scored),
        made.cost,
        made.objective,
        made.seed,
        scaler,
    ).run(routers.make(routers.OURS, made))
    hours = float(made.load.arrival_s[-1]) / made.rate / 3600.0
    where = (period, made.portfolio.name, made.seed)
    return report.figures(run, made.objective, scaler, rule, where, hours)


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the recordings; default: ROUTER_DATA")
    parser.add_argument(
        "--period",
        nargs="+",
        default=["azure_code hour", "servegen day", "quiet servegen day"],
        choices=PERIODS,
    )
    parser.add_argument(
        "--portfolio", default="mmlupro_llama31", choices=ALL_PORTFOLIOS
    )
    parser.add_argument(
        "--rule",
        nargs="+",
        default=list(dict.fromkeys(rule.name for rule in RULES)),
        choices=list(dict.fromkeys(rule.name for rule in RULES)),
    )
    parser.add_argument("--requests", type=int, help="at most so many of each period")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--scored", type=float, default=0.1, help="share of the answers with a score"
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        default=200,
        help="prompts that every size has answered beforehand; 0: the router knows nothing",
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
        "--quick", action="store_true", help="few requests of the hour, one seed"
    )
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.period = ["azure_code hour"]
        arguments.requests, arguments.seeds = 1000, 1
    return arguments


def main(given: list[str] | None = None) -> None:
    """Simulate, print the tables, and save the figures."""
    arguments = parse(given)
    error = sentence_of(arguments.validation)
    rules = [rule for rule in RULES if rule.name in arguments.rule]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    objective = Objective(
        latency_weight=arguments.latency_weight, cost_weight=arguments.cost_weight
    )
    rows: list[report.Figures] = []
    found: dict[str, list[report.Point]] = {}
    total = len(arguments.period) * len(seeds) * len(rules)
    with tqdm(total=total, unit="run") as progress:
        for period in arguments.period:
            for seed in seeds:
                made = world(
                    period,
                    arguments.portfolio,
                    objective,
                    arguments.calibrate,
                    seed,
                    arguments.requests,
                    arguments.data,
                )
                for rule in rules:
                    rows.append(measure(rule, made, period, arguments.scored))
                    progress.update()
            found[period] = report.points([row for row in rows if row.period == period])
            progress.clear()
            print(
                f"\n{arguments.portfolio}, {period}\n\n{report.table(found[period])}\n\n{error}"
            )
            if arguments.pictures:
                name = f"autoscaling-{period.replace(' ', '-')}.png"
                print(plots.draw(found[period], period, arguments.pictures / name))
            if arguments.json:
                save(arguments, error, found, rows)


def save(
    arguments: argparse.Namespace,
    error: str,
    found: Mapping[str, Sequence[report.Point]],
    rows: Sequence[report.Figures],
) -> None:
    """Write what is known so far."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    saved = {
        "options": options,
        "error": error,
        "points": {name: report.plain(own) for name, own in found.items()},
        "rows": report.plain(rows),
    }
    arguments.json.write_text(json.dumps(saved, indent=1))


if __name__ == "__main__":
    main()
