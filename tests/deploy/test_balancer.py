"""Tests of deploy/haproxy with Debian's HAProxy in front of two small servers: balancing, draining, dying gateways."""

import contextlib
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.balancer import (
    CHUNKS,
    Balancer,
    FakeGateway,
    Two,
    balanced,
    is_openai_error,
    raw,
    within,
)

CHECK_S = 2 * 1.0  # `inter 1s fall 2 rise 2`


@contextmanager
def held_streams(
    balancer: Balancer, gateways: list[FakeGateway], count: int
) -> Iterator[list[list[str]]]:
    """Open streams one after the other; they end after the block, in which the list of read streams is empty."""
    streams: list[list[str]] = []
    threads = []
    for gateway in gateways:
        gateway.holds_streams = True
    try:
        for opened in range(1, count + 1):
            thread = threading.Thread(
                target=lambda: streams.append(stream(balancer.url))
            )
            thread.start()
            threads.append(thread)
            within(60, partial(have_streams, gateways, opened))
        yield streams
    finally:
        for gateway in gateways:
            gateway.holds_streams = False
        for thread in threads:
            thread.join()


def streams_of(gateway: FakeGateway) -> int:
    """Number of streams that were asked of a gateway."""
    return sum(request[":path"] == "/stream" for request in gateway.requests)


def have_streams(gateways: list[FakeGateway], count: int) -> bool:
    """Whether this number of streams was asked of all gateways together."""
    return sum(map(streams_of, gateways)) == count


def stream(url: str) -> list[str]:
    """Read a stream; returns the text of each event."""
    with httpx.stream("GET", url + "/stream", timeout=120) as answer:
        return [line for line in answer.iter_lines() if line]


def test_requests_are_balanced(two: Two) -> None:
    """Successive requests are spread evenly, and concurrent streams by the number that each gateway has."""
    balancer, gateways = two
    named = Counter(balancer.names(20))
    assert min(named["a"], named["b"]) >= 8
    with held_streams(balancer, gateways, 8) as streams:
        assert [streams_of(gateway) for gateway in gateways] == [4, 4]
    assert Counter(s[0] for s in streams) == {"data: a 0": 4, "data: b 0": 4}


def test_a_gateway_that_is_not_ready_is_taken_out_and_comes_back(two: Two) -> None:
    """A gateway is removed and restored after two checks each; its running streams finish."""
    balancer, (a, b) = two
    with held_streams(balancer, [a, b], 2) as streams:
        assert streams_of(b) == 1
        b.ready = False
        within(60, lambda: set(balancer.names()) == {"a"})
        assert not streams
    assert sorted(len(s) for s in streams) == [CHUNKS, CHUNKS]
    b.ready = True
    within(60, lambda: set(balancer.names()) == {"a", "b"})


def test_no_request_is_lost_when_a_gateway_dies(two: Two) -> None:
    """A request whose gateway refuses the connection is sent to the other one."""
    balancer, (a, _) = two
    a.kill()
    try:
        assert balancer.names(30) == ["b"] * 30
    finally:
        a.start()


def test_draining_ends_new_requests_and_lets_streams_end(two: Two) -> None:
    """Draining uses the admin socket, as the head of the configuration describes."""
    balancer, (a, b) = two
    with held_streams(balancer, [a, b], 2) as streams:
        assert streams_of(a) == streams_of(b) == 1
        balancer.command("set server gateways/a state drain")
        assert balancer.names(10) == ["b"] * 10
        assert not streams
    assert [len(s) for s in streams] == [CHUNKS, CHUNKS]
    balancer.command("set server gateways/a state ready")
    within(60, lambda: set(balancer.names()) == {"a", "b"})


def test_streams_pass_chunk_by_chunk(two: Two) -> None:
    """A gateway sends each chunk only after the client has read the one before."""
    balancer, gateways = two
    seen = 0
    try:
        for gateway in gateways:
            gateway.may_send = 1
        with httpx.stream("GET", balancer.url + "/stream", timeout=60) as answer:
            for line in answer.iter_lines():
                seen += bool(line)
                for gateway in gateways:
                    gateway.may_send = seen + 1
    finally:
        for gateway in gateways:
            gateway.may_send = inf
    assert seen == CHUNKS


def test_connections_to_the_gateways_are_reused(two: Two) -> None:
    """Twenty requests of one client need at most four connections."""
    balancer, gateways = two
    before = sum(gateway.connections for gateway in gateways)
    balancer.names(20)
    assert sum(gateway.connections for gateway in gateways) - before <= 4


def test_the_gateway_notices_a_client_that_disconnects(two: Two) -> None:
    """The gateway notices it before the first byte, too, so that the engine is freed."""
    balancer, gateways = two
    before = sum(gateway.left for gateway in gateways)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(balancer.url + "/never", timeout=0.5)
    within(60, lambda: sum(gateway.left for gateway in gateways) == before + 1)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (["abc-1.2_3"], True),
        ([], False),
        (["a" * 65], False),
        (['x","status":200'], False),
        (["a", "b"], False),
        (["a,b"], False),
    ],
)
def test_the_request_id_is_passed_on_and_back_and_logged(
    two: Two, sent: list[str], kept: bool
) -> None:
    """A harmless id of the client is used, else a new one; the log line is JSON and contains it."""
    balancer, _ = two
    answer = httpx.get(
        balancer.url + "/v1/x?secret=1",
        headers=[("x-request-id", value) for value in sent],
    )
    request_id = answer.headers["x-request-id"]
    assert answer.json()["headers"]["x-request-id"] == request_id
    assert (request_id == sent[0]) if kept else (len(request_id) == 36)
    within(60, lambda: balancer.logged(request_id))
    line = balancer.logged(request_id)[-1]
    assert (
        line["status"] == 200
        and line["path"] == "/v1/x"
        and line["server"] in ("a", "b")
    )


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_request_that_kills_its_gateway_reaches_no_second_one(
    two: Two, method: str
) -> None:
    """It may have had an effect, and it may be what killed the gateway.

    If the connection to the gateway was used before, HAProxy closes that of the client in place of an error.
    """
    balancer, (a, b) = two
    with contextlib.suppress(httpx.RemoteProtocolError):
        answer = httpx.request(method, balancer.url + "/break", json={})
        assert is_openai_error(answer, 502) and answer.headers["retry-after"] == "1"
        assert answer.headers["x-request-id"]
    assert len(a.requests + b.requests) == 1


def test_a_read_that_both_gateways_break_off_gets_a_502(two: Two) -> None:
    """A GET is sent three times in all."""
    balancer, (a, b) = two
    answer = httpx.get(balancer.url + "/break")
    assert is_openai_error(answer, 502) and answer.headers["retry-after"] == "1"
    assert a.requests and b.requests and len(a.requests + b.requests) == 3


def test_a_gateway_that_dies_before_it_answers_loses_no_read(two: Two) -> None:
    """The other gateway gets the same request."""
    balancer, (a, b) = two
    for _ in range(4):
        answer = httpx.get(balancer.url + "/break/a")
        assert answer.status_code == 200 and answer.json()["name"] == "b"
    assert a.requests and len(b.requests) == 4


def test_a_refused_connection_is_tried_at_the_other_gateway(two: Two) -> None:
    """No gateway has seen the request, so a POST may be sent again, too."""
    balancer, (a, b) = two
    a.kill()
    try:
        for _ in range(6):
            answer = httpx.post(balancer.url, json={"x": 1})
            assert answer.status_code == 200 and answer.json()["name"] == "b"
    finally:
        a.start()
    assert len(b.requests) == 6


def test_no_gateway_at_all_is_a_503(two: Two) -> None:
    """The 503 comes at once and has a Retry-After."""
    balancer, gateways = two
    for gateway in gateways:
        gateway.ready = False
    within(60, lambda: httpx.get(balancer.url).status_code == 503)
    answer = httpx.get(balancer.url, timeout=60)
    assert is_openai_error(answer, 503) and answer.headers["retry-after"] == "5"


def test_timeouts_are_errors_of_openais_shape(tmp_path: Path) -> None:
    """A silent gateway gives a 504, a slow body a 408; the timeouts are shortened here."""
    changes = {
        "timeout server 660s": "timeout server 1s",
        "wait-for-body time 10s": "wait-for-body time 1s",
    }
    with balanced(tmp_path, changes) as (balancer, gateways):
        answer = httpx.get(balancer.url + "/never", timeout=10)
        assert is_openai_error(answer, 504) and answer.headers["retry-after"] == "5"
        slow = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
        assert is_openai_error(raw(balancer.port, slow, *[b"x"] * 4, pause_s=0.5), 408)
        assert [r[":path"] for g in gateways for r in g.requests] == ["/never"]


def test_tls_as_the_configuration_describes_it(tmp_path: Path) -> None:
    """The line in its head enables TLS, and HTTP/2 for clients that support it."""
    pem = tmp_path / "site.pem"
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    done = subprocess.run(
        [*new, "-keyout", "-", "-out", "-"], capture_output=True, check=True
    )
    pem.write_bytes(done.stdout)
    line = '    bind "${LISTEN}" ssl crt ' + str(pem) + " alpn h2,http/1.1"
    with balanced(tmp_path, {'    bind "${LISTEN}"': line}) as (balancer, _):
        url = f"https://127.0.0.1:{balancer.port}"
        assert (
            httpx.get(url, verify=False).json()["headers"]["x-forwarded-proto"]
            == "https"
        )
        curl = [
            "curl",
            "-sk",
            "-m",
            "10",
            "-o",
            "/dev/null",
            "-w",
            "%{http_version} %{http_code}",
            url,
        ]
        assert subprocess.run(curl, capture_output=True, text=True).stdout == "2 200"


def test_the_metrics_of_haproxy_are_on_a_separate_port(two: Two) -> None:
    """Prometheus reads that port; the public port has no metrics."""
    balancer, _ = two
    text = httpx.get(f"http://127.0.0.1:{balancer.metrics_port}/metrics").text
    for metric in (
        "haproxy_server_status",
        "haproxy_backend_http_responses_total",
        "haproxy_backend_active_servers",
    ):
        assert metric in text
    answer: Any = httpx.get(balancer.url + "/metrics").json()
    assert answer["name"] in ("a", "b")  # passed on like any path
