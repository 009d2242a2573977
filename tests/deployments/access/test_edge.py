"""EdgeMiddleware in front of Serve's own code, on the HTTP server that Serve starts in each ingress replica."""

import asyncio
import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions

from deployments import runtime
from deployments.access.edge import METHODS, OPERATIONS, clean
from deployments.operations import haproxy
from deployments.operations.haproxy import EDGE
from tests.deployments.operations.test_haproxy_timeouts import environment, rendered
from tests.support.balancer import free_port, is_openai_error, raw, within

SERVES_HEADERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x-session-id",
    "x_session_id",
    "serve_multiplexed_model_id",
    "Serve-Multiplexed-Model-Id",
)
CHUNKS = [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]


async def replica(scope: Any, receive: Any, send: Any) -> None:
    """Reads the headers as Serve's replica does (Replica._direct_ingress_asgi), and then answers as the path says."""
    headers = dict(scope["headers"])
    headers[b"x-request-id"].decode("utf-8")
    http_util.parse_disconnect_disabled_header(headers)
    http_util.parse_request_timeout_header(headers, None)
    http_util.parse_session_id_header(headers)
    for name, value in headers.items():
        if name.decode().lower().replace("-", "_") == "serve_multiplexed_model_id":
            value.decode()
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if scope["path"] in ("/late", f"{OPERATIONS}healthz"):
        text = "Request 7 timed out after 600.0s."
        for message in http_util.convert_object_to_asgi_messages(text, 408):
            await send(message)
        return
    if scope["path"] == "/busy":
        text = "Request dropped due to backpressure"
        extra = [(b"retry-after", b"3")]
        for message in http_util.convert_object_to_asgi_messages(
            text, 503, extra_headers=extra
        ):
            await send(message)
        return
    stream = scope["path"] == "/stream"
    kind = b"text/event-stream" if stream else b"application/json"
    seen = [[k.decode("latin-1"), v.decode("latin-1")] for k, v in scope["headers"]]
    content = json.dumps({"headers": seen, "body": body.decode()}).encode()
    start = {"type": "http.response.start", "status": 200}
    await send({**start, "headers": [(b"content-type", kind)]})
    for part in CHUNKS if stream else [content]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of Serve's HTTP server with the middlewares that Serve finds by EDGE."""
    port = free_port()
    loop = asyncio.new_event_loop()
    patch = pytest.MonkeyPatch()
    patch.setattr(http_util, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", EDGE)

    async def start() -> Any:
        given = HTTPOptions(host="127.0.0.1", port=port)
        options = http_util.configure_http_middlewares(given)
        return await http_util.start_asgi_http_server(replica, options, event_loop=loop)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    task, server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    while not server.started:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result(60)
    try:
        yield port
    finally:
        server.should_exit = True

        async def ended() -> None:
            await task

        asyncio.run_coroutine_threadsafe(ended(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        patch.undo()


@pytest.fixture(scope="module")
def front(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of Serve's HAProxy, as haproxy.sh configures it, before that server."""
    folder = tmp_path_factory.mktemp("front")
    front = free_port()
    path = rendered(folder, front, {"a": port})
    process = subprocess.Popen(
        [haproxy.WRAPPER, "-db", "-f", path], env=environment(folder)
    )
    try:

        def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(url(front)).status_code == 200
            return False

        within(60, answers)
        yield front
    finally:
        process.kill()
        process.wait(5)


def url(port: int, path: str = "/echo") -> str:
    return f"http://127.0.0.1:{port}{path}"


def seen(answer: httpx.Response) -> list[tuple[str, str]]:
    """The headers that the application was given."""
    assert answer.status_code == 200, answer.text
    return [(name, value) for name, value in answer.json()["headers"]]


@pytest.mark.parametrize("name", ["x-request-id", *SERVES_HEADERS, "traceparent"])
@pytest.mark.parametrize("value", [b"\xe9", b"\x80", b"\xff", b"f\xfcr"])
@pytest.mark.parametrize("path", ["/echo", "/readyz", "/stream"])
def test_a_header_that_is_not_utf8_is_ignored(
    port: int, name: str, value: bytes, path: str
) -> None:
    """On every route; Serve would answer with a 500 in plain text."""
    answer = httpx.get(url(port, path), headers=[(name.encode(), value)])
    assert answer.status_code == 200
    assert answer.headers["x-request-id"].isascii()


def test_headers_that_serve_obeys_are_dropped_and_others_kept(port: int) -> None:
    """Otherwise a client could set its own deadline. Names with underscores count as those with hyphens."""
    kept = {"authorization": "Bearer rk-1", "x-other": "für", "traceparent": "00-1"}
    given = [(name.encode(), b"1") for name in SERVES_HEADERS]
    given += [(name.encode(), value.encode()) for name, value in kept.items()]
    found = dict(seen(httpx.get(url(port), headers=given)))
    assert not {name.lower() for name in SERVES_HEADERS} & set(found)
    assert {name: found[name].encode("latin-1").decode() for name in kept} == kept


@pytest.mark.parametrize(
    "given",
    [
        [b"a" * 65],
        [b"a" * 7_000],
        [b""],
        [b"a b"],
        [b"<script>"],
        [b"one", b"two"],
        [b"same", b"same"],
        [],
    ],
)
def test_an_unusable_request_id_is_replaced(port: int, given: list[bytes]) -> None:
    """Too long, empty, with other characters, or given twice. The application and the client see the same new one."""
    headers = [(b"x-request-id", value) for value in given]
    answers = [httpx.get(url(port), headers=headers) for _ in range(2)]
    ids = []
    for answer in answers:
        (inside,) = [v for name, v in seen(answer) if name == "x-request-id"]
        assert answer.headers.get_list("x-request-id") == [inside]
        assert inside.encode() not in given and 0 < len(inside) <= 64
        ids.append(inside)
    assert ids[0] != ids[1]


@pytest.mark.parametrize("given", ["mine-7", "a" * 64, "2026:a.b_c"])
def test_a_harmless_request_id_is_kept(port: int, given: str) -> None:
    answer = httpx.get(url(port), headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == dict(seen(answer))["x-request-id"] == given


def test_the_edge_holds_behind_serves_proxy(front: int) -> None:
    """Trailers, HTTP/1.0 and header values that are not UTF-8, as a client of `make serve` sends them."""
    head = b"POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    chunked = head + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    text = raw(front, chunked + TRAILERS + b"\r\n\r\n").content.decode()
    assert '"body": "{}"' in text and "trail" not in text and "Bearer" not in text
    for connection in (b"", b"connection: close\r\n"):
        request = b"GET /stream HTTP/1.0\r\nhost: x\r\n" + connection + b"\r\n"
        answer = raw(front, request)
        assert answer.content == b"".join(CHUNKS)
        assert "transfer-encoding" not in answer.headers
    for name in ("x-request-id", *SERVES_HEADERS):
        answer = httpx.get(url(front), headers=[(name.encode(), b"\xe9")])
        assert answer.status_code == 200
    assert is_openai_error(httpx.get(url(front, "/late")), 408)


TRAILERS = (
    b"x-request-id: trail\r\ncontent-type: application/json\r\nauthorization: Bearer x"
)


@pytest.mark.parametrize("body", [b"2\r\n{}\r\n0\r\n", b"0\r\n"])
def test_trailers_never_become_headers(port: int, body: bytes) -> None:
    """They arrive in one piece with the head, before the application runs. Later requests are not affected."""
    head = b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
    first = head + b"\r\n" + body + TRAILERS + b"\r\n\r\n"
    second = b"GET /echo HTTP/1.1\r\nhost: x\r\nx-a: b\r\nconnection: close\r\n\r\n"
    text = raw(port, first + second).content.decode()
    assert (
        "trail" not in text
        and "Bearer" not in text
        and "application/json" not in (text.partition("HTTP/1.1 200")[0])
    )
    assert '["x-a", "b"]' in text  # of the second request


@pytest.mark.parametrize("method", ["ZQXRED1", "PUT", "PATCH", "TRACE", "QUERY"])
def test_other_methods_are_refused(port: int, method: str) -> None:
    """Serve would keep a metric for each. What is no method in HTTP at all, the HTTP server refuses by itself."""
    request = f"{method} /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = raw(port, request.encode())
    if method == "ZQXRED1":
        assert answer.status_code == 400
        return
    assert is_openai_error(answer, 405)
    assert answer.headers["allow"] == ", ".join(METHODS)
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("connection", [b"", b"connection: keep-alive\r\n"])
def test_a_stream_to_http_1_0_has_no_chunks(port: int, connection: bytes) -> None:
    """Such a client would read the sizes of the chunks as text. The connection is closed at the end."""
    request = b"GET /stream HTTP/1.0\r\nhost: x\r\n" + connection + b"\r\n"
    answer = raw(port, request)  # reads until the connection is closed
    assert answer.content == b"".join(CHUNKS)
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["content-length"] == str(len(answer.content))
    newer = httpx.get(url(port, "/stream"))
    assert newer.content == answer.content
    assert newer.headers["transfer-encoding"] == "chunked"


@pytest.mark.parametrize(("path", "status"), [("/late", 408), ("/busy", 503)])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_errors_of_serve_have_openais_shape(
    port: int, path: str, status: int, version: str
) -> None:
    """Serve's own are plain text, and name a time that no client asked for."""
    head = f"GET {path} HTTP/{version}\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = raw(port, head.encode())
    assert is_openai_error(answer, status) and "600" not in answer.text
    assert answer.headers["x-request-id"]
    assert answer.headers.get("retry-after") == ("3" if status == 503 else None)


def test_serves_own_routes_are_unchanged(port: int) -> None:
    """Serve's load balancer reads them."""
    answer = httpx.get(url(port, f"{OPERATIONS}healthz"))
    assert answer.text.startswith("Request 7")


def test_the_callers_list_of_headers_is_not_changed() -> None:
    """The HTTP server goes on using its own list."""
    given = [(b"x-session-id", b"1"), (b"x-request-id", b"a b")]
    kept, request_id = clean(given)
    assert given == [(b"x-session-id", b"1"), (b"x-request-id", b"a b")]
    assert kept == [(b"x-request-id", request_id.encode())]


def test_drop_trailers_replaces_the_callback_once() -> None:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    runtime.drop_trailers()
    before = HttpToolsProtocol.on_headers_complete
    runtime.drop_trailers()
    assert HttpToolsProtocol.on_headers_complete is before
