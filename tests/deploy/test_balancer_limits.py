"""Tests of deploy/haproxy: routes it refuses, limits per address, and input that must not reach a gateway."""

import contextlib
import random
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest

from deployments.access.middleware import DOCS_PATHS
from tests.support.balancer import Balancer, Two, balanced, is_openai_error, raw, within

CLOSE = b"host: evil.com\r\nconnection: close\r\n\r\n"
H2 = [
    (b":method", b"GET"),
    (b":path", b"/x"),
    (b":scheme", b"http"),
    (b":authority", b"a"),
]


def get(balancer: Balancer, target: str) -> httpx.Response:
    """The answer to a request with exactly this target, which no client library rewrites."""
    return raw(balancer.port, f"GET {target} HTTP/1.1\r\n".encode() + CLOSE)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/router/state",  # these three are the reference's
        "/v1/router%2fstate",
        "/v1/router/versions",
        "/v1%2Frouter/state",
        "/%761/router/state",
        "/%76%31%2f%72%6f%75%74%65%72%2f%73%74%61%74%65",
        "/v1/router",
        "/v1/router/versions/3/evaluate?x=/v1/router/decisions/d",
        "/V1/Router/state",
        "/v1/router/decisions",
        "/v1/router/decisions/",
        "/v1/router/decisions/d/x",
        "/v1/router/decisions/d%2fx",
        "/v1/router/decisions/%3f",
        "http://evil.com/v1/router/state",
        "http://evil.com/v1%2frouter/versions",
    ],
)
def test_the_operators_routes_are_refused(two: Two, target: str) -> None:
    """They are refused in every spelling."""
    balancer, gateways = two
    answer = get(balancer, target)
    assert (
        is_openai_error(answer, 403)
        and answer.json()["error"]["code"] == "operators_only"
    )
    assert not any(gateway.requests for gateway in gateways)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/router/decisions/..%2fstate",
        "/v1/router/decisions/../state",
        "/v1/router/decisions/%2e%2E/state",
        "/v1/./router/state",
        "//v1/router/state",
        "/v1//router/state",
        "/v1/%2frouter/state",
        "/x/..%2fv1/router/state",
        "/v1/models/..",
        "/v1/router/state%",
        "/v1/%72outer/versions/%zz",
        "/v1/models/%00",
        "/v1/models/%0d%0a",
        "*",
        "http://evil.com",
    ],
)
def test_ambiguous_paths_are_refused(two: Two, target: str) -> None:
    """Empty and dot segments, broken encodings and control characters get a 400."""
    balancer, gateways = two
    answer = get(balancer, target)
    assert is_openai_error(answer, 400) and answer.json()["error"]["code"] == "bad_path"
    assert not any(gateway.requests for gateway in gateways)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/router/decisions/dec-1_a.b",
        "/v1/router%2Fdecisions/dec-1",
        "/v1/models/router",
        "/v1/models/caf%C3%A9%20%2B+",
        "/v1/chat/completions?x=//../v1/router/%zz",
        "/readyz",
        "http://evil.com/v1/models",
    ],
)
def test_all_other_routes_are_passed_on(two: Two, target: str) -> None:
    """One of them is the explanation of a client's own decision."""
    assert get(two[0], target).status_code == 200


def test_no_path_that_the_gateways_route_to_an_operators_route_passes(
    two: Two,
) -> None:
    """300 spellings of such paths, each read as uvicorn reads it: decoded once."""
    balancer, gateways = two
    rng = random.Random(5)
    routes = [
        "/v1/router/state",
        "/v1/router/versions",
        "/v1/router/versions/2/promote",
        "/v1/router/decisions/../state",
    ]
    for _ in range(300):
        path = rng.choice(routes)
        written = "/" + "".join(
            f"%{ord(c):02{rng.choice('xX')}}" if rng.random() < 0.3 else c
            for c in path[1:]
        )
        written = (
            rng.choice(["", "http://evil.com"])
            + written
            + rng.choice(["", "?", "?a=%2e", "/", "%20", "%ff"])
        )
        assert unquote(written.removeprefix("http://evil.com")).startswith(
            "/v1/router/"
        )
        assert get(balancer, written).status_code in (400, 403), written
    assert not any(gateway.requests for gateway in gateways)


def test_the_page_that_describes_the_api_is_let_through(two: Two) -> None:
    """With its files and without a key, from any network; and so is an address that only starts like one of them."""
    balancer, gateways = two
    for path in (*DOCS_PATHS, "/docs/other"):
        answer = httpx.get(balancer.url + path)
        assert answer.status_code == 200 and answer.json()["name"] in "ab", path
    asked = {request[":path"] for g in gateways for request in g.requests}
    assert asked >= {*DOCS_PATHS, "/docs/other"}


@pytest.mark.parametrize(
    ("operators", "admitted"),
    [
        ("10.0.0.0/8 127.0.0.1", True),
        ("127.0.0.0/8", True),
        ("10.0.0.0/8 ::1", False),
        ("", False),
    ],
)
def test_operators_networks_are_admitted(
    tmp_path: Path, operators: str, admitted: bool
) -> None:
    """Networks in OPERATORS are admitted; by default, and with an empty list, none is."""
    with balanced(tmp_path, OPERATORS=operators) as (balancer, _):
        within(10, lambda: "a" in balancer.names(1) + balancer.names(1))
        assert get(balancer, "/v1/router/state").status_code == (
            200 if admitted else 403
        )
        assert get(balancer, "/v1/router/decisions/..%2fstate").status_code == 400


@pytest.mark.parametrize(
    "method", ["ZQXRED1", "PUT", "PATCH", "TRACE", "PROPFIND", "get", "QUERY", "GETX"]
)
def test_other_methods_reach_no_gateway(two: Two, method: str) -> None:
    """Serve would create a set of time series for each method."""
    balancer, gateways = two
    answer = raw(balancer.port, f"{method} /healthz HTTP/1.1\r\n".encode() + CLOSE)
    assert (
        is_openai_error(answer, 405)
        and answer.headers["allow"] == "GET, HEAD, POST, DELETE, OPTIONS"
    )
    assert not any(gateway.requests for gateway in gateways)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_the_gateways_methods_pass(two: Two, method: str) -> None:
    """They pass without a body, too."""
    assert httpx.request(method, two[0].url).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\ntransfer-encoding: chunked",  # the reference's
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ntrailer: x-request-timeout-seconds",
        b"DELETE / HTTP/1.1\r\nContent-Length: 0\r\nTransfer-Encoding: chunked",
        b"OPTIONS / HTTP/1.1\r\nTRANSFER-ENCODING:\tchunked",
    ],
)
def test_no_trailer_reaches_a_gateway(two: Two, head: bytes) -> None:
    """A gateway would take it for a header, so transfer-encoding is refused with and without a body."""
    balancer, gateways = two
    for body in (
        b"0\r\nx-request-timeout-seconds: 0\r\n\r\n",
        b"0\r\n\r\n",
        b"1\r\nx\r\n0\r\nx-session-id: a\r\n\r\n",
    ):
        assert is_openai_error(raw(balancer.port, head + b"\r\n" + CLOSE + body), 411)
    assert not any(gateway.requests for gateway in gateways)


# --- HTTP/2, in which one connection has many requests, and trailers need no header --------------------------------


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )


def fields(*given: tuple[bytes, bytes]) -> bytes:
    """Encode header fields by HPACK without compression."""
    return b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in given
    )


@contextlib.contextmanager
def http2(port: int, *frames: bytes) -> Iterator[socket.socket]:
    """A connection of HTTP/2 on which these frames were sent."""
    with socket.create_connection(("127.0.0.1", port), 10) as s:
        s.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + b"".join(frames)
        )
        yield s


@pytest.mark.parametrize("between", [b"", frame(0, 0, 1, b""), frame(0, 0, 1, b"") * 3])
def test_no_trailer_of_http2_reaches_a_gateway(two: Two, between: bytes) -> None:
    """A request without a body is passed on with an empty one of known length, which cannot have trailers."""
    balancer, gateways = two
    trailers = frame(1, 5, 1, fields((b"x-request-timeout-seconds", b"0")))
    with http2(balancer.port, frame(1, 4, 1, fields(*H2)), between, trailers):
        within(5, lambda: any(gateway.requests for gateway in gateways))
    (seen,) = [request for gateway in gateways for request in gateway.requests]
    assert seen["content-length"] == "0" and "transfer-encoding" not in seen
    assert "x-request-timeout-seconds" not in seen


def test_requests_of_one_connection_are_counted_too(tmp_path: Path) -> None:
    """Five requests wait on one HTTP/2 connection, and an address may have three."""
    with balanced(tmp_path, PER_SOURCE="3") as (balancer, gateways):
        head = [*H2[:1], (b":path", b"/never"), *H2[2:]]
        with http2(
            balancer.port,
            *(frame(1, 5, stream, fields(*head)) for stream in (1, 3, 5, 7, 9)),
        ):
            within(
                5, lambda: [line["status"] for line in balancer.lines()] == [429, 429]
            )
            within(5, lambda: sum(len(gateway.requests) for gateway in gateways) == 3)
        within(5, lambda: httpx.get(balancer.url).status_code == 200)


# --- one address --------------------------------------------------------------------------------------------------


def is_closed(s: socket.socket) -> bool:
    """Whether the connection was closed without an answer."""
    s.settimeout(10)
    with contextlib.suppress(ConnectionError):
        return s.recv(1) == b""
    return True


def test_the_connections_of_one_address_are_limited(tmp_path: Path) -> None:
    """A further connection gets a 429 and is closed, and the others continue; the eighth is rejected without an answer.

    After the connections have ended, the address may connect again.
    """
    ask = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    with (
        balanced(tmp_path, PER_SOURCE="4") as (balancer, _),
        contextlib.ExitStack() as held,
    ):

        def more() -> socket.socket:
            return held.enter_context(
                socket.create_connection(("127.0.0.1", balancer.port), 10)
            )

        def counted(number: int) -> None:
            within(
                10,
                lambda: re.search(
                    rf"conn_cur={number}\b", balancer.command("show table public")
                ),
            )

        good = [more() for _ in range(4)]
        counted(4)
        answer = raw(balancer.port, ask)  # `raw` reads to the end: it is closed
        assert is_openai_error(answer, 429) and answer.headers["retry-after"] == "1"
        counted(4)
        for s in good:
            s.sendall(ask)
            assert s.recv(65536).startswith(b"HTTP/1.1 200")
        idle = [more() for _ in range(3)]
        counted(7)
        with contextlib.suppress(ConnectionResetError):
            assert is_closed(more())
        for s in good + idle:
            s.close()
        within(10, lambda: httpx.get(balancer.url).status_code == 200)


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n", b"\r\n"]
)
def test_half_open_connections_end(tmp_path: Path, sent: bytes) -> None:
    """They end ten seconds after they began; the timeout is shortened here."""
    changes = {"timeout http-request 10s": "timeout http-request 1s"}
    with (
        balanced(tmp_path, changes) as (balancer, _),
        socket.create_connection(("127.0.0.1", balancer.port), 30) as s,
    ):
        s.sendall(sent)
        received = b"".join(iter(lambda: s.recv(65536), b""))
    assert received == b"" or received.startswith(b"HTTP/1.1 408")
