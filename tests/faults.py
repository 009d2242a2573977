"""The catalogue of faults as a table: what was done to it, the figure, the bar, and whether it held.

`make test-faults`, or `python -m tests.faults --only T11 T15`. The checks here need no Ray: all parts of the gateway
are real and in this process, the models are stand-ins with a known capacity. With `--url http://127.0.0.1:8000` those
that need a running system are played against it as well, and with `--state var` (its folder) also those that kill its
processes; without, they are listed as live. Exit status 1 if one did not hold.
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
HEAD = """# Faults, and what came of them

Made by `make test-faults`; the rows of a running system with `URL=http://127.0.0.1:8000 STATE=var`, the two soaks with
`MINUTES=20`. T1 to T30 are the project's catalogue; `s` is how long the check took.
"""
NEEDS = {"": (), "url": ("url",), "state": ("url", "state"), "minutes": ("url", "state", "minutes")}


@dataclass(frozen=True)
class Finding:
    """What a check found: the figure in words, and whether it is on the right side of the bar."""

    figure: str
    held: bool


@dataclass(frozen=True)
class System:
    """A running system: where it answers, and its folder, by which its processes are known and no others."""

    url: str
    state: Path | None = None
    minutes: float = 0.0  # for the soaks


@dataclass(frozen=True)
class Fault:
    """One row: `check` takes an empty folder, or a System where it needs its `url`, or its `state` and
    `minutes` as well.
    """

    id: str
    what: str
    bar: str
    check: Callable[[Any], Finding]
    needs: str = ""


def catalogue() -> list[Fault]:
    """All rows."""
    from tests import (
        faults_hostile,
        faults_input,
        faults_kill,
        faults_live,
        faults_load,
        faults_memory,
        faults_parts,
        faults_run,
    )

    rooms = (
        faults_input,
        faults_load,
        faults_memory,
        faults_parts,
        faults_live,
        faults_hostile,
        faults_run,
        faults_kill,
    )
    return [fault for room in rooms for fault in room.FAULTS]


def keep(path: Path, rows: list[list[str]]) -> None:
    """Put what was played into a file's table; rows that were not played now, and what is said below, stay."""
    lines = path.read_text().splitlines() if path.exists() else []
    below = lines[max((n for n, line in enumerate(lines) if line.startswith("|")), default=len(lines)) + 1 :]
    before = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| T")]
    there = {(row[0], row[1]): row for row in before} | {(row[0], row[1]): row for row in rows if row[4] != "live"}
    order = [(fault.id, fault.what) for fault in sorted(catalogue(), key=lambda fault: int(fault.id[1:]))]
    table = tabulate([there[key] for key in order if key in there], HEADERS, "github", disable_numparse=True)
    path.write_text("\n".join([HEAD, table, *below]) + "\n")


def main() -> None:
    """The command line."""
    faults = catalogue()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ID", help=" ".join(dict.fromkeys(fault.id for fault in faults)))
    parser.add_argument("--url", help="of a running system")
    parser.add_argument("--state", type=Path, help="its folder: its processes may be killed")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="of each soak, T6 and T21; without, they are left out"
    )
    parser.add_argument("--table", type=Path, help="a file whose table gets what was played")
    given = parser.parse_args()
    system = System(given.url.rstrip("/"), given.state, given.minutes) if given.url else None
    logging.disable(logging.CRITICAL)
    rows, broken = [], 0
    for fault in sorted(faults, key=lambda fault: int(fault.id[1:])):
        if given.only and fault.id not in given.only:
            continue
        began = time.perf_counter()
        try:
            if missing := [name for name in NEEDS[fault.needs] if not getattr(system, name, None)]:
                needs = " and ".join(f"--{name}" for name in missing)
                rows.append([fault.id, fault.what, f"needs {needs}", fault.bar, "live", ""])
                continue
            if fault.needs:
                finding = fault.check(system)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    finding = fault.check(Path(folder))
        except Exception as error:
            traceback.print_exc()
            finding = Finding(f"the check broke: {type(error).__name__}", False)
        broken += not finding.held
        seconds = f"{time.perf_counter() - began:.1f}"
        rows.append([fault.id, fault.what, finding.figure, fault.bar, "yes" if finding.held else "NO", seconds])
        if given.table:
            keep(given.table, rows[-1:])
        print(f"{fault.id} {'held' if finding.held else 'NOT HELD'}: {finding.figure}", file=sys.stderr, flush=True)
    print(tabulate(rows, HEADERS, "github", disable_numparse=True))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
