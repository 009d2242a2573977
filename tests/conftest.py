"""Fixtures of all tests: a small portfolio, databases, a load balancer."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from policies.types import Arm
from tests.support import streams as recordings
from tests.support.balancer import Two, balanced, within
from tests.support.gateway import Gateway
from tests.support.postgres import Postgres, binaries
from tests.support.schedule import (
    pytest_xdist_make_scheduler as pytest_xdist_make_scheduler,
)
from tests.support.skips import pytest_make_collect_report as pytest_make_collect_report
from tests.support.skips import pytest_runtest_makereport as pytest_runtest_makereport

ROOT = Path(__file__).resolve().parents[1]
# otherwise Ray would require a token that it finds in the home folder
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_report_header() -> str:
    """Name the streams that the tests of the benchmarks play."""
    if where := recordings.recorded():
        return f"streams: generated ones, and recorded ones at {where}"
    return "streams: generated ones, no recorded ones (ROUTER_DATA)"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Collect garbage before schemathesis imports the modules of its reports.

    pytest parses these modules. CPython 3.11 raises a SystemError if a finalizer runs while it makes a syntax tree
    (python/cpython#106905), and the whole run would end with it.
    """
    gc.collect()


@pytest.fixture(
    scope="session", params=["made", *(["recorded"] if recordings.recorded() else [])]
)
def streams(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> recordings.Streams:
    """Small generated streams; and the recorded ones, if they are present."""
    if request.param == "recorded":
        return recordings.Streams(recordings.recorded(), True)
    folder = tmp_path_factory.mktemp("streams")
    recordings.generate(folder)
    return recordings.Streams(str(folder), False)


@pytest.fixture(scope="session", autouse=True)
def collected() -> Iterator[None]:
    """What tests leave behind is collected: a gateway that freezes the garbage collector's heap would stay for ever."""
    with mock.patch("deployments.runtime.tune_gc"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def arms() -> tuple[Arm, ...]:
    return (
        Arm("small", context_tokens=512, prompt_price_usd=1e-6, output_price_usd=1e-6),
        Arm("large", context_tokens=4096, prompt_price_usd=1e-5, output_price_usd=1e-5),
        Arm("embedder", tasks=("embed",), context_tokens=4096),
    )


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    made = Gateway(tmp_path)
    with made.client:
        yield made


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A temporary PostgreSQL server."""
    if (folder := binaries()) is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    server = Postgres(folder)
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a new, empty database for a journal, for each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/deep/journal.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_url()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the running system first, as they take longest; with xdist, others run at the same time."""
    items.sort(key=lambda item: item.get_closest_marker("live") is None)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to be copied, since creating them takes many seconds."""
    from deployments.tracking.model_registry import PolicyRegistry

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    PolicyRegistry(f"sqlite:///{path}", "test").aliases()
    return path


@pytest.fixture
def mlflow_uri(empty_mlflow: Path, tmp_path: Path) -> str:
    """URI of a real MLflow store on disk, with the experiment `test` and its artefacts beside it."""
    from deployments.tracking.model_registry import PolicyRegistry

    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    PolicyRegistry(uri, "test").client.create_experiment(
        "test", artifact_location=str(tmp_path / "artefacts")
    )
    return uri


@pytest.fixture(scope="session")
def balancer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """HAProxy with the shipped configuration, and two fake gateways."""
    with balanced(tmp_path_factory.mktemp("balancer")) as made:
        yield made


@pytest.fixture
def two(balancer: Two) -> Iterator[Two]:
    """The load balancer with both gateways ready and without recorded requests."""
    proxy, gateways = balancer
    within(60, lambda: set(proxy.names()) == {"a", "b"})
    for gateway in gateways:
        gateway.requests.clear()
    yield balancer
    for gateway in gateways:
        gateway.ready = True
