"""In continuous integration a skipped test fails, unless the skip is listed and the machine makes it impossible."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import skips
from tests.support.skips import LISTED, Listed, is_failure

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = """
import pytest

def test_that_passes():
    pass

@pytest.mark.skip(reason="a mark")
def test_with_a_mark():
    pass

def test_that_skips_itself():
    pytest.skip("no moon here")

@pytest.fixture
def broken():
    pytest.skip("no fixture here")

def test_with_a_fixture(broken):
    pass

@pytest.mark.xfail(strict=True)
def test_that_fails_as_expected():
    assert False
"""
MODULE = 'import pytest\npytest.importorskip("no_such_module")\n'


def run(folder: Path, **environment: str) -> str:
    """What pytest prints at the end of a run of the tests in a folder."""
    clean = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.skips"]
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(folder), str(folder)],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()[-1]


def test_a_skip_is_a_failure_in_ci_only(tmp_path: Path) -> None:
    """A skip by a mark, in a test, in a fixture, and of a whole file; a test that fails as expected is no skip."""
    (tmp_path / "test_skipped.py").write_text(SKIPPED)
    assert run(tmp_path).startswith("1 passed, 3 skipped, 1 xfailed")
    assert run(tmp_path, CI="true").startswith(
        "1 failed, 1 passed, 1 xfailed, 2 errors"
    )
    (tmp_path / "test_module.py").write_text(MODULE)
    assert run(tmp_path).startswith("1 passed, 4 skipped, 1 xfailed")
    assert "1 error" in run(tmp_path, CI="true")  # no test is run


@pytest.mark.parametrize("impossible", [True, False])
def test_a_listed_skip_is_a_failure_where_the_test_is_possible(
    monkeypatch: pytest.MonkeyPatch, impossible: bool
) -> None:
    """The condition gets the words of the reason that it needs."""
    asked = []

    def condition(package: str) -> bool:
        asked.append(package)
        return impossible

    monkeypatch.setattr(skips, "LISTED", (Listed(r"no package (\S+) here", condition),))
    assert is_failure("no package moon here") is not impossible
    assert asked == ["moon"] and is_failure("another reason")


def test_each_listed_skip_is_one_of_a_test() -> None:
    """A reason that no test gives any more is removed from the list."""
    sources = (
        "".join(
            path.read_text()
            for path in (ROOT / "tests").rglob("*.py")
            if path.name != "skips.py"
        )
        .replace("{program}", "PROGRAM")
        .replace("{package}", "PACKAGE")
    )
    for listed in LISTED:
        assert skips.re.search(listed.reason, sources), listed.reason
