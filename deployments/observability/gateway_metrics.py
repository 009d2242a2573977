"""Ray metrics of one ingress: HTTP requests by route, waiting requests, and circuit breakers."""

import time
from collections import Counter as Tally
from collections.abc import Mapping
from typing import Protocol

from ray.util.metrics import Counter, Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# the values of the label `route`: exact paths, then the beginnings of others
ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/feedback",
    "/v1/models",
    "/v1/router/state",
    "/v1/router/rollout",
    "/healthz",
    "/readyz",
    "/docs",
)
PREFIXES = (
    "/v1/models",
    "/v1/router/decisions",
    "/v1/router/versions",
    "/v1/router/rollout",
    "/v1/router/calibrations",
)
OTHER = "other"
FLUSH_EVERY_S = 1.0
NO_ANSWER = 499  # the client left before an answer began


def route_of(path: str) -> str:
    """The label of a path. Clients choose paths, so it is one of a fixed list."""
    if path in ROUTES:
        return path
    for prefix in PREFIXES:
        if path == prefix or path.startswith(f"{prefix}/"):
            return prefix
    return OTHER


class Queue(Protocol):
    """A queue in front of an arm (dispatch/admission.py)."""

    def waiting_of(self, rank: int) -> int:
        """Number of waiting requests of this rank."""


class Breaker(Protocol):
    """The circuit breaker of an arm (dispatch/circuit_breaker.py)."""

    @property
    def closed(self) -> bool:
        """Whether the arm counts as healthy."""


class GatewayTelemetry:
    """The metrics of one ingress.

    Args:
        queues, breakers: by arm.
        ranks: by name of the priority.
    """

    def __init__(
        self,
        queues: Mapping[str, Queue],
        breakers: Mapping[str, Breaker],
        ranks: Mapping[str, int],
    ):
        self._queues = queues
        self._breakers = breakers
        self._ranks = ranks
        self._counts = Tally[tuple[str, int]]()
        self._flushed_s = 0.0
        self._requests = Counter(
            "router_http_requests", "HTTP requests.", ("route", "code")
        )
        self._waiting = Gauge(
            "router_waiting_requests",
            "Requests that wait for a slot of an arm at one ingress.",
            ("arm", "priority"),
        )
        self._open = Gauge(
            "router_breaker_open",
            "1 while the circuit breaker of an arm keeps requests away from it, at one ingress.",
            ("arm",),
        )

    def count(self, path: str, code: int) -> None:
        """Count a request. A call of Ray's counter costs as much as a decision, so many are exported together."""
        self._counts[route_of(path), code] += 1
        if time.monotonic() - self._flushed_s >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Export what was counted, and the queues and breakers as they are now."""
        self._flushed_s = time.monotonic()
        counts = self._counts
        self._counts = Tally()
        for (route, code), count in counts.items():
            self._requests.inc(count, {"route": route, "code": str(code)})
        for arm, queue in self._queues.items():
            for priority, rank in self._ranks.items():
                tags = {"arm": arm, "priority": priority}
                self._waiting.set(queue.waiting_of(rank), tags)
        for arm, breaker in self._breakers.items():
            self._open.set(float(not breaker.closed), {"arm": arm})


class RequestCounter:
    """Counts each HTTP request by route and status; the outermost middleware.

    Args:
        app: the application behind the middleware.
        telemetry: counts.
    """

    def __init__(self, app: ASGIApp, telemetry: GatewayTelemetry):
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = NO_ANSWER

        async def send_and_note(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._telemetry.count(scope["path"], code)
