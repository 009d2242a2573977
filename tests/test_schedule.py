"""With several processes, the tests of a file run in one of them, and so do all tests of the running system."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The pause makes sure that the other process asks for work meanwhile.
TESTS = """
import time

import pytest

@pytest.mark.parametrize("n", range(6))
def test_something(n, worker_id):
    time.sleep(0.05)
    print(f"ran {__file__} in {worker_id}.")
"""


def test_files_and_the_running_system_stay_in_one_process(tmp_path: Path) -> None:
    """Both processes get work, and the tests of the running system begin before the files that come after them."""
    (tmp_path / "tests/system").mkdir(parents=True)
    for name in ("system/test_a", "system/test_b", "test_c", "test_d", "test_e"):
        (tmp_path / f"tests/{name}.py").write_text(TESTS)
    arguments = [
        "-n",
        "2",
        "-p",
        "tests.support.schedule",
        "-rP",
        "--rootdir",
        ".",
        "tests",
    ]
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-c", os.devnull), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "30 passed" in done.stdout, done.stdout[-2000:]
    ran = re.findall(r"ran \S*?(\w+/test_\w)\.py in (gw\d)\.", done.stdout)
    processes = {
        name: {where for what, where in ran if what == name} for name, _ in ran
    }
    assert len(ran) == 30 and len(processes) == 5
    assert all(len(where) == 1 for where in processes.values()), processes
    assert processes["system/test_a"] == processes["system/test_b"]
    assert {where for _, where in ran} == {"gw0", "gw1"}
