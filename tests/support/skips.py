"""Skipped tests in continuous integration: with CI=true a skip is a failure, unless it is listed here.

A skip is listed with the words of its reason and with the condition that makes the test impossible on this machine. A
conftest.py imports the two hooks.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST_COMMIT = "3b84db5b01735a8ef8e91be5865aa31dc286b2fd"  # of this project


@dataclass(frozen=True)
class Listed:
    """A skip that is no failure.

    reason: regular expression that finds its reason.
    impossible: whether the test is impossible on this machine. Its arguments are the groups of the expression.
    """

    reason: str
    impossible: Callable[..., bool]


@cache
def not_installable(package: str) -> bool:
    """Whether a package of Debian cannot be installed: no apt-get, not root, or no index that has it."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return True
    found = subprocess.run(
        ["apt-cache", "policy", package], capture_output=True, text=True, check=False
    )
    candidate = re.search(r"Candidate: (\S+)", found.stdout)
    return candidate is None or candidate[1] == "(none)"


@cache
def not_on_the_index(requirement: str) -> bool:
    """Whether pip cannot get a package from its index."""
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder]
        return subprocess.run([*pip, requirement], check=False).returncode != 0


@cache
def history_is_cut_off() -> bool:
    """Whether the first commit of this project is missing, as in a shallow clone, or where there is no clone."""
    found = subprocess.run(
        ["git", "cat-file", "-e", f"{FIRST_COMMIT}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    return found.returncode != 0


LISTED = (
    Listed(r"no PostgreSQL here", lambda: not_installable("postgresql")),
    Listed(r"(\S+) is not here, and cannot be installed without", not_installable),
    Listed(r"Debian's package (\S+) cannot be installed here", not_installable),
    Listed(
        r"neither docker compose nor docker-compose is here",
        # Debian's docker-compose is of version 1, which does not know this format
        lambda: not_installable("docker-compose-plugin"),
    ),
    Listed(r"pip cannot get (\S+):", not_on_the_index),
    Listed(r"the clone has no commit", history_is_cut_off),
)


def is_failure(reason: str) -> bool:
    """Whether a skip for this reason is a failure on this machine."""
    for listed in LISTED:
        if found := re.search(listed.reason, reason):
            return not listed.impossible(*found.groups())
    return True


def check(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a report of a skip into one of a failure, where continuous integration demands it."""
    if os.environ.get("CI") != "true" or not report.skipped:
        return
    if hasattr(report, "wasxfail"):  # it ran, and failed as expected
        return
    skip = report.longrepr
    reason = str(skip[2] if isinstance(skip, tuple) else skip)
    if is_failure(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped, which is a failure in CI unless tests/support/skips.py lists it: {reason}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[
    None, pytest.TestReport, pytest.TestReport
]:
    """Check the report of each phase of a test."""
    report = yield
    check(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[
    None, pytest.CollectReport, pytest.CollectReport
]:
    """Check the report of each collected file, since a file can be skipped as a whole."""
    report = yield
    check(report)
    return report
