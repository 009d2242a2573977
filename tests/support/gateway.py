"""The gateway with all its real parts in this process; only the models and Ray's handles are fakes."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deployments.gateway.ingress import Ingress
from deployments.models.capabilities import Known, lacking, of_application
from deployments.profiler.deployment import Profiler
from deployments.router.actor import Router
from deployments.settings import GatewaySettings
from tests.support.fakes import FakeModel, Remote

ROOT = Path(__file__).resolve().parents[2]


# the longest wait of a test that fails; no test depends on the speed of the machine
PATIENCE_S = 60.0


def eventually(check: Callable[[], Any]) -> None:
    """Wait until a condition holds that work in the background makes true."""
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s"
        time.sleep(0.02)


class Watch:
    """A count of replicas that also knows what the models can do, as router/replicas.py."""

    def __init__(self, replicas: dict[str, int]):
        self._replicas = replicas
        self.targets = dict.fromkeys(replicas, 1)
        self.capabilities: dict[str, Known] = {}

    def __call__(self, _: Any) -> dict[str, int]:
        return self._replicas


class Gateway:
    """An ingress with all its parts in this process."""

    def __init__(self, folder: Path, policy: str = "thompson", **options: Any):
        self.settings = GatewaySettings.model_validate(
            {
                "models": {
                    "small": {"context_tokens": 512, "output_price_usd_per_million": 1},
                    "large": {
                        "context_tokens": 512,
                        "output_price_usd_per_million": 10,
                    },
                    "minilm": {"tasks": ["embed"], "context_tokens": 10_000},
                },
                "policy": {"name": policy},
                "journal": f"sqlite:///{folder}/journal.db",
                "profiler": {"embedder": str(ROOT / "assets/embedder")},
                **options,
            }
        )
        self.models = {name: FakeModel(name) for name in self.settings.models}
        self.replicas = dict.fromkeys(self.models, 1)
        self.watch = Watch(self.replicas)
        self.router = Remote(Router(self.settings, self.watch))
        self.profiler = Remote(Profiler(self.settings, lambda _: self.router))
        self.ingress = Ingress.__new__(Ingress)
        self.client = TestClient(
            self._app(), base_url="http://localhost", raise_server_exceptions=False
        )

    def _app(self) -> Any:
        ingress = self.ingress

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            handles = (
                lambda name: self.models[name],
                lambda _: self.router,
                lambda _: None,
            )
            await ingress.__init__(self.settings, self.profiler, *handles)  # type: ignore[misc]
            ingress.reconfigure(
                {
                    "objective": {"latency_weight": 0.1},
                    "presets": {"fast": {"latency_weight": 5}},
                    "profile_timeout_s": PATIENCE_S,
                    "decide_timeout_s": PATIENCE_S,
                }
            )
            # a mount would not match every path
            app.router.default = ingress.__serve_build_asgi_app__()
            yield

        app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None)
        return app

    def deploy(self, name: str, args: dict[str, Any]) -> None:
        """Let the router and the ingress know the arguments of a model's application."""
        self.watch.capabilities[name] = of_application(args)
        expected = lacking(
            self.settings.models[name].capabilities, self.watch.capabilities[name]
        )
        eventually(lambda: self.ingress.router_client.lacks(name) == expected)

    def tune(self, **changed: Any) -> None:
        """Change the user_config while the gateway runs."""
        before = self.ingress.router_client.tuning.model_dump()
        self.ingress.reconfigure({**before, **changed})

    @asynccontextmanager
    async def at_once(self) -> AsyncIterator[httpx.AsyncClient]:
        """Run the gateway in this event loop; yields a client for concurrent requests, which reads whole answers."""
        app: Any = self.client.app
        async with app.router.lifespan_context(app):
            for timed in (
                *self.ingress.dispatcher.admission.queues.values(),
                *self.ingress.dispatcher.breakers.values(),
            ):
                # tests/support/clock.py may have replaced the clock since they were made
                timed._clock = time.monotonic
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                yield client

    def chat(self, **body: Any) -> Any:
        given = {
            "model": "auto",
            "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
            **body,
        }
        return self.client.post("/v1/chat/completions", json=given)
