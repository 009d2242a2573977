"""The outermost middleware: what a request's head may say, and the shape of Serve's own errors.

Serve calls `middlewares` in every process that takes HTTP requests (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH), and
puts the result in front of its own code. Serve decodes some headers before any code of the gateway runs.
"""

import re
import uuid
from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import runtime
from deployments.errors import ApiError, respond

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
# as deploy/haproxy has it
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
REQUEST_ID_HEADER = b"x-request-id"
# headers by which a client could change Serve's deadlines or placement, with "-" for "_"
SERVES_OWN = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"x-session-id",
    b"serve-multiplexed-model-id",
)
TRACE_HEADERS = (b"traceparent", b"tracestate")
# messages for the errors that Serve answers by itself, as plain text
MESSAGES = {
    404: "Not Found; see /docs for what there is",
    408: "the request took longer than the server allows; ask for a shorter answer, or as a stream",
    499: "the client left before the answer",
    503: "the gateway has too many requests; try again",
}
FAILED = "the server failed to handle this request; it has been logged"
OPERATIONS = "/-/"  # Serve's own routes, for its load balancer
Headers = list[tuple[bytes, bytes]]


def middlewares() -> list[Middleware]:
    """The middlewares for Serve; called once in each process that takes HTTP requests."""
    runtime.drop_trailers()
    return [Middleware(EdgeMiddleware)]


class EdgeMiddleware:
    """Gives the application a clean head of each request, and the client errors in OpenAI's shape.

    - `x-request-id` is the client's if it is harmless and comes once, otherwise a new one.
    - Headers that Serve obeys are dropped, and trace headers that are not ASCII.
    - Unknown methods are refused, because Serve would keep a metric for each.
    - An HTTP/1.0 client, which knows no chunks, gets a stream in one piece with its length.
    - Errors of Serve, which are plain text, get OpenAI's shape.

    Args:
        app: the application behind the middleware.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers, request_id = clean(scope["headers"])
        scope = {**scope, "headers": headers}
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        if scope["method"] not in METHODS:
            error = ApiError(
                405,
                f"send {', '.join(METHODS[:-1])} or {METHODS[-1]}; see /docs for what there is",
                code="method_not_allowed",
            )
            extra = {"allow": ", ".join(METHODS), "x-request-id": request_id}
            await respond(error, extra)(scope, receive, send)
            return
        if scope.get("http_version") in ("1.0", "0.9"):
            send = _InOnePiece(send)
        if not scope["path"].startswith(OPERATIONS):
            send = _Shaped(scope, receive, send)
        await self._app(scope, receive, send)


def clean(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Headers, str]:
    """The headers that the application may see, in a new list, and the request's id, which is one of them."""
    kept: Headers = []
    ids = []
    for name, value in headers:
        plain = name.lower().replace(b"_", b"-")
        if plain == REQUEST_ID_HEADER:
            ids.append(value.decode("latin-1"))
        elif plain in SERVES_OWN or not name.isascii():
            continue
        elif plain not in TRACE_HEADERS or value.isascii():
            kept.append((name, value))
    request_id = ids[0] if len(ids) == 1 else ""
    if not REQUEST_ID.fullmatch(request_id):
        request_id = str(uuid.uuid4())
    kept.append((REQUEST_ID_HEADER, request_id.encode()))
    return kept, request_id


class _Shaped:
    """A `send` that replaces an error in plain text by one in OpenAI's shape."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._scope = scope
        self._receive = receive
        self._send = send
        self._replaced = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            headers = {
                name.lower(): value for name, value in message.get("headers", ())
            }
            if headers.get(b"content-type", b"").startswith(b"text/plain"):
                self._replaced = True
                await self._replace(message["status"], headers)
        if not self._replaced:
            await self._send(message)

    async def _replace(self, status: int, headers: dict[bytes, bytes]) -> None:
        kept = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers.items()
            if not name.startswith(b"content-")
        }
        error = ApiError(status, MESSAGES.get(status, FAILED))
        await respond(error, kept)(self._scope, self._receive, self._send)


class _InOnePiece:
    """A `send` that passes a body on when it is complete, with its length, so that it needs no chunks."""

    def __init__(self, send: Send):
        self._send = send
        self._start: Message = {}
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names:
                self._start = {**message}
                return
        if message["type"] != "http.response.body" or not self._start:
            await self._send(message)
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = b"".join(self._parts)
        length = (b"content-length", str(len(body)).encode())
        headers = [*self._start.get("headers", ()), length]
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
