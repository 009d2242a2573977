"""The catalogue of faults as a table: the fault, the measured figure, the bar, and whether the bar held.

Command: `make test-faults`, or `python -m tests.faults --only T11 T15`. The exit status is 1 if a bar did not hold.
`--tier full` plays the checks that `make test-full` does: their bars are a behaviour, and hold on any machine.

Most checks need no Ray: all parts of the gateway are real and run in this process, and fake models have a known
capacity. With `--url http://127.0.0.1:8000` the checks of a running system are also played. With `--state var`, its
folder, those that kill its processes are played, too. Checks that are not played are listed as live.
"""

import argparse
import logging
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

HEADERS = ["", "fault", "figure", "bar", "held", "s"]
HEAD = """# Faults and their results

`make test-faults` writes this table. Rows of a running system need `URL=http://127.0.0.1:8000 STATE=var`, the two soaks
also need `MINUTES=20`. T1 to T31 are the project's catalogue; `s` is the duration of a check in seconds.
"""
# by `Fault.needs`: the attributes of a System that must be set
NEEDS = {
    "": (),
    "url": ("url",),
    "state": ("url", "state"),
    "minutes": ("url", "state", "minutes"),
}
# tiers of the checks: which command plays them beside `make test-faults`, which plays all
TEST = "test"  # make test, since it takes seconds
FULL = "full"  # make test-full
ALONE = "alone"  # no other: the bar is a latency of a quiet machine, or the check takes a quarter of an hour or more
TIERS = (TEST, FULL, ALONE)


@dataclass(frozen=True)
class Finding:
    """Result of a check: the figure in words, and whether the bar held."""

    figure: str
    held: bool


@dataclass(frozen=True)
class System:
    """A running system.

    url: address of its gateway.
    state: its folder, which identifies its processes.
    minutes: duration of a soak.
    """

    url: str
    state: Path | None = None
    minutes: float = 0.0


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    id: number in the project's catalogue.
    what: the fault in words.
    bar: the bar in words.
    check: measures the figure. Its argument is an empty folder, or a System if `needs` is not empty.
    needs: a key of NEEDS.
    tier: one of TIERS.
    """

    id: str
    what: str
    bar: str
    check: Callable[[Any], Finding]
    needs: str = ""
    tier: str = FULL


def catalogue() -> list[Fault]:
    """All faults, in the order of their modules."""
    from tests.faults import (
        bad_input,
        failing_parts,
        hostile_clients,
        kills,
        overload,
        poisoned_feedback,
        running_system,
        soaks,
    )

    modules = (
        bad_input,
        overload,
        poisoned_feedback,
        failing_parts,
        running_system,
        hostile_clients,
        soaks,
        kills,
    )
    return [fault for module in modules for fault in module.FAULTS]


def in_order(faults: list[Fault]) -> list[Fault]:
    """The faults sorted by their numbers."""
    return sorted(faults, key=lambda fault: int(fault.id[1:]))


def update_table(path: Path, rows: list[list[str]]) -> None:
    """Write new rows into the table of a file; other rows and the text below the table stay."""
    lines = path.read_text().splitlines() if path.exists() else []
    table_lines = [n for n, line in enumerate(lines) if line.startswith("|")]
    below = lines[table_lines[-1] + 1 :] if table_lines else []
    by_fault: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line.startswith("| T"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            by_fault[cells[0], cells[1]] = cells
    for row in rows:
        if row[4] != "live":
            by_fault[row[0], row[1]] = row
    known = []
    for fault in in_order(catalogue()):
        if (fault.id, fault.what) in by_fault:
            known.append(by_fault[fault.id, fault.what])
    table = tabulate(known, HEADERS, "github", disable_numparse=True)
    path.write_text("\n".join([HEAD, table, *below]) + "\n")


def missing_options(fault: Fault, system: System | None) -> list[str]:
    """Options of the command line that a check needs and that are not given."""
    return [name for name in NEEDS[fault.needs] if not getattr(system, name, None)]


def play(fault: Fault, system: System | None) -> list[str]:
    """Play one check; returns its row of the table."""
    if missing := missing_options(fault, system):
        needs = " and ".join(f"--{name}" for name in missing)
        return [fault.id, fault.what, f"needs {needs}", fault.bar, "live", ""]
    began = time.perf_counter()
    try:
        if fault.needs:
            finding = fault.check(system)
        else:
            with tempfile.TemporaryDirectory() as folder:
                finding = fault.check(Path(folder))
    except Exception as error:
        traceback.print_exc()
        finding = Finding(f"the check broke: {type(error).__name__}", False)
    seconds = f"{time.perf_counter() - began:.1f}"
    held = "yes" if finding.held else "NO"
    return [fault.id, fault.what, finding.figure, fault.bar, held, seconds]


def parse_arguments(faults: list[Fault]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ID",
        help=" ".join(dict.fromkeys(fault.id for fault in faults)),
    )
    parser.add_argument("--tier", choices=TIERS, help="only the checks of this tier")
    parser.add_argument(
        "--place",
        choices=("process", "system"),
        help="only the checks in this process, or only those of a running system",
    )
    parser.add_argument("--url", help="address of a running system")
    parser.add_argument(
        "--state", type=Path, help="its folder; allows its processes to be killed"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=0.0,
        help="duration of each soak, T6 and T21; by default they are not played",
    )
    parser.add_argument(
        "--table", type=Path, help="file whose table gets the played rows"
    )
    return parser.parse_args()


def chosen(fault: Fault, given: argparse.Namespace) -> bool:
    """Whether the command line asks for this check."""
    if given.place and (given.place == "system") != bool(fault.needs):
        return False
    return (not given.only or fault.id in given.only) and given.tier in (
        None,
        fault.tier,
    )


def main() -> None:
    """Play the checks and print the table."""
    every = in_order(catalogue())
    given = parse_arguments(every)
    faults = [fault for fault in every if chosen(fault, given)]
    if not faults:
        sys.exit("no check is of this kind")
    system = None
    if given.url:
        system = System(given.url.rstrip("/"), given.state, given.minutes)
    logging.disable(logging.CRITICAL)
    rows = []
    for fault in faults:
        row = play(fault, system)
        rows.append(row)
        held = row[4]
        if held == "live":
            continue
        if given.table:
            update_table(given.table, [row])
        verdict = "held" if held == "yes" else "NOT HELD"
        print(f"{fault.id} {verdict}: {row[2]}", file=sys.stderr, flush=True)
    print(tabulate(rows, HEADERS, "github", disable_numparse=True))
    sys.exit(any(row[4] == "NO" for row in rows))
