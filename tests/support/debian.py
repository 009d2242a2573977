"""Programs from Debian's packages, installed where a test needs them."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def alone() -> Iterator[None]:
    """One process of the test run at a time installs, because apt-get refuses a second one."""
    with open(Path(tempfile.gettempdir()) / "router-tests-apt.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def apt_get(*command: str) -> subprocess.CompletedProcess[str]:
    """Run apt-get without questions."""
    return subprocess.run(
        ["apt-get", *command],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def can_install() -> bool:
    """Whether this process may install packages: it is root, and there is apt-get."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def debian(program: str, package: str) -> str:
    """Path of a program. Installs its Debian package if needed, and skips the test if that fails."""
    with alone():
        if shutil.which(program) is None:
            if not can_install():
                pytest.skip(
                    f"{program} is not here, and cannot be installed without apt-get and root"
                )
            apt_get("update", "-q")
            done = apt_get("install", "-q", "-y", "--no-install-recommends", package)
            if done.returncode != 0:
                pytest.skip(
                    f"Debian's package {package} cannot be installed here: {done.stderr[-300:]}"
                )
    return str(shutil.which(program))
