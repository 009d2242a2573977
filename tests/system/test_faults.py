"""Tests that the fault checks kill only the processes of their own system."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.operations.launcher import MARK
from tests.faults.running_system import processes

TITLE = "ServeReplica-of-a-test"


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Three processes with the same title: one of our system, one of another system, one of none."""
    code = f"import time; print(flush=True); time.sleep(60)  # {TITLE}"
    marks = {
        "mine": {MARK: str(tmp_path / "mine")},
        "other": {MARK: str(tmp_path / "other")},
        "none": {},
    }
    clean = {name: value for name, value in os.environ.items() if name != MARK}
    made = {
        name: subprocess.Popen(
            [sys.executable, "-c", code], env={**clean, **mark}, stdout=subprocess.PIPE
        )
        for name, mark in marks.items()
    }
    for process in made.values():
        assert process.stdout is not None
        process.stdout.readline()
    yield made
    for process in made.values():
        process.kill()
        process.wait()


def test_only_the_named_systems_processes_are_found(
    tmp_path: Path, sleepers: dict[str, subprocess.Popen[bytes]]
) -> None:
    """A process is found by its title and the mark of its system; other folders, also above or below, do not match."""
    assert [process.pid for process in processes(tmp_path / "mine", TITLE)] == [
        sleepers["mine"].pid
    ]
    assert processes(tmp_path / "mine", "another title") == []
    assert (
        processes(tmp_path, TITLE) == []
        and processes(tmp_path / "mine" / "x", TITLE) == []
    )
