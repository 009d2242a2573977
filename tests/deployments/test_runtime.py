"""Process settings, and the private interfaces of Ray that deployments/runtime.py relies on."""

import asyncio
import gc
import inspect
import logging
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import MemoryHandler
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock, create_autospec

import grpc
import psutil
import pytest
from ray.serve import context
from ray.serve._private import replica
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import ReplicaState, RequestMetadata
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator
from ray.serve.schema import (
    ApplicationDetails,
    DeploymentDetails,
    LoggingConfig,
    ReplicaDetails,
    ServeInstanceDetails,
)

from deployments import runtime
from deployments.router.replicas import READY_STATES
from deployments.runtime import ServeApplication


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before_after_a_pause(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        if enabled:
            gc.enable()
        else:
            gc.disable()
        with pytest.raises(RuntimeError), runtime.gc_paused():
            assert not gc.isenabled()
            raise RuntimeError
        assert gc.isenabled() is enabled
    finally:
        if was_enabled:
            gc.enable()
        else:
            gc.disable()


def test_serve_replicas_bind_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve still binds a replica's gRPC server by the function that bind_to_loopback replaces."""
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(
        replica.Replica._on_initialized
    )
    monkeypatch.setattr(
        replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server
    )
    monkeypatch.setenv("ROUTER_LOOPBACK", "1")
    runtime.bind_to_loopback()
    server = grpc.server(ThreadPoolExecutor(1))
    port = replica.add_port_to_grpc_server(server, "[::]:0")
    server.start()
    addresses = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process().net_connections("tcp")
        if connection.laddr.port == port
    }
    server.stop(None)
    assert addresses == {"127.0.0.1"}


def test_serve_controller_reports_applications_and_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve's client still has get_serve_details, and its schema the fields that serve_applications reads."""
    replicas = [{"state": "RUNNING"}, {"state": "STARTING"}]
    applications = {
        "small": {
            "deployments": {
                "Model:small": {"replicas": replicas, "target_num_replicas": 2}
            },
            "deployed_app_config": {"args": {"model_id": "small"}},
        },
        "rests": {
            "deployments": {"Model:rests": {"replicas": [], "target_num_replicas": 0}},
            "deployed_app_config": {"args": {"model_id": "rests"}},
        },
        "new": {"deployments": {}, "deployed_app_config": None},
    }
    client = create_autospec(ServeControllerClient, instance=True)
    client.get_serve_details.return_value = {"applications": applications}
    get_client = create_autospec(context._get_global_client, return_value=client)
    monkeypatch.setattr(context, "_get_global_client", get_client)
    assert runtime.serve_applications() == {
        "small": ServeApplication(("RUNNING", "STARTING"), 2, {"model_id": "small"}),
        "rests": ServeApplication((), 0, {"model_id": "rests"}),
        "new": ServeApplication((), 1, {}),
    }
    get_client.return_value = None
    assert runtime.serve_applications() == {}

    assert "applications" in ServeInstanceDetails.model_fields
    assert {"deployments", "deployed_app_config"} <= set(
        ApplicationDetails.model_fields
    )
    known = DeploymentDetails.model_fields
    assert {"replicas", "target_num_replicas"} <= set(known)
    assert "state" in ReplicaDetails.model_fields
    assert set(READY_STATES) <= {state.value for state in ReplicaState}


async def test_serve_handle_tells_when_a_replica_has_accepted_a_call() -> None:
    """If the future had another name, all calls of a draining replica would be failed over."""

    for kind in (DeploymentResponse, DeploymentResponseGenerator):
        assigned = asyncio.get_running_loop().create_future()
        call = kind(assigned, RequestMetadata("r", "i"), False)
        assert not runtime.accepted_by_replica(call)
        assigned.set_result(None)
        assert runtime.accepted_by_replica(call)
    assert not runtime.accepted_by_replica(None)


async def test_an_engine_starts_without_rays_report_of_usage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless Ray's statistics of usage are on: Ray's server sends the report after the start of the engine."""
    pytest.importorskip("vllm")
    from ray.llm._internal.serve.core.server import llm_server

    from deployments.models.server import ModelServer

    done: list[str] = []
    engine = SimpleNamespace(start=AsyncMock(side_effect=lambda: done.append("start")))
    monkeypatch.setattr(
        llm_server,
        "push_telemetry_report_for_all_models",
        lambda **_: done.append("report"),
    )
    for enabled, expected in (("0", ["start"]), ("1", ["start", "report"])):
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", enabled)
        done.clear()
        server = ModelServer.__new__(ModelServer)
        server.engine = engine
        server._llm_config = None
        await server._start_engine()
        assert done == expected


def test_rays_engine_holds_vllms_engine() -> None:
    """If Ray renames the attribute, ModelServer cannot watch the engine."""
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from vllm.v1.engine.async_llm import AsyncLLM

    assert "self._engine_client = " in inspect.getsource(VLLMEngine.start)
    client = object()
    assert runtime.engine_client(SimpleNamespace(_engine_client=client)) is client
    assert isinstance(AsyncLLM.errored, property)


def test_serve_buffers_log_lines_and_skips_its_context_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve writes a replica's log through a buffer, whose filter leaves a line with SKIP_SERVE_CONTEXT as it is."""
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    assert runtime.serve_log_buffers() == []
    configure_component_logger(
        component_name="gateway_Ingress",
        component_id="x",
        logging_config=LoggingConfig(encoding="JSON", logs_dir=str(tmp_path)),
        max_bytes=10**6,
        backup_count=1,
        buffer_size=1000,
    )
    (buffer,) = runtime.serve_log_buffers()
    assert isinstance(buffer, MemoryHandler)
    current = _serve_request_context.set(_RequestContext(request_id="req-1"))
    try:
        logger.info("with context")
        logger.info("without context", extra=runtime.SKIP_SERVE_CONTEXT)
    finally:
        _serve_request_context.reset(current)
    (log_file,) = tmp_path.iterdir()
    assert log_file.read_text() == ""
    buffer.flush()
    first, second = log_file.read_text().splitlines()
    buffer.close()
    assert "req-1" in first and "req-1" not in second
