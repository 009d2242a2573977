"""The files of an instance can be read by its user only."""

import os
import stat
import sys
from pathlib import Path

import pytest

from deployments.operations import launcher
from deployments.operations.launcher import ROOT, load, prepare_state


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("exists", [False, True])
def test_the_folder_is_for_its_user_only(tmp_path: Path, exists: bool) -> None:
    """That of an earlier release is closed, whatever the user's umask is."""
    state = tmp_path / "deep" / "var"
    before = os.umask(0o000)
    try:
        if exists:
            state.mkdir(parents=True, mode=0o755)
        prepare_state(state)
    finally:
        os.umask(before)
    assert mode(state) == 0o700


@pytest.mark.parametrize(
    ("name", "expected"), [("mlflow", 0o600), ("standby_proxy", 0o600), ("ray", 0o644)]
)
def test_files_of_the_parts_are_private(
    tmp_path: Path, name: str, expected: int
) -> None:
    """MLflow's database as well. Ray's own folder stays readable for Prometheus."""
    cluster = load(ROOT / "serve_config.yaml", tmp_path / "var", 0)
    prepare_state(cluster.state)
    made = cluster.state / "made"
    code = f"open({str(made)!r}, 'w').close()"
    before = os.umask(0o022)
    try:
        process = launcher._spawn(cluster, name, [sys.executable, "-c", code])
        assert process.wait(60) == 0
    finally:
        os.umask(before)
    assert mode(made) == expected
    assert mode(cluster.state / f"{name}.log") == 0o600
