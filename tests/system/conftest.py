"""The running system of the tests in this folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORT_OFFSET = 100  # added to every port of the system


@pytest.fixture(scope="package")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running system with the three models that calculate: ROUTER_URL, or a system that is started here."""
    if url := os.environ.get("ROUTER_URL"):
        yield url.rstrip("/")
        return
    state = tmp_path_factory.mktemp("system")
    launch = [sys.executable, "-m", "deployments.commands"]
    where = ["--state", str(state), "--offset", str(PORT_OFFSET)]
    try:
        # no live test needs the language model, which takes memory and time
        leave_out = ["--without", "general"]
        subprocess.run([*launch, "up", *where, *leave_out], cwd=ROOT, check=True)
        yield f"http://127.0.0.1:{8000 + PORT_OFFSET}"
    finally:
        subprocess.run([*launch, "down", *where], cwd=ROOT, check=False)
