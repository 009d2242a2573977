"""The whole wiring on one page: the only file that says serve.deployment or .bind.

serve_config.yaml names these three builders: `gateway` once, `model` or `embedder` once per model. The router and the
tracker are named, detached actors: they outlive a redeploy of the gateway, and come back by themselves when they die.
"""

import time
from collections.abc import Collection
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client

from deployments.dataplane import loopback_only
from deployments.embedder import EmbeddingServer
from deployments.ingress import Ingress
from deployments.keys import FILE, how
from deployments.lineage import digest_of
from deployments.profiler import Profiler
from deployments.router import Router
from deployments.settings import GatewaySettings, explain
from deployments.tracking import Tracker

NAMESPACE = "router"
SERVING = ("RUNNING", "RECOVERING")  # states of a replica
ONE_THREAD = {"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}}


def gateway(args: dict[str, Any]) -> Application:
    """The application with the URL: ingress and profiler.

    Raises:
        ValueError: the arguments are wrong, or everybody could reach it without a key.
    """
    try:
        settings = GatewaySettings.model_validate(args)
    except ValidationError as error:
        raise ValueError(f"serve_config.yaml, args of the gateway: {explain(error)}") from None
    if settings.keys is None and not loopback_only():  # `serve deploy` and KubeRay come here without lint.py
        raise ValueError(
            "serve_config.yaml, args of the gateway: keys is missing, and other machines may reach the gateway: write "
            f"`keys: {{file: {FILE}}}` there and make a key with `{how(FILE)}`; without keys it is started on loopback "
            "only, by `python -m deployments.launch up` with http_options.host 127.0.0.1"
        )
    profiler = serve.deployment(
        Profiler, name="Profiler", ray_actor_options={"num_cpus": 0, "runtime_env": ONE_THREAD}, max_surge_percent=100
    ).bind(settings, connect_router)
    return serve.deployment(  # type: ignore[no-any-return]
        serve.ingress()(Ingress), name="Ingress", ray_actor_options={"num_cpus": 0, "runtime_env": ONE_THREAD}
    ).bind(settings, profiler, connect_model, connect_router, connect_tracker)


def model(args: dict[str, Any]) -> Application:
    """One model size: `args` is an LLMConfig of ray.serve.llm."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from deployments.models import ModelServer

    return build_llm_deployment(LLMConfig.model_validate(args), name_prefix="Model:", deployment_cls=ModelServer)


def embedder(args: dict[str, Any]) -> Application:
    """A model that only embeds, on any CPU: `args` has model_id and source."""
    name = f"Model:{args['model_id']}"
    return serve.deployment(  # type: ignore[no-any-return]
        EmbeddingServer, name=name, ray_actor_options={"num_cpus": 0, "runtime_env": ONE_THREAD}
    ).bind(**args)


def connect_model(name: str) -> Any:
    """The handle of a model's application; blocking."""
    return serve.get_app_handle(name)


def connect_router(settings: GatewaySettings) -> Any:
    """The router actor; made if there is none."""
    return _actor(Router, "router").remote(settings, ReplicaCounter())


def connect_tracker(settings: GatewaySettings) -> Any:
    """The tracker actor, at work; made if there is none."""
    tracker = _actor(Tracker, "tracker").remote(settings, connect_router(settings), time.time())
    tracker.start.remote()
    return tracker


def _actor(cls: type, name: str) -> Any:
    return ray.remote(cls).options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_concurrency=1000,
        num_cpus=0,
        runtime_env=ONE_THREAD,
    )


class ReplicaCounter:
    """Asks Serve's controller for the number of ready replicas of models.

    Attributes:
        digests: of what serves each model, as of the last call (lineage.py).
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.counts: dict[str, int] = {}  # as of the last call

    def __call__(self, models: Collection[str]) -> dict[str, int]:
        """Blocking; 0 for a model that is not there.

        Not `serve.status()`: that pickles the classes of every deployment anew, most of the router's idle time.
        A controller that has just come back knows no application yet, and then its replicas as RECOVERING, while they
        serve as before.
        """
        client = _get_global_client(raise_if_no_controller_running=False)
        applications = client.get_serve_details()["applications"] if client else {}
        if not applications:
            return self.counts
        counts = {}
        for name in models:
            deployments = applications[name]["deployments"].values() if name in applications else ()
            counts[name] = sum(r["state"] in SERVING for d in deployments for r in d["replicas"])
            args = ((applications.get(name) or {}).get("deployed_app_config") or {}).get("args")
            if args:
                self.digests[name] = digest_of(args)
        self.counts = counts
        return counts
