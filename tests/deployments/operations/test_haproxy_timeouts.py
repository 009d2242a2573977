"""Serve's HAProxy as operations/haproxy.sh runs it: Serve's template and binary, two small servers behind."""

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.access.local_access import PROXY_HEADERS
from deployments.operations import haproxy, standby_proxy
from tests.support.balancer import (
    CHUNKS,
    FakeGateway,
    free_port,
    is_openai_error,
    raw,
    within,
)

WAIT = "wait-for-body time 10s"


def rendered(folder: Path, port: int, servers: dict[str, int]) -> Path:
    """The configuration that Serve writes for these ingress replicas, with the settings of operations/haproxy.py."""
    from ray.serve._private import haproxy as serve_haproxy
    from ray.serve.config import HTTPOptions

    variables = haproxy.environment(folder, 0)
    config = serve_haproxy.HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "admin.sock"),
        metrics_enabled=False,
        metrics_port=free_port(),
        stats_port=free_port(),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        retry_on=variables["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=int(variables["RAY_SERVE_HAPROXY_RETRIES"]),
        timeout_client_s=int(variables["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]),
        bufsize=int(variables["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
        maxconn=int(variables["RAY_SERVE_HAPROXY_MAXCONN"]),
    )
    found = [
        serve_haproxy.ServerConfig(name=name, host="127.0.0.1", port=at)
        for name, at in servers.items()
    ]
    backend = serve_haproxy.BackendConfig(
        name="http-gateway",
        path_prefix="/",
        app_name="gateway",
        servers=found,
        http_health_check_path="/readyz",
    )
    path = folder / "haproxy.cfg"
    api = serve_haproxy.HAProxyApi(
        config, {"http-gateway": backend}, config_file_path=str(path)
    )
    api._generate_config_file_internal()
    return path


def environment(folder: Path, binary: str | None = None) -> dict[str, str]:
    """Environment of the wrapper, with the ports of the rendered configuration."""
    text = (folder / "haproxy.cfg").read_text()
    variables = {**os.environ, **haproxy.environment(folder, 0)}
    for name, line in (("METRICS", r"^ *bind :(\d+)"), ("STATS", r"^ *bind \*:(\d+)")):
        found = re.search(line, text, re.M)
        variables[f"RAY_SERVE_HAPROXY_{name}_PORT"] = found[1] if found else "0"
    return {**variables, "ROUTER_HAPROXY": binary or variables["ROUTER_HAPROXY"]}


@pytest.fixture(scope="module")
def proxied(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[int, list[FakeGateway]]]:
    """Port of a running HAProxy, and its servers. Timeouts of ten seconds are two seconds here."""
    folder = tmp_path_factory.mktemp("proxy")
    port = free_port()
    gateways = [FakeGateway("a"), FakeGateway("b")]
    path = rendered(folder, port, {gateway.name: gateway.port for gateway in gateways})
    given = environment(folder)
    subprocess.run(
        [haproxy.WRAPPER, "-f", path],
        env={**given, "ROUTER_HAPROXY": "true"},
        check=True,
    )
    text = path.read_text()
    assert text.count(WAIT) == 1 and text.count("timeout http-request 10s") == 1
    path.write_text(
        text.replace(WAIT, "wait-for-body time 2s").replace(
            "http-request 10s", "http-request 2s"
        )
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [given["ROUTER_HAPROXY"], "-db", "-f", path], stdout=log, stderr=log
        )
    try:

        def both() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return {
                    httpx.get(f"http://127.0.0.1:{port}/").json()["name"]
                    for _ in range(4)
                } == {"a", "b"}
            return False

        within(20, both)
        yield port, gateways
    finally:
        process.kill()
        process.wait(5)
        for gateway in gateways:
            gateway.close()


@pytest.fixture
def proxy(proxied: tuple[int, list[FakeGateway]]) -> tuple[int, list[FakeGateway]]:
    for gateway in proxied[1]:
        gateway.requests.clear()
    return proxied


@pytest.mark.parametrize("servers", [{}, {"a": 30_001}, {"a": 30_001, "b": 30_002}])
def test_wrapper_writes_a_valid_configuration_once(
    tmp_path: Path, servers: dict[str, int]
) -> None:
    """HAProxy accepts it, and a second start with the same file does not change it again."""
    path = rendered(tmp_path, free_port(), servers)
    given = environment(tmp_path)
    for _ in range(2):
        checked = subprocess.run(
            [haproxy.WRAPPER, "-c", "-f", path],
            env=given,
            capture_output=True,
            text=True,
        )
        assert checked.returncode == 0, checked.stderr
        text = path.read_text()
        for line in (
            WAIT,
            "timeout http-request 10s",
            "http-request deny deny_status 405",
        ):
            assert text.count(line) == 1, line
    assert "timeout client 660s" in text and re.search(
        r"timeout http-keep-alive \d+s", text
    )
    assert f"maxconn {haproxy._connections()}\n" in text
    frontend, _, rest = text.partition("frontend http_frontend")[2].partition(
        "\nbackend"
    )
    assert frontend.index(WAIT) < frontend.index("use_backend") if servers else rest
    own = standby_proxy.ADMIN.sub("", text)  # the configuration of the standby proxy
    assert WAIT in own and "timeout http-request 10s" in own


def test_connections_are_limited_by_the_number_of_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With more connections HAProxy would not start."""
    import resource

    for most, wanted in (
        (resource.RLIM_INFINITY, 8_000),
        (1_000_000, 8_000),
        (20_000, 6_333),
        (4_096, 1_032),
        (1_024, 1_000),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, most=most: (1_024, most))
        assert haproxy._connections() == wanted


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n",  # the reference's
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nxxxxx",
        b"POST /v1/router/versions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"DELETE /x HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 10\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: x\r\n",
    ],
)
def test_incomplete_requests_reach_no_ingress(
    proxy: tuple[int, list[FakeGateway]], head: bytes
) -> None:
    """They end after the timeout, with an error in OpenAI's format if the head was complete."""
    port, gateways = proxy
    with socket.create_connection(("127.0.0.1", port), 30) as s:
        s.sendall(head)
        received = b"".join(iter(lambda: s.recv(65536), b""))
    answer = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 408")
    assert not any(gateway.requests for gateway in gateways)
    if head.count(b"\r\n\r\n"):
        assert b'"code": "request_timeout"' in answer


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nx: "])
def test_half_open_connections_end(
    proxy: tuple[int, list[FakeGateway]], sent: bytes
) -> None:
    """Otherwise 4,096 of them would take all connections."""
    with socket.create_connection(("127.0.0.1", proxy[0]), 30) as s:
        s.sendall(sent)
        received = b"".join(iter(lambda: s.recv(65536), b""))
    assert received == b"" or received.startswith(b"HTTP/1.1 408")


def test_streams_and_slow_answers_go_on(proxy: tuple[int, list[FakeGateway]]) -> None:
    """The timeouts limit how long a request takes to arrive, not how long the answer takes."""
    port, gateways = proxy
    with httpx.stream("GET", f"http://127.0.0.1:{port}/stream", timeout=30) as answer:
        assert len([line for line in answer.iter_lines() if line]) == CHUNKS
    began = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):  # the client's own
        httpx.post(f"http://127.0.0.1:{port}/never", json={"a": 1}, timeout=5)
    assert (
        time.monotonic() - began > 4.5
        and sum(len(gateway.requests) for gateway in gateways) == 2
    )


def test_bodies_larger_than_the_buffer_arrive_complete(
    proxy: tuple[int, list[FakeGateway]],
) -> None:
    """HAProxy waits only for as much of a body as its buffer holds."""
    port, gateways = proxy
    for size in (0, 1, 15_000, 16_384, 100_000, 2**20):
        assert (
            httpx.post(f"http://127.0.0.1:{port}/", content=b"x" * size).status_code
            == 200
        )
    lengths = [
        int(r["content-length"]) for gateway in gateways for r in gateway.requests
    ]
    assert sorted(lengths) == [0, 1, 15_000, 16_384, 100_000, 2**20]


def test_haproxy_adds_no_header_that_a_gateway_without_keys_refuses(
    proxy: tuple[int, list[FakeGateway]],
) -> None:
    """Otherwise the gateway would refuse every request on loopback."""
    seen = httpx.get(f"http://127.0.0.1:{proxy[0]}/").json()["headers"]
    assert not {name.decode() for name in PROXY_HEADERS} & set(seen)


@pytest.mark.parametrize("method", ["ZQXRED1", "PUT", "TRACE", "get"])
def test_other_methods_reach_no_ingress(
    proxy: tuple[int, list[FakeGateway]], method: str
) -> None:
    """Serve would make a metric of every invented method."""
    port, gateways = proxy
    request = f"{method} /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert is_openai_error(raw(port, request.encode()), 405)
    assert not any(gateway.requests for gateway in gateways)


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_request_that_kills_its_ingress_reaches_no_second_one(
    proxy: tuple[int, list[FakeGateway]], method: str
) -> None:
    """It may have had an effect, and it may be what killed the ingress.

    The error has OpenAI's shape. If the connection to the ingress was used before, HAProxy closes that of the client
    instead, which then decides whether it sends the request again.
    """
    port, (a, b) = proxy
    with contextlib.suppress(httpx.RemoteProtocolError):
        answer = httpx.request(method, f"http://127.0.0.1:{port}/break", json={})
        assert is_openai_error(answer, 502) and answer.headers["retry-after"] == "1"
    assert len(a.requests + b.requests) == 1


def test_a_read_is_sent_once_more(proxy: tuple[int, list[FakeGateway]]) -> None:
    port, (a, b) = proxy
    assert is_openai_error(httpx.get(f"http://127.0.0.1:{port}/break"), 502)
    assert len(a.requests) == len(b.requests) == 1


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n", 414),
        (b"GET / HTTP/1.1\r\nx-a: " + b"a" * 20_000 + b"\r\n", 431),
        (
            b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(150)),
            431,
        ),
        (b"OPTIONS * HTTP/1.1\r\n", 404),
    ],
)
def test_errors_of_the_proxy_have_openais_shape(
    proxy: tuple[int, list[FakeGateway]], request_line: bytes, status: int
) -> None:
    """A long URL, large headers, many headers, and a path of no application."""
    port, gateways = proxy
    head = request_line + b"host: x\r\nconnection: close\r\n\r\n"
    answers = [raw(port, head) for _ in range(2)]
    assert all(is_openai_error(answer, status) for answer in answers)
    assert len({answer.headers["x-request-id"] for answer in answers}) == 2
    assert not any(gateway.requests for gateway in gateways)


def test_without_an_ingress_the_proxys_error_has_openais_shape(tmp_path: Path) -> None:
    """Both refuse the connection; Serve's own file would make it a 500 in plain text."""
    port = free_port()
    path = rendered(tmp_path, port, {"a": free_port(), "b": free_port()})
    given = environment(tmp_path)
    subprocess.run(
        [haproxy.WRAPPER, "-f", path],
        env={**given, "ROUTER_HAPROXY": "true"},
        check=True,
    )
    process = subprocess.Popen([given["ROUTER_HAPROXY"], "-db", "-f", path])
    try:

        def answered() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/feedback", json={})
                return is_openai_error(answer, 503)
            return False

        within(20, answered)
    finally:
        process.kill()
        process.wait(5)
