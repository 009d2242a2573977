"""The command `python -m tests.full`: what `make test` leaves out and holds on any machine.

The slow tests, generated requests, the catalogue's faults in one process, and, on a system that is started for it, the
clients of OpenAI's API and the faults of a running system. The other checks of the catalogue have bars of milliseconds,
which need a quiet machine, or take long: `make test-faults`.

Every part is run, also if an earlier one failed, except for those that need the system if it does not start. The system
has its own ports and folder, and is ended in any case. The exit status is 1 if a part failed.
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
# Added to every port: the system of the tests has 100, that of the benchmarks 150. With more than 200, the port of
# Ray's clients would be in the range of its workers.
PORT_OFFSET = 200
URL = f"http://127.0.0.1:{8000 + PORT_OFFSET}"
QUIET_S = 60.0  # a part that prints nothing for so long is reported as running
MUTATIONS = 20_000
# CPU time for which a callback may hold the event loop; `make test-fuzz` has the bar of a quiet machine
MOST_HOLD_MS = "500"
# starts of the lines that name a failure: of pytest, of the command `router`; and within a line, of the catalogue
FAILURES = ("FAILED ", "ERROR ", "Error: ")
NOT_HELD = " NOT HELD: "
SAID = 12  # last lines of a part that failed without naming a failure


@dataclass(frozen=True)
class Part:
    """A command of the run.

    name: its name on the command line.
    what: what it tests.
    command: the command; its exit status is 0 if it passed.
    limit_s: seconds after which it is ended and has failed.
    needs_system: whether the system must run.
    """

    name: str
    what: str
    command: list[str]
    limit_s: float
    needs_system: bool = False


@dataclass
class Result:
    """What became of a part.

    verdict: passed, FAILED or not run.
    failures: lines that say what failed.
    """

    part: Part
    verdict: str
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def parts(state: Path) -> list[Part]:
    """All parts, in their order; the system's files are in this folder."""
    python = [sys.executable, "-m"]
    faults = [*python, "tests.faults", "--tier", "full", "--place"]
    router = [*python, "deployments.commands"]
    where = ["--state", str(state), "--offset", str(PORT_OFFSET)]
    here = ["--url", URL, "--state", str(state)]
    return [
        Part(
            "slow",
            "the slow tests",
            [*python, "pytest", "-q", "-m", "slow", "-n2", "--max-worker-restart=0"],
            1_200,
        ),
        Part(
            "fuzz",
            f"generated requests, and {MUTATIONS:,} mutations",
            [
                *(*python, "tests.fuzz", "--mutations", str(MUTATIONS)),
                *("--most-hold-ms", MOST_HOLD_MS),
            ],
            1_800,
        ),
        Part("faults", "the catalogue, in one process", [*faults, "process"], 1_200),
        Part("start", "a system starts", [*router, "up", *where], 900),
        Part(
            "clients",
            "the clients of OpenAI's API",
            ["make", "--no-print-directory", "test-clients", f"URL={URL}"],
            1_500,
            needs_system=True,
        ),
        Part(
            "system-faults",
            "the catalogue, on the system",
            [*faults, "system", *here],
            2_400,
            needs_system=True,
        ),
        Part("stop", "the system stops", [*router, "down", *where], 300),
    ]


def environment() -> dict[str, str]:
    """Environment of every part: one thread for each process that computes, and no bars of progress in the log.

    No part needs the language model. A fault that starts the system again leaves it out, too.
    """
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **one, "TQDM_DISABLE": "1", "ROUTER_WITHOUT": "general"}


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; the group is killed at the end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def play(part: Part, began: float) -> Result:
    """Run a part and print its lines, each with the seconds since the beginning of the whole run."""

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {part.name} | {line}", flush=True)

    say(" ".join(part.command))
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    failures: list[str] = []
    start = time.monotonic()
    with started(part.command) as process:
        output = process.stdout
        assert output is not None

        def read() -> None:
            # a process that the part leaves behind may keep the pipe open
            for line in output:
                lines.put(line.rstrip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (left := part.limit_s - (time.monotonic() - start)) > 0:
            try:
                line = lines.get(timeout=min(left, QUIET_S))
            except queue.Empty:
                if process.poll() is not None:
                    break
                if left > QUIET_S:
                    say("...")
                continue
            if line is None:
                break
            say(line)
            said.append(line)
            if line.startswith(FAILURES) or NOT_HELD in line:
                failures.append(line)
        else:
            failures.append(f"not done within {part.limit_s:.0f} s")
        status = None if left <= 0 else process.wait(left)
    seconds = time.monotonic() - start
    if status == 0:
        return Result(part, "passed", seconds)
    return Result(part, "FAILED", seconds, failures or said[-SAID:])


def run(chosen: list[Part]) -> list[Result]:
    """Run these parts; the one that stops the system is run in any case, also after an interrupt."""
    began = time.monotonic()
    results: list[Result] = []
    runs = False
    stop = [part for part in chosen if part.name == "stop"]
    try:
        for part in chosen:
            if part.name == "stop":
                continue
            if part.needs_system and not runs:
                results.append(Result(part, "not run"))
                continue
            result = play(part, began)
            results.append(result)
            if part.name == "start":
                runs = result.verdict == "passed"
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        results += [play(part, began) for part in stop]
    return results


def report(results: list[Result]) -> str:
    """The table of parts, and below it what failed in each."""
    rows = [[r.part.name, r.part.what, r.verdict, f"{r.seconds:.0f}"] for r in results]
    total = sum(result.seconds for result in results)
    rows.append(["all", "", verdict(results), f"{total:.0f}"])
    table = tabulate(
        rows, ["part", "what", "result", "s"], "github", disable_numparse=True
    )
    failed = [
        "\n".join(
            [f"\n{result.part.name}:", *(f"  {line}" for line in result.failures)]
        )
        for result in results
        if result.failures
    ]
    return "\n".join([table, *failed])


def verdict(results: list[Result]) -> str:
    """Whether all parts passed; a part that was not run has not."""
    passed = results and all(result.verdict == "passed" for result in results)
    return "passed" if passed else "FAILED"


def choose(every: list[Part], names: list[str]) -> list[Part]:
    """The parts of these names, or all; the system is started and stopped for a part that needs it."""
    if not names:
        return every
    wanted = [part for part in every if part.name in names]
    if any(part.needs_system for part in wanted):
        names = [*names, "start", "stop"]
    return [part for part in every if part.name in names]


def main() -> None:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(
        "python -m tests.full",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in parts(Path()) if part.name not in ("start", "stop")]
    parser.add_argument(
        "--only", nargs="+", default=[], choices=names, help="only these parts"
    )
    given = parser.parse_args()
    # as after an interrupt, the system is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    state = Path(tempfile.mkdtemp(prefix="router-full-"))
    results = run(choose(parts(state), given.only))
    print(f"\n{report(results)}", flush=True)
    if verdict(results) != "passed":
        sys.exit(f"\nwhat the system has written is in {state}")
    shutil.rmtree(state, ignore_errors=True)


if __name__ == "__main__":
    main()
