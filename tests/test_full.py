"""The command `python -m tests.full` runs all parts, collects what failed, and stops the system in any case."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import full
from tests.faults.catalogue import FULL, catalogue
from tests.full import Part, choose, parts, play, report, run, verdict
from tests.support.balancer import within


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command takes over two signals for good."""
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def part(
    name: str, code: str = "", limit_s: float = 60.0, needs_system: bool = False
) -> Part:
    """A part that runs this code."""
    return Part(name, name, [sys.executable, "-c", code], limit_s, needs_system)


def is_over(pid: int) -> bool:
    """Whether a process has ended, even if its end was not noticed by its parent."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_all_failures_are_collected(capfd: pytest.CaptureFixture[str]) -> None:
    """A failed part does not end the run; the table has every part, and below it is what failed."""
    results = run(
        [
            part("good", "print('fine')"),
            part("tests", "print('FAILED a.py::test_b'); print('1 failed'); exit(1)"),
            part("faults", "print('T5 NOT HELD: 3 of 7 lost'); exit(1)"),
            part("broken", "print('before'); raise ValueError('no names')"),
            part("last"),
        ]
    )
    assert [r.verdict for r in results] == ["passed", *["FAILED"] * 3, "passed"]
    assert results[1].failures == ["FAILED a.py::test_b"]
    assert results[2].failures == ["T5 NOT HELD: 3 of 7 lost"]
    assert "ValueError: no names" in results[3].failures
    assert verdict(results) == "FAILED" != verdict(results[:1])
    text = report(results)
    assert text.count("\n| ") == 6 and "T5 NOT HELD" in text
    assert "good | fine" in capfd.readouterr().out


def test_a_part_that_hangs_is_ended_with_its_children(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """To be longer than its limit is a failure, and no process of the part is left."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    result = play(part("hangs", code, limit_s=5.0), time.monotonic())
    assert result.verdict == "FAILED"
    assert result.failures == ["not done within 5 s"]
    pid = int(capfd.readouterr().out.split()[-1])
    within(30, lambda: is_over(pid))


def test_a_part_that_needs_the_system_is_not_run_without_it() -> None:
    """It counts as failed; the system is stopped, since some of it may run."""
    results = run(
        [
            part("start", "exit(1)"),
            part("clients", needs_system=True),
            part("stop", "print('stopped')"),
        ]
    )
    assert [r.verdict for r in results] == ["FAILED", "not run", "passed"]
    assert verdict(results[1:]) == "FAILED"


INTERRUPTED = """
import signal, sys
from tests import full
from tests.full import Part

# what starts the tests may ignore it, and a process inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
python = [sys.executable, "-c"]
full.run([
    Part("start", "", [*python, ""], 60),
    Part("hangs", "", [*python, "import time; print('begun', flush=True); time.sleep(600)"], 600),
    Part("stop", "", [*python, "print('end of the system')"], 60),
])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_system_is_stopped_after_a_signal(number: signal.Signals) -> None:
    """The exit status is not 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=full.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith("hangs | begun\n"):
            os.kill(process.pid, number)
            break
    rest = process.stdout.read()
    assert process.wait(60) != 0
    assert "stop | end of the system" in rest


def test_a_part_alone_starts_and_stops_its_system() -> None:
    """Other parts are left out; a part in one process needs no system."""
    every = parts(Path("state"))
    names = [one.name for one in choose(every, ["clients"])]
    assert names == ["start", "clients", "stop"]
    assert [one.name for one in choose(every, ["fuzz"])] == ["fuzz"]
    assert choose(every, []) == every


def test_the_catalogue_has_checks_for_both_parts() -> None:
    """No check of the run is a soak, which would not be played without `--minutes`."""
    needs = {fault.needs for fault in catalogue() if fault.tier == FULL}
    assert needs == {"", "url", "state"}
