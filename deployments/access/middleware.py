"""Middleware in front of every route: authentication, authorization, rate limits, and the size of the body.

It is a plain ASGI middleware, because only ASGI can refuse a body before it is read.
"""

import asyncio
import logging
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.access.api_keys import SCOPES, ApiKeyStore, Key
from deployments.access.local_access import check_local
from deployments.access.rate_limits import RateLimiter
from deployments.errors import ApiError, respond
from policies.events import ANY_OWNER

PUBLIC_PATHS = ("/healthz", "/readyz")  # for load balancers
# the page that describes the API, with its files; it needs no key, or no browser could open it
DOCS_PATHS = (
    "/",
    "/docs",
    "/docs/start.js",
    "/docs/swagger-ui-bundle.js",
    "/docs/swagger-ui.css",
    "/docs/favicon.png",
    "/favicon.ico",
    "/openapi.json",
)
OPEN_PATHS = (*PUBLIC_PATHS, *DOCS_PATHS)  # without a key
SCOPE_OF = {
    "/v1/chat/completions": "infer",
    "/v1/completions": "infer",
    "/v1/embeddings": "infer",
    "/v1/feedback": "feedback",
}
# all paths below need the scope `operate`, but for the explanations of decisions
OPERATE_PREFIX = "/v1/router"
DECISIONS_PREFIX = "/v1/router/decisions/"
BODY_TIMEOUT_S = 10.0
# bodies that an ingress waits for at a time; well below Serve's max_ongoing_requests
MAX_PENDING_BODIES = 400
# an arrived body needs some turns of the event loop, without and then with a pause, to reach the middleware
TURNS = 20
TURN_S = 0.005
NO_KEY = "send an API key in the header `authorization: Bearer rk-…`"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """The owner of the API key of a request, and what the key allows.

    name: of the key's owner; "" if the gateway has no keys.
    count_score: counts a score of this key, or raises a 429.
    trusted: the key's scores are not compared with those of other keys.
    """

    name: str = ""
    scopes: tuple[str, ...] = SCOPES
    count_score: Callable[[], None] = lambda: None
    trusted: bool = False

    @property
    def scorer(self) -> str:
        """The owner whose decisions this key may score: its own; with the scope `operate` (a judge, a program) all.

        Without keys every request has all scopes.
        """
        return ANY_OWNER if "operate" in self.scopes else self.name


def identity_of(http: Request) -> Identity:
    """The identity that AccessMiddleware found for this request."""
    found: Identity = http.scope["identity"]
    return found


class AccessMiddleware:
    """Refuses requests before they reach a route, with 401, 403, 408, 413, 429 or 503.

    Args:
        app: the application behind the middleware.
        key_store: the valid keys; None if requests need no key.
        limits: the rate limits of the keys.
        max_body_bytes: largest body of a request.
        origins: of web pages that may use a gateway without keys.
    """

    def __init__(
        self,
        app: ASGIApp,
        key_store: ApiKeyStore | None,
        limits: RateLimiter,
        max_body_bytes: int,
        origins: Collection[str] = (),
    ):
        self._app = app
        self._key_store = key_store
        self._limits = limits
        self._max_body = max_body_bytes
        self._origins = origins
        self._pending_bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET, without the body
            scope = {**scope, "method": "GET"}
            send = _without_content(send)
        response_began = False

        async def send_and_note(message: Message) -> None:
            nonlocal response_began
            response_began = True
            await send(message)

        try:
            await self._admit(scope, receive, send_and_note)
        except ApiError as error:
            await respond(error)(scope, receive, send)
        except Exception as error:
            # the error's message may hold a prompt, so only the place of the error is logged
            frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
            log.error("%s on %s\n%s", type(error).__name__, scope["path"][:100], frames)
            if not response_began:
                message = "the server failed to handle this request; it has been logged"
                await respond(ApiError(500, message))(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._key_store is None or scope["path"] in OPEN_PATHS:
            if self._key_store is None and scope["path"] not in PUBLIC_PATHS:
                check_local(scope, self._origins)
            scope["identity"] = Identity()
            await self._app(scope, await self._read(scope, headers, receive), send)
            return
        key = self._authenticate(self._key_store, headers.get(b"authorization", b""))
        _authorize(key, scope["path"])
        limits = self._limits
        scope["identity"] = Identity(
            key.name, key.scopes, lambda: limits.score(key), limits.trusts(key)
        )

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                for name, value in limits.headers(key).items():
                    headers.append((name.encode(), value.encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            limits.enter(key)
        except ApiError as error:
            await respond(error)(scope, receive, send_with_limits)
            return
        try:
            await self._app(
                scope, await self._read(scope, headers, receive), send_with_limits
            )
        finally:
            limits.leave(key)

    @staticmethod
    def _authenticate(key_store: ApiKeyStore, header: bytes) -> Key:
        scheme, _, presented = header.decode("latin-1").partition(" ")
        key = key_store.find(presented.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            error = ApiError(
                401,
                NO_KEY if not header else f"this API key is not valid; {NO_KEY}",
                code="invalid_api_key",
            )
            error.headers["www-authenticate"] = "Bearer"
            raise error
        return key

    async def _read(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive
    ) -> Receive:
        """Read the whole body, and return a `receive` for the application that starts with this body.

        The body of a request that no route reads is not awaited.

        Raises:
            ApiError: 413, the body is too large; 408, it is too slow; 503, too many bodies are pending.
        """
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body:
            raise self._too_large()
        if scope["method"] != "POST" or scope["path"] in OPEN_PATHS:
            return _without_body(receive)
        read = self._body
        if self._pending_bodies >= MAX_PENDING_BODIES:
            read = self._arrived_body
        self._pending_bodies += 1
        try:
            messages = [await read(receive)]
        finally:
            self._pending_bodies -= 1

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    async def _arrived_body(self, receive: Receive) -> Message:
        """The body if it has arrived already; for a request that comes while too many bodies are pending."""
        reading = asyncio.ensure_future(self._body(receive))
        try:
            for turn in range(2 * TURNS):
                if reading.done():
                    return reading.result()
                await asyncio.sleep(0 if turn < TURNS else TURN_S)
        finally:
            reading.cancel()
        message = "too many requests are still being sent; send this one again, all of it at once"
        raise ApiError.later(503, message, 1.0, "too_many_unfinished")

    async def _body(self, receive: Receive) -> Message:
        """The whole body in one message, or the message that the client disconnected."""
        chunks = []
        size = 0
        more = True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return message  # the client disconnected
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    more = message.get("more_body", False)
                    if size > self._max_body:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {BODY_TIMEOUT_S:g} s; send it faster",
            ) from None
        return {"type": "http.request", "body": b"".join(chunks), "more_body": False}

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_body} bytes; send less",
            code="request_too_large",
        )


def _without_body(receive: Receive) -> Receive:
    """A `receive` that gives an empty body at once, and later only the message that the client disconnected."""
    empty: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def replay() -> Message:
        if empty:
            return empty.pop()
        while (message := await receive())["type"] == "http.request":
            pass
        return message

    return replay


def _without_content(send: Send) -> Send:
    """A `send` that drops the body of an answer; the headers stay."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


def _authorize(key: Key, path: str) -> None:
    """Refuse a key that has none of the scopes of this path."""
    if path.startswith(DECISIONS_PREFIX):
        allowed: tuple[str, ...] = ("feedback", "operate")
    elif path.startswith(OPERATE_PREFIX):
        allowed = ("operate",)
    elif path in SCOPE_OF:
        allowed = (SCOPE_OF[path],)
    else:
        allowed = SCOPES
    if not set(allowed) & set(key.scopes):
        wanted = " or ".join(f"'{scope}'" for scope in allowed)
        raise ApiError(
            403,
            f"this API key has no scope {wanted}; ask the operator for one",
            code="insufficient_scope",
        )
