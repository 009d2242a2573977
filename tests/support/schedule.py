"""Tests in several processes: the tests of a file stay together, and so do all tests of the running system."""

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SYSTEM = "tests/system"


class ByFile(LoadScopeScheduling):
    """Gives whole files to the processes, since the tests of a file share fixtures that take long to make.

    The tests of SYSTEM share one running system, so one process gets them all. They begin first, since they take
    longer than any file.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = str(nodeid.partition("::")[0])
        return SYSTEM if path.startswith(f"{SYSTEM}/") else path


# xdist may be missing where a wheel is tested alone
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Use this schedule in place of xdist's own."""
    config.option.loadscopereorder = False
    return ByFile(config, log)
