"""`router up` starts no engine on a machine that lacks a compiler, headers or a library, and says what to install."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from deployments.operations import launcher, prerequisites
from deployments.operations.config_check import Config

ENGINE = {"name": "nano", "import_path": "deployments.app:model"}
EMBEDDER = {"name": "minilm", "import_path": "deployments.app:embedder"}


def config(*applications: Config) -> Config:
    return {"http_options": {}, "applications": list(applications)}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without all three; the folder of Python's headers is empty."""
    for name in ("CXX", "CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(prerequisites, "NUMA", "libnuma-that-is-missing.so.1")
    monkeypatch.setattr(prerequisites, "_own_headers", lambda: tmp_path / "include")
    return tmp_path


def install(path: Path) -> None:
    """Make an executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o755)


def test_this_machine_has_what_the_default_needs() -> None:
    """Its tests start engines."""
    assert prerequisites.missing(config(ENGINE)) == []


def test_another_system_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines run on Linux; a configuration without engines needs nothing."""
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    (problem,) = prerequisites.missing(config(EMBEDDER, ENGINE))
    assert "Linux" in problem and "Darwin" in problem
    assert prerequisites.missing(config(EMBEDDER)) == []


def test_all_are_named_with_the_packages_that_have_them(bare: Path) -> None:
    """Debian's packages; the path of the header says of which Python."""
    no_compiler, no_headers, no_library = prerequisites.missing(
        config(EMBEDDER, ENGINE)
    )
    assert "'g++'" in no_compiler and "apt-get install g++" in no_compiler
    assert str(bare / "include/Python.h") in no_headers
    assert "apt-get install python3-dev" in no_headers
    assert "apt-get install libnuma1" in no_library


def test_the_build_for_gpus_needs_no_libnuma(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package has another name."""

    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(prerequisites, "version", version)
    assert not any(
        "numa" in problem for problem in prerequisites.missing(config(ENGINE))
    )


@pytest.mark.parametrize("applications", [(), (EMBEDDER,)])
def test_without_an_engine_nothing_is_needed(
    bare: Path, applications: tuple[Config, ...]
) -> None:
    """A machine that only routes."""
    assert prerequisites.missing(config(*applications)) == []


def test_another_compiler_and_other_folders_count(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch reads them."""
    install(bare / "clang")
    install(bare / "elsewhere/Python.h")
    monkeypatch.setattr(prerequisites, "NUMA", "libc.so.6")
    monkeypatch.setenv("CXX", str(bare / "clang"))
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", f"/nowhere:{bare / 'elsewhere'}")
    assert prerequisites.missing(config(ENGINE)) == []
    monkeypatch.setenv("CXX", str(bare / "no-clang"))
    (problem,) = prerequisites.missing(config(ENGINE))
    assert "no-clang" in problem


def test_a_start_is_refused_before_anything_runs(bare: Path) -> None:
    """No folder is made, and no process started."""
    cluster = launcher.Cluster(config(ENGINE), bare / "state", 190)
    with pytest.raises(SystemExit, match="headers of Python"):
        launcher.start(cluster)
    assert not (bare / "state").exists()
    assert cluster.processes() == []


def application(**replicas: str) -> Config:
    """As in Serve's REST API, with the states of the replicas."""
    listed = [{"replica_id": name, "state": state} for name, state in replicas.items()]
    return {"deployments": {"Model:nano": {"replicas": listed}}}


def test_a_replica_that_ends_while_it_starts_is_noticed_once() -> None:
    """Also if it is gone at the next look; one that ran and is stopped is no failure."""
    starting = launcher.StartingReplicas()
    assert starting.failed(application(one="STARTING", two="RUNNING")) == set()
    assert starting.failed(application(one="STOPPING", two="STOPPING")) == {"one"}
    assert starting.failed(application(one="STOPPING", three="STARTING")) == set()
    assert starting.failed(application(four="STARTING")) == {"three"}
    assert starting.failed(application(four="RUNNING")) == set()
    assert starting.failed({"deployments": None}) == set()


def test_the_error_of_a_replica_is_shown() -> None:
    """Its last line, as Serve has it; a message without an error is none."""
    failed = application(one="STOPPING")
    error = "A replica failed to start with exception. Retrying. Error:\nTraceback:\n  File\nKeyError: 'a'\n"
    for message, shown in (
        (error, ": KeyError: 'a'"),
        ("The deployment is starting.", ""),
        (None, ""),
        ("Error:\n", ""),
    ):
        failed["deployments"]["Model:nano"]["message"] = message
        assert launcher.failure_of(failed) == shown
    assert launcher.failure_of({"deployments": None}) == ""
