"""The comparison with the last release."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.release import check

ROOT = Path(__file__).parents[2]


def test_the_ratio_is_the_median_of_the_rounds_and_new_figures_are_left_out() -> None:
    """A slow phase of the machine during one round does not decide."""
    here = [{"a": 12.0, "new": 1.0}, {"a": 11.0, "new": 1.0}, {"a": 90.0, "new": 1.0}]
    released = [{"a": 10.0}, {"a": 10.0}, {"a": 10.0}]
    assert check.ratios(here, released) == {"a": 1.2}


def test_the_timings_run_in_a_tree(tmp_path: Path) -> None:
    """They need `policies` alone, and every figure is a time."""
    (tmp_path / "policies").symlink_to(ROOT / "policies")
    figures = check.measure(tmp_path)
    assert len(figures) == 4
    assert all(0.0 < figure < 1e6 for figure in figures.values())


def test_a_slower_tree_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code says so, and the message names the figure."""
    times = iter([5.0, 10.0, 12.0, 12.0, 10.0])  # warm-up; release, here; here, release
    monkeypatch.setattr(check, "unpack", lambda revision, folder: None)
    monkeypatch.setattr(check, "measure", lambda tree: {"a decision": next(times)})
    monkeypatch.setattr(sys, "argv", ["check", "--release", "v1", "--rounds", "2"])
    with pytest.raises(SystemExit) as raised:
        check.main()
    assert raised.value.code == check.TOO_SLOW
    assert "1.15 times as slow as v1: a decision" in capsys.readouterr().out


def test_without_a_release_it_says_what_to_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clone without tags has no release."""
    monkeypatch.setattr(check, "newest_release", lambda: "")
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(SystemExit) as raised:
        check.main()
    assert raised.value.code == check.NO_RELEASE
    assert "RELEASE=" in capsys.readouterr().out


def test_an_unknown_release_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Git's own message is passed on."""
    with pytest.raises(subprocess.CalledProcessError):
        check.unpack("no-such-release", tmp_path)
