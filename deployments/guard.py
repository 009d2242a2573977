"""In front of every route: who is it, may they, how much have they asked already, and is the body small enough.

A plain ASGI middleware, because only there can a body be refused before it is read.
"""

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
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
BODY_S = 30.0  # in which a body must have come
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
            scope["caller"] = Caller()
            await self._app(scope, await self._read(headers, receive), send)
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
            await self._app(scope, await self._read(headers, receive), say)
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

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Take the whole body in, unless it is too large or too slow; what comes after it is passed on."""
        told = headers.get(b"content-length", b"0")
        if not told.isdigit() or int(told[:20]) > self._max_body:
            raise self._too_large()
        chunks, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_S):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        break
                    chunks.append(message.get("body", b""))
                    size, more = size + len(chunks[-1]), message.get("more_body", False)
                    if size > self._max_body:
                        raise self._too_large()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_S:g} s; send it faster") from None
        whole: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]
        if more:  # the client left in the middle
            whole = [message]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body} bytes; send less", code="request_too_large")


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
