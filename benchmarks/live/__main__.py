"""Recorded load on the running system, the router beside every fixed size: `python -m benchmarks.live`.

First, clients in a closed loop measure how many of the demo's calculations the dearest size answers in a second. The
first rate is a share of that. Then each contender, `auto` or a model by name, gets the same window of recorded arrivals
with the same calculations, at each multiple of the rate, in every round. The loop is open, and latency counts from the
intended time of sending. A cell ends when all its answers are there. Only then the scores of `auto` are sent, and the
router is asked what it has recorded of the answers.

The router is not calibrated here: `router calibrate` does that before.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks.cluster.workload import recorded_arrivals
from benchmarks.live import plots
from benchmarks.live.arrivals import TRACES
from benchmarks.live.cells import (
    AUTO,
    Cell,
    Client,
    add_capacity_options,
    is_right,
    measure_capacity,
    open_plan,
    schedule,
)
from benchmarks.live.client import send_apart
from benchmarks.live.figures import Figures, compare, figures, groups, table
from benchmarks.live.plan import Seen
from benchmarks.live.system import Running, System
from deployments.demonstration.client import DEFAULT_URL
from deployments.demonstration.run import make_stream


def play(
    cell: Cell,
    system: System,
    before: Running,
    arguments: argparse.Namespace,
    client: Client,
) -> Figures:
    """Play a cell, send its scores, and ask what the router has recorded.

    Args:
        cell: what to play.
        system: the gateway.
        before: its state before all cells.
        arguments: of the command.
        client: carries out a plan.

    Raises:
        SystemExit: the gateway does not answer.
    """
    arrivals_s = cell.arrivals(arguments.data)
    tasks = make_stream(cell.seed, len(arrivals_s))
    seen = client(open_plan(system.url, cell.contender, tasks, arrivals_s))
    replicas = system.running().replicas
    if cell.contender == AUTO and arguments.scored:
        rng = random.Random(cell.seed)
        system.score(
            {
                one.decision_id: float(is_right(task, one))
                for task, one in zip(tasks, seen, strict=True)
                if one.answered and rng.random() < arguments.scored
            }
        )
    recorded_s = system.recorded_s(_spread(seen, arguments.looked_up))
    return figures(cell, tasks, seen, before, recorded_s, replicas)


def _spread(seen: Sequence[Seen], count: int) -> list[str]:
    """Decisions of at most so many answers, evenly over the time."""
    ids = [one.decision_id for one in seen if one.answered]
    count = min(count, len(ids))
    return [ids[n * len(ids) // count] for n in range(count)]


def parse(given: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default=DEFAULT_URL)
    parser.add_argument("--data", help="folder of the recordings; default: ROUTER_DATA")
    parser.add_argument(
        "--trace", nargs="+", default=["azure_code", "azure_conv"], choices=TRACES
    )
    parser.add_argument(
        "--factor",
        nargs="+",
        type=float,
        default=[1.0, 2.0, 4.0],
        help="multiples of the first rate",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.5,
        help="of the dearest size at the first rate",
    )
    add_capacity_options(parser)
    parser.add_argument(
        "--contender",
        nargs="+",
        help="by default auto and every model that calculates; variants are models, too",
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of a cell")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--scored",
        type=float,
        default=0.1,
        help="share of the answers of auto that get a score after their cell; the demo scores all",
    )
    parser.add_argument(
        "--looked-up",
        type=int,
        default=100,
        help="answers of a cell whose recorded latency is asked for",
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--picture", type=Path, help="file for the picture")
    parser.add_argument(
        "--quick", action="store_true", help="one recording, one round, short cells"
    )
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.trace = arguments.trace[:1]
        arguments.factor = [1.0, 2.0]
        arguments.rounds, arguments.seconds = 1, 5.0
        arguments.capacity_seconds = 10.0
    return arguments


def main(given: list[str] | None = None, client: Client = send_apart) -> None:
    """Replay the load with a client that carries out plans, print the tables, and save the figures."""
    arguments = parse(given)
    for trace in arguments.trace:
        recorded_arrivals(trace, arguments.data)  # a missing one ends the command here
    system = System(arguments.url.rstrip("/"))
    before = system.running()
    dearest = before.sizes[-1]
    contenders = tuple(arguments.contender or (AUTO, *before.sizes))
    unknown = set(contenders) - {AUTO, *before.prices}
    if unknown:
        raise SystemExit(
            f"unknown contender '{min(unknown)}'; choose of: {', '.join((AUTO, *before.prices))}"
        )
    capacity = arguments.capacity or measure_capacity(
        client,
        system.url,
        dearest,
        arguments.clients,
        arguments.capacity_seconds,
        arguments.seed,
    )
    first_rate = arguments.utilisation * capacity
    print(
        f"{dearest} gives {capacity:.2f} answers a second; the first rate is "
        f"{first_rate:.2f} requests a second; latency_weight {before.objective.latency_weight:g}, cost_weight "
        f"{before.objective.cost_weight:g}; {before.replicas} replicas"
    )
    system.settle(before.replicas)
    cells = schedule(
        arguments.trace,
        arguments.factor,
        arguments.rounds,
        contenders,
        first_rate,
        arguments.seconds,
        arguments.seed,
    )
    try:
        for cell in cells:
            cell.arrivals(arguments.data)
    except ValueError as error:
        raise SystemExit(f"{error}; change --seconds or --factor") from None
    rows: list[Figures] = []
    with tqdm(cells, unit="cell") as progress:
        for cell in progress:
            progress.set_postfix_str(f"{cell.trace} × {cell.factor:g} {cell.contender}")
            rows.append(play(cell, system, before, arguments, client))
            if not system.settle(before.replicas):
                progress.write(
                    f"more than {before.replicas} replicas, or requests in flight, before the next cell",
                    file=sys.stderr,
                )
            if arguments.json:
                save(arguments, capacity, before, rows)
    for group in groups(rows):
        cell = group[0].cell
        print(
            f"\n{cell.trace} × {cell.factor:g}: {cell.rate:.2f} requests a second\n\n{table(group)}"
        )
    if arguments.picture:
        print(plots.draw(rows, arguments.picture))


def save(
    arguments: argparse.Namespace,
    capacity: float,
    before: Running,
    rows: Sequence[Figures],
) -> None:
    """Write what is known so far."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    saved = {
        "options": options,
        "capacity": capacity,
        "latency_weight": before.objective.latency_weight,
        "cost_weight": before.objective.cost_weight,
        "comparisons": [
            asdict(found) for group in groups(rows) if (found := compare(group))
        ],
        "rows": [asdict(row) for row in rows],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(saved, indent=1))


if __name__ == "__main__":
    main()
