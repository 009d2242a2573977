"""Settings of a process (garbage collection, network binding) and the private interfaces of Ray that are in use.

Every private name of Ray or Serve that deployments/ needs is used in this module, and tests/deployments/test_runtime.py
pins each one. After an upgrade of Ray, run that file first; each docstring says what to do when its test fails.
"""

import gc
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from typing import Any

# objects allocated, less those freed, before the youngest generation is searched; Python's default is 700
ALLOCATIONS = 20_000
# searches of one generation before the next older one is searched as well; Python's default is 10
ROUNDS = 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# `extra` of a log record that must not get the fields of Serve's request context; see `serve_log_buffers`
SKIP_SERVE_CONTEXT = {"skip_context_filter": True}


def tune_gc() -> None:
    """Make the garbage collector run less often in this process.

    The process keeps the records of thousands of decisions. None of them is part of a cycle, so reference counts free
    them. With Python's defaults the collector searches all of them again and again, for a third of the router's time.
    Objects that exist now (modules, classes) are not searched again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, ROUNDS, ROUNDS)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Switch the garbage collector off, for example while a journal of a hundred thousand rows is read."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def loopback_only() -> bool:
    """Whether only this machine can reach the gateway, as far as the cluster's environment tells."""
    host = os.environ.get("ROUTER_GATEWAY", "").rpartition(":")[0]
    return host in LOOPBACK


# --- private interfaces of Ray ----------------------------------------------------------------------------------


def bind_to_loopback() -> None:
    """Let a replica take calls from this machine only; for the constructor of every deployment.

    In throughput mode a replica takes pickled calls at a port that Serve opens on every address, and Serve has no
    setting for the address. On a cluster of one machine (`ROUTER_LOOPBACK` is set) no other machine needs the port.

    When Ray changes: find where Serve's replica binds its gRPC server (`Replica._on_initialized`), and replace the
    function that it calls there. If Serve has a setting for the address, use that and remove this function.
    """
    if os.environ.get("ROUTER_LOOPBACK"):
        from ray._common.tls_utils import add_port_to_grpc_server as add
        from ray.serve._private import replica

        replica.add_port_to_grpc_server = lambda server, address: add(
            server, address.replace("[::]", "127.0.0.1")
        )


@dataclass(frozen=True)
class ServeApplication:
    """An application of Serve.

    replica_states: of all replicas of all its deployments.
    target_replicas: number of replicas that all its deployments should have now; 0 if it is scaled to zero, and 1
        before its deployments are known.
    args: of its builder, in serve_config.yaml; empty if the application is not ready yet.
    """

    replica_states: tuple[str, ...]
    target_replicas: int
    args: Mapping[str, object]


def serve_applications() -> dict[str, ServeApplication]:
    """Serve's applications by name, as its controller knows them; empty if there is no controller. Blocking.

    Not `serve.status()`: that pickles the classes of all deployments again at each call, which was most of the work of
    an idle router, and it has no `deployed_app_config`.

    When Ray changes: find what the dashboard's GET /api/serve/applications/ asks the controller for
    (`get_serve_instance_details`), and return its `applications`. `serve.status()` is the public but slow alternative.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    found = client.get_serve_details()["applications"]
    return {name: _application(details) for name, details in found.items()}


def _application(details: Mapping[str, Any]) -> ServeApplication:
    states = tuple(
        replica["state"]
        for deployment in details["deployments"].values()
        for replica in deployment["replicas"]
    )
    targets = [
        deployment["target_num_replicas"]
        for deployment in details["deployments"].values()
    ]
    config = details.get("deployed_app_config") or {}
    return ServeApplication(states, sum(targets or [1]), config.get("args") or {})


def drop_trailers() -> None:
    """Keep the trailers of a request out of its headers, in this process.

    Uvicorn's protocol appends the trailers of a chunked body to the list that the application reads as headers. If they
    arrive together with the head, they are there before the application runs. `on_headers_complete` is replaced by a
    function that gives the protocol another list afterwards.

    When uvicorn changes: the test sends a trailer to a server of its own. If it passes without this
    function, remove it.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    complete = HttpToolsProtocol.on_headers_complete
    if complete.__name__ == "complete_and_drop_trailers":
        return

    def complete_and_drop_trailers(protocol: HttpToolsProtocol) -> None:
        complete(protocol)
        protocol.headers = []

    HttpToolsProtocol.on_headers_complete = complete_and_drop_trailers  # type: ignore[method-assign,assignment]


def serve_request_id() -> str:
    """The id of the request that this replica is handling; empty outside of a request.

    When Ray changes: look in `ray.serve.context` for the context of the current request. With an empty text the
    engine's log lines have ids of their own, and nothing joins them with the gateway's.
    """
    from ray.serve.context import _get_serve_request_context

    return str(_get_serve_request_context().request_id)


def accepted_by_replica(call: object) -> bool:
    """Whether a replica has accepted this call of a deployment handle. False for None.

    Before that the call waits at Serve's router in this process for a replica to become free, or to be started.

    When Ray changes: look in `ray.serve.handle._DeploymentResponseBase` for the future that is done when a call is
    assigned to a replica. Without any such future return True: then requests are no longer failed over when their
    model has lost its last replica, and wait until their deadline.
    """
    assigned = getattr(call, "_replica_result_future", None)
    return assigned is not None and bool(assigned.done())


def engine_client(engine: Any) -> Any:
    """VLLM's AsyncLLM behind an LLMServer's engine (`LLMServer.engine`).

    When Ray changes: look in `ray.llm._internal.serve.engines.vllm.vllm_engine.VLLMEngine.start` for the attribute that
    holds the AsyncLLM. Without one, ModelServer can neither watch the engine's steps nor see whether it is alive.
    """
    return engine._engine_client


def reports_usage() -> bool:
    """Whether Ray may report statistics of usage, by RAY_USAGE_STATS_ENABLED and Ray's own rule.

    When the test fails: look in ray._common.usage.usage_lib for what decides whether a report is sent.
    """
    from ray._common.usage.usage_lib import usage_stats_enabled

    return bool(usage_stats_enabled())


def serve_log_buffers() -> list[logging.Handler]:
    """The handlers by which Serve writes a replica's log file; empty in a process that is no replica.

    In throughput mode such a handler holds back up to a thousand lines. Its filter adds the context of the request
    that is current when a line is logged; `SKIP_SERVE_CONTEXT` switches that off for one line.

    When Ray changes: look in `ray.serve._private.logging_utils.configure_component_logger` for the handlers that it
    adds to the logger "ray.serve". With an empty list the lines go to stderr instead of the replica's file.
    """
    return [
        handler
        for handler in logging.getLogger("ray.serve").handlers
        if isinstance(handler, MemoryHandler)
    ]
