"""What a model's engine needs to compile code on this machine when it starts: a C++ compiler, and Python's headers."""

import os
import shutil
import sysconfig
from pathlib import Path

from deployments.operations.config_check import Config

MODEL = ":model"  # end of the import path of an application with an engine


def missing(config: Config) -> list[str]:
    """What is missing, one sentence each; empty if the config has no engine.

    torch compiles with `CXX`, else with g++, and looks for Python.h where this Python has its headers, and in the
    folders of CPATH and CPLUS_INCLUDE_PATH (torch/_inductor/cpp_builder.py). Without them each engine would end a
    minute after its start, and Serve would start it again.
    """
    applications = config.get("applications") or []
    if not any(str(a.get("import_path")).endswith(MODEL) for a in applications):
        return []
    problems = []
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        problems.append(
            f"the engines need a C++ compiler, and there is no '{compiler}': install it (Debian: apt-get install g++)"
        )
    if not any((folder / "Python.h").exists() for folder in _header_folders()):
        problems.append(
            "the engines need the headers of Python, and there is no "
            f"{_own_headers() / 'Python.h'}: install them (Debian: apt-get install python3-dev)"
        )
    return problems


def _own_headers() -> Path:
    return Path(sysconfig.get_path("include"))


def _header_folders() -> list[Path]:
    named = (os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH"))
    return [
        _own_headers(),
        *(Path(part) for value in named for part in value.split(os.pathsep) if part),
    ]
