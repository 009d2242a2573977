"""In front of every route: who is it, may they, how much have they asked already, and is the body small enough.

A plain ASGI middleware, because only there can a body be refused before it is read.
"""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from deployments.errors import ApiError, respond
from deployments.keys import SCOPES, Key, Keyring
from deployments.limits import Limits
from policies.ledger import ANYBODY

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN = ("/healthz", "/readyz")  # for load balancers
SCOPE_OF = {
    "/v1/chat/completions": "infer",
    "/v1/completions": "infer",
    "/v1/embeddings": "infer",
    "/v1/feedback": "feedback",
}
OPERATE = "/v1/router"  # and what is below it, but for the explanation of one's own decisions
OWN = "/v1/router/decisions/"
BODY_S = 10.0  # in which a body must have come
MAX_AWAITED = 400  # bodies that an ingress awaits at a time, well below Serve's max_ongoing_requests
TURNS, TURN_S = 20, 0.005  # of the event loop, that what has arrived already may take to come up here
PROXIED = (b"x-forwarded-for", b"forwarded", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"via")
NO_KEY = "send an API key in the header `authorization: Bearer rk-…`"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who asks.

    name: of the key's owner; "" where no keys are asked for.
    count_score: counts a score of this key, or raises a 429.
    trusted: its scores are not cross-checked.
    """

    name: str = ""
    scopes: tuple[str, ...] = SCOPES
    count_score: Callable[[], None] = lambda: None
    trusted: bool = False

    @property
    def scorer(self) -> str:
        """Whose decisions it may score: its own; an operator's (a judge, a program) all."""
        return ANYBODY if "operate" in self.scopes else self.name  # and where there are no keys, nobody is anybody


def caller(http: Request) -> Caller:
    """Who sent this request."""
    found: Caller = http.scope["caller"]
    return found


class Guard:
    """The middleware.

    Args:
        app: what it guards.
        keyring: who may come in; None for everybody.
        limits: of each key.
        max_body_bytes: of one request.
    """

    def __init__(self, app: Any, keyring: Keyring | None, limits: Limits, max_body_bytes: int):
        self._app, self._keyring, self._limits, self._max_body = app, keyring, limits, max_body_bytes
        self._awaited = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = False

        async def watched(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._admit(scope, receive, watched)
        except ApiError as error:
            await respond(error)(scope, receive, send)
        except Exception as error:
            # its message may hold what somebody asked: where it happened is enough
            frames = "".join(traceback.format_tb(error.__traceback__)[-4:])
            log.error("%s on %s\n%s", type(error).__name__, scope["path"][:100], frames)
            if not began:
                message = "the server failed to handle this request; it has been logged"
                await respond(ApiError(500, message))(scope, receive, send)

    async def _admit(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._keyring is None or scope["path"] in OPEN:
            if scope["path"] not in OPEN:
                _not_proxied(headers)
            scope["caller"] = Caller()
            await self._app(scope, await self._read(scope, headers, receive), send)
            return
        key = self._authenticate(self._keyring, headers.get(b"authorization", b""))
        _authorize(key, scope["path"])
        limits = self._limits
        scope["caller"] = Caller(key.name, key.scopes, lambda: limits.score(key), limits.trusts(key))

        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in limits.headers(key).items()]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            limits.enter(key)
        except ApiError as error:
            await respond(error)(scope, receive, say)
            return
        try:
            await self._app(scope, await self._read(scope, headers, receive), say)
        finally:
            limits.leave(key)

    @staticmethod
    def _authenticate(keyring: Keyring, header: bytes) -> Key:
        scheme, _, presented = header.decode("latin-1").partition(" ")
        key = keyring.find(presented.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            error = ApiError(
                401, NO_KEY if not header else f"this API key is not valid; {NO_KEY}", code="invalid_api_key"
            )
            error.headers["www-authenticate"] = "Bearer"
            raise error
        return key

    async def _read(self, scope: Message, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Take the whole body in, unless it is too large or too slow; what comes after it is passed on.

        Where no route takes a body, none is awaited.
        """
        told = headers.get(b"content-length", b"0")
        if not told.isdigit() or int(told[:20]) > self._max_body:
            raise self._too_large()
        if scope["method"] != "POST" or scope["path"] in OPEN:
            return _without_body(receive)
        full = self._awaited >= MAX_AWAITED
        self._awaited += 1
        try:
            whole = [await (self._at_once(receive) if full else self._body(receive))]
        finally:
            self._awaited -= 1

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again

    async def _at_once(self, receive: Receive) -> Message:
        """The body if it has arrived already: as many bodies are awaited as may be."""
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
        """The whole body in one message, or that the client left."""
        chunks, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_S):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return message  # the client left in the middle
                    chunks.append(message.get("body", b""))
                    size, more = size + len(chunks[-1]), message.get("more_body", False)
                    if size > self._max_body:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_S:g} s; send it faster") from None
        return {"type": "http.request", "body": b"".join(chunks), "more_body": False}

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body} bytes; send less", code="request_too_large")


def _without_body(receive: Receive) -> Receive:
    """An empty body at once; of what comes later, only that the client left."""
    empty: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def again() -> Message:
        if empty:
            return empty.pop()
        while (message := await receive())["type"] == "http.request":
            pass
        return message

    return again


def _not_proxied(headers: Mapping[bytes, bytes]) -> None:
    """Where there are no keys, only this machine may ask; what a proxy hands on comes from anywhere."""
    for name in PROXIED:
        if name in headers:
            why = f"this gateway has no API keys and takes no requests from a proxy (header '{name.decode()}')"
            how = "make a key and start it with KEYS=FILE, or ask it directly on loopback"
            raise ApiError(403, f"{why}; {how}", code="no_keys_behind_a_proxy")


def _authorize(key: Key, path: str) -> None:
    if path.startswith(OWN):
        allowed: tuple[str, ...] = ("feedback", "operate")
    elif path.startswith(OPERATE):
        allowed = ("operate",)
    elif path in SCOPE_OF:
        allowed = (SCOPE_OF[path],)
    else:
        allowed = SCOPES
    if not set(allowed) & set(key.scopes):
        wanted = " or ".join(f"'{scope}'" for scope in allowed)
        raise ApiError(403, f"this API key has no scope {wanted}; ask the operator for one", code="insufficient_scope")
