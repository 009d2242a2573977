"""Wires the applications: the only module that calls serve.deployment and .bind.

serve_config.yaml names these three builders: `gateway` once, and `model` or `embedder` once per model. The router and
the tracker are named, detached actors. They outlive a redeploy of the gateway, and Ray restarts them when they die.
"""

import time
from collections.abc import Mapping
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from deployments.access.api_keys import FILE, creation_hint
from deployments.gateway.ingress import Ingress
from deployments.gateway.version_routes import TrackerHandle
from deployments.models.embedding_server import EmbeddingServer
from deployments.models.handle import ModelHandle
from deployments.paths import bundled
from deployments.profiler.deployment import Profiler
from deployments.router.actor import Router
from deployments.router.interface import RouterHandle
from deployments.router.replicas import ReplicaCounter
from deployments.runtime import loopback_only
from deployments.settings import GatewaySettings, explain
from deployments.tracking.tracker import Tracker

NAMESPACE = "router"
ONE_THREAD = {"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}}


def gateway(args: Mapping[str, object]) -> Application:
    """Build the application that has the URL: ingress and profiler.

    Raises:
        ValueError: the arguments are not valid, or other machines could reach the gateway without a key.
    """
    try:
        settings = GatewaySettings.model_validate(args)
    except ValidationError as error:
        raise ValueError(
            f"serve_config.yaml, args of the gateway: {explain(error)}"
        ) from None
    # `serve deploy` and KubeRay do not run config_check.py
    if settings.keys is None and not loopback_only():
        raise ValueError(
            "serve_config.yaml, args of the gateway: keys is missing, and other machines may reach the gateway: write "
            f"`keys: {{file: {FILE}}}` there and make a key with `{creation_hint(FILE)}`; without keys it "
            "is started on loopback only, by `router up` with "
            "http_options.host 127.0.0.1"
        )
    profiler = serve.deployment(
        Profiler,
        name="Profiler",
        ray_actor_options={"num_cpus": 0, "runtime_env": ONE_THREAD},
        max_surge_percent=100,
    ).bind(settings, connect_router)
    return serve.deployment(  # type: ignore[no-any-return]
        serve.ingress()(Ingress),
        name="Ingress",
        ray_actor_options={"num_cpus": 0, "runtime_env": ONE_THREAD},
    ).bind(settings, profiler, connect_model, connect_router, connect_tracker)


def model(args: Mapping[str, object]) -> Application:
    """Build the application of one language model; `args` is an LLMConfig of ray.serve.llm."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    from deployments.models.server import ModelServer

    return build_llm_deployment(
        LLMConfig.model_validate(with_source(args)),
        name_prefix="Model:",
        deployment_cls=ModelServer,
    )


def with_source(args: Mapping[str, object]) -> Mapping[str, object]:
    """The arguments of a model with the place of its weights, if they are bundled with this installation."""
    loading = args.get("model_loading_config")
    if not isinstance(loading, Mapping):
        return args
    source = loading.get("model_source")
    if not isinstance(source, str):
        return args
    return {
        **args,
        "model_loading_config": {**loading, "model_source": bundled(source)},
    }


def embedder(args: Mapping[str, object]) -> Application:
    """Build the application of an embedding model, which runs on any CPU; `args` has model_id and source."""
    name = f"Model:{args['model_id']}"
    return serve.deployment(  # type: ignore[no-any-return]
        EmbeddingServer,
        name=name,
        ray_actor_options={"num_cpus": 0, "runtime_env": ONE_THREAD},
    ).bind(**args)


def connect_model(name: str) -> ModelHandle:
    """Handle of a model's application. Blocking."""
    handle: ModelHandle = serve.get_app_handle(name)
    return handle


def connect_router(settings: GatewaySettings) -> RouterHandle:
    """Handle of the router actor; the actor is created if there is none."""
    router: RouterHandle = _actor(Router, "router").remote(settings, ReplicaCounter())
    return router


def connect_tracker(settings: GatewaySettings) -> TrackerHandle:
    """Handle of the tracker actor, which is started; the actor is created if there is none."""
    tracker: TrackerHandle = _actor(Tracker, "tracker").remote(
        settings, connect_router(settings), time.time()
    )
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
