"""AccessMiddleware: requests without a body, the limit on pending bodies, refusals, and requests through a proxy."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from deployments.access import middleware
from deployments.access.api_keys import ApiKeyStore, add
from deployments.access.local_access import PROXY_HEADERS
from deployments.access.middleware import MAX_PENDING_BODIES, AccessMiddleware
from deployments.access.rate_limits import RateLimiter
from deployments.settings import KeySettings
from tests.support.hostile_input import openai_shape

CHAT = "/v1/chat/completions"
Receive = Callable[[], Awaitable[dict[str, Any]]]


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test in an event loop of its own."""

    @wraps(test)
    def run(*given: Any, **named: Any) -> None:
        asyncio.run(test(*given, **named))

    return run


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers with the body that it was given."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message.get("body", b"left")})


def guarded(key_store: ApiKeyStore | None = None) -> AccessMiddleware:
    return AccessMiddleware(echo, key_store, RateLimiter(KeySettings(file="x")), 1_000)


async def never() -> dict[str, Any]:
    """A client that sends nothing more."""
    await asyncio.Event().wait()
    raise AssertionError


def sends(*parts: bytes, turns: int = 0) -> Receive:
    """A `receive` for a body that has arrived; each part takes so many turns of the loop, as in Serve's queues."""
    left = list(parts)

    async def receive() -> dict[str, Any]:
        for _ in range(turns):
            await asyncio.sleep(0)
        return (
            {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
            if left
            else await never()
        )

    return receive


Answer = tuple[int, dict[bytes, bytes], bytes]


async def ask(
    app: AccessMiddleware,
    method: str,
    path: str,
    receive: Receive,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> Answer:
    """The status, headers and body of the answer to one request."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": list(headers),
        "query_string": b"",
    }
    async with asyncio.timeout(60):  # reached only by a test that fails
        await app(scope, receive, send)
    return (
        sent[0]["status"],
        dict(sent[0]["headers"]),
        b"".join(m.get("body", b"") for m in sent[1:]),
    )


@asynccontextmanager
async def half_sent(
    app: AccessMiddleware, number: int
) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """So many requests whose bodies never arrive."""
    tasks = [
        asyncio.ensure_future(
            ask(app, "POST", CHAT, never, [(b"content-length", b"10")])
        )
        for _ in range(number)
    ]
    await asyncio.sleep(0)
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("POST", "/readyz"),
        ("PATCH", "/healthz"),
        ("GET", "/v1/router/state"),
        ("HEAD", "/v1/models"),
        ("DELETE", "/v1/models/small"),
        ("OPTIONS", CHAT),
        ("PUT", CHAT),
        ("QUERY", "/docs"),
    ],
)
@in_a_loop
async def test_a_request_that_takes_no_body_awaits_none(method: str, path: str) -> None:
    """The announced length does not matter, and the request is answered while as many bodies are pending as may be."""
    app = guarded()
    async with half_sent(app, MAX_PENDING_BODIES):
        status, _, body = await ask(
            app, method, path, never, [(b"content-length", b"10")]
        )
        assert (status, body) == (200, b"")


@in_a_loop
async def test_an_unread_body_is_dropped_but_the_disconnect_is_passed_on() -> None:
    """A streaming application waits for the message that the client disconnected."""
    messages = [
        {"type": "http.request", "body": b"x", "more_body": True},
        {"type": "http.request", "body": b"y"},
    ]
    messages.append({"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {
            "type": "http.request",
            "body": b"",
            "more_body": False,
        }
        assert await receive() == {"type": "http.disconnect"}
        await echo(scope, sends(b"seen"), send)

    outer = AccessMiddleware(app, None, RateLimiter(KeySettings(file="x")), 1_000)
    assert (await ask(outer, "GET", "/v1/models", receive))[2] == b"seen"


@in_a_loop
async def test_refusals_come_before_the_body(tmp_path: Path) -> None:
    """A client that announces a body and sends none gets its 401, 403, 413 or 429."""
    file = tmp_path / "keys.json"
    given = (
        add(file, "ann", ("feedback",)),
        add(file, "ben", ("infer",), requests_per_minute=1),
    )
    ann, ben = [(b"authorization", f"Bearer {key}".encode()) for key in given]
    app = guarded(ApiKeyStore(file))
    length = (b"content-length", b"10")
    assert (await ask(app, "POST", CHAT, sends(b"x"), [ben]))[0] == 200
    for status, method, headers in (
        (401, "POST", [length]),
        (401, "GET", [length]),
        (401, "POST", [(b"authorization", b"Bearer rk-a-b"), length]),
        (403, "POST", [ann, length]),
        (429, "POST", [ben, length]),
        (413, "POST", [ann, (b"content-length", b"1001")]),
        (413, "GET", [ann, (b"content-length", b"1001")]),
    ):
        path = "/v1/feedback" if status == 413 else CHAT
        answer = await ask(app, method, path, never, headers)
        assert answer[0] == status and openai_shape(json.loads(answer[2])), (
            status,
            method,
        )


@in_a_loop
async def test_pending_bodies_are_limited() -> None:
    """Above the limit a body that has not arrived is refused at once; a body that has arrived is accepted."""
    app = guarded()
    async with half_sent(app, MAX_PENDING_BODIES) as waiting:
        status, headers, body = await ask(app, "POST", CHAT, never)
        assert status == 503 and headers[b"retry-after"] == b"1"
        assert (
            openai_shape(json.loads(body))
            and json.loads(body)["error"]["code"] == "too_many_unfinished"
        )
        status, _, _ = await ask(
            app,
            "POST",
            "/v1/router/versions",
            never,
            [(b"transfer-encoding", b"chunked")],
        )
        assert status == 503
        for receive in (
            sends(b"ab"),
            sends(b"a", b"b"),
            sends(b"ab", turns=7),
            sends(b"a", b"b", turns=5),
        ):
            assert (await ask(app, "POST", CHAT, receive))[::2] == (200, b"ab")
        assert (await ask(app, "POST", "/v1/router/versions", sends(b"", turns=3)))[
            0
        ] == 200
        assert not any(task.done() for task in waiting)
    assert (await ask(app, "POST", CHAT, sends(b"ab")))[
        0
    ] == 200  # the pending bodies were cancelled


@pytest.mark.parametrize("ends", ["left", "slow", "large", "refused"])
@in_a_loop
async def test_a_pending_body_is_counted_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """The count is zero after a disconnect, a timeout, a body that is too large, and a refusal."""
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.01 if ends == "slow" else 60.0)
    app = guarded()

    async def leaves() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def large() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    given = {"left": leaves, "slow": never, "large": large, "refused": never}[ends]
    wanted = {"left": 200, "slow": 408, "large": 413, "refused": 503}[ends]
    for _ in range(3):
        if ends == "refused":
            async with half_sent(app, MAX_PENDING_BODIES):
                assert (await ask(app, "POST", CHAT, given))[0] == wanted
        else:
            assert (await ask(app, "POST", CHAT, given))[0] == wanted
    assert app._pending_bodies == 0


@pytest.mark.parametrize("header", [*PROXY_HEADERS, b"X-Forwarded-For", b"Via"])
@in_a_loop
async def test_a_gateway_without_keys_refuses_requests_through_a_proxy(
    tmp_path: Path, header: bytes
) -> None:
    """Their client may be anywhere. Health checks are answered, and a gateway with keys answers all."""
    headers = [(b"host", b"evil.com"), (header, b"10.0.0.1")]
    for method, path in (
        ("GET", "/v1/router/state"),
        ("POST", CHAT),
        ("GET", "/docs"),
        ("POST", "/v1/router/versions"),
    ):
        status, _, body = await ask(guarded(), method, path, never, headers)
        error = json.loads(body)["error"]
        assert (
            status == 403
            and error["type"] == "permission_error"
            and "key" in error["message"]
        )
    for path in ("/healthz", "/readyz"):
        assert (await ask(guarded(), "GET", path, never, headers))[0] == 200
    key = add(tmp_path / "keys.json", "ann", ("infer",))
    app = guarded(ApiKeyStore(tmp_path / "keys.json"))
    bearer = (b"authorization", f"Bearer {key}".encode())
    assert (await ask(app, "POST", CHAT, sends(b"x"), [*headers, bearer]))[0] == 200
    assert (await ask(guarded(), "POST", CHAT, sends(b"x"), [(b"host", b"127.0.0.1")]))[
        0
    ] == 200
