"""deploy/haproxy: what the load balancer promises, by Debian's HAProxy in front of two small servers."""

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import errors
from tests.balancer import CHUNKS, PAUSE_S, Balancer, FakeGateway, balanced, within

CHECK_S = 2 * 1.0  # `inter 1s fall 2 rise 2`
Two = tuple[Balancer, list[FakeGateway]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with balanced(tmp_path_factory.mktemp("balancer")) as made:
        yield made


@pytest.fixture
def two(shared: Two) -> Iterator[Two]:
    """With both gateways up and ready, whatever the test before did."""
    balancer, gateways = shared
    within(10, lambda: set(balancer.names()) == {"a", "b"})
    for gateway in gateways:
        gateway.requests.clear()
    yield shared
    for gateway in gateways:
        gateway.ready = True


def is_openai_error(answer: httpx.Response, status: int) -> bool:
    """The status, and the same keys and type as the gateway's own errors have."""
    error, ours = answer.json()["error"], errors.body(status, "")["error"]
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code == status and set(error) == set(ours) and error["type"] == ours["type"]


def stream(url: str) -> list[tuple[float, str]]:
    """Seconds since the request, and event, of every event of a stream as it arrives."""
    began, found = time.monotonic(), []
    with httpx.stream("GET", url + "/stream", timeout=30) as answer:
        for line in answer.iter_lines():
            if line:
                found.append((time.monotonic() - began, line))
    return found


def test_requests_are_balanced(two: Two) -> None:
    """Evenly when one follows the other, and streams that last, by how many each has."""
    balancer, _ = two
    named = Counter(balancer.names(20))
    assert min(named["a"], named["b"]) >= 8
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(stream(balancer.url)[0][1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(found) == {"data: a 0": 4, "data: b 0": 4}


def test_a_gateway_that_is_not_ready_is_taken_out_and_comes_back(two: Two) -> None:
    """Within its two checks each; what it streams meanwhile comes to its end."""
    balancer, (_, b) = two
    streams: list[list[tuple[float, str]]] = []
    threads = [threading.Thread(target=lambda: streams.append(stream(balancer.url))) for _ in range(2)]
    for thread in threads:
        thread.start()
    within(2, lambda: sum(r[":path"] == "/stream" for r in b.requests) == 1)
    b.ready = False
    within(CHECK_S + 2, lambda: set(balancer.names()) == {"a"})
    for thread in threads:
        thread.join()
    assert sorted(len(s) for s in streams) == [CHUNKS, CHUNKS]
    b.ready = True
    within(CHECK_S + 2, lambda: set(balancer.names()) == {"a", "b"})


def test_no_request_is_lost_when_a_gateway_dies(two: Two) -> None:
    """One that cannot be connected to is asked once more, elsewhere."""
    balancer, (a, _) = two
    a.kill()
    try:
        assert balancer.names(30) == ["b"] * 30
    finally:
        a.start()


def test_draining_ends_new_requests_and_lets_streams_end(two: Two) -> None:
    """By the admin socket, as the configuration's head says."""
    balancer, (a, b) = two
    streams: list[list[tuple[float, str]]] = []
    threads = [threading.Thread(target=lambda: streams.append(stream(balancer.url))) for _ in range(2)]
    for thread in threads:
        thread.start()
    within(2, lambda: len(a.requests) == len(b.requests) == 1)
    balancer.command("set server gateways/a state drain")
    assert balancer.names(10) == ["b"] * 10
    for thread in threads:
        thread.join()
    assert [len(s) for s in streams] == [CHUNKS, CHUNKS]
    balancer.command("set server gateways/a state ready")
    within(2, lambda: set(balancer.names()) == {"a", "b"})


HOSTILE = {
    "x-request-timeout-seconds": "0",
    "X-Request-Disconnect-Disabled": "?1",
    "serve_multiplexed_model_id": "large",
    "serve-multiplexed-model-id": "large",
    "Serve_Multiplexed-Model_Id": "large",
    "X-Session-Id": "somebody",
    "x-serve-router-kv-token-key": "k",
    "x-router-model": "large",
    "x-router-fallback": "none",
    "X-Ray-Authorization": "Bearer token",
    "x-forwarded-host": "elsewhere",
    "forwarded": "for=10.0.0.1",
}


def test_headers_that_clients_must_not_set_are_stripped(two: Two) -> None:
    """And those that they need stay; the client's address is the balancer's word, not the client's."""
    balancer, _ = two
    kept = {"authorization": "Bearer sk-1", "idempotency-key": "k-1", "openai-beta": "x"}
    sent = {**HOSTILE, **kept, "x-forwarded-for": "10.9.9.9"}
    seen = httpx.get(balancer.url, headers=sent).json()["headers"]
    assert not {name.lower() for name in HOSTILE} & set(seen)
    assert {name: seen[name] for name in kept} == kept
    assert seen["x-forwarded-for"] == "127.0.0.1" and seen["x-forwarded-proto"] == "http"


def test_an_undecodable_header_value_does_not_reach_the_gateway(two: Two) -> None:
    """Serve decodes x-request-timeout-seconds where an error leaks a queue."""
    balancer, (a, b) = two
    httpx.get(balancer.url, headers=[(b"x-request-timeout-seconds", b"\xff"), (b"X-REQUEST-TIMEOUT-SECONDS", b"nan")])
    (request,) = a.requests + b.requests
    assert "x-request-timeout-seconds" not in request


def test_bodies_have_a_limit(two: Two) -> None:
    """1 MiB passes; more is a 413, and an unknown length a 411: neither reaches a gateway."""
    balancer, gateways = two
    assert httpx.post(balancer.url, content=b"x" * 2**20).status_code == 200
    for gateway in gateways:
        gateway.requests.clear()
    assert is_openai_error(httpx.post(balancer.url, content=b"x" * (2**20 + 1)), 413)
    assert is_openai_error(httpx.post(balancer.url, content=b"x" * 2**24), 413)
    assert is_openai_error(httpx.post(balancer.url, content=iter([b"x", b"y"])), 411)
    curl = ["curl", "-s", "-m", "10", "--http2-prior-knowledge", "-T", "-", "-X", "POST", balancer.url]
    done = subprocess.run(curl, input=b"x", capture_output=True)  # HTTP/2 may leave the length out
    assert json.loads(done.stdout)["error"]["code"] == "length_required"
    subprocess.run(curl, input=b"x" * 2**21, capture_output=True)  # cut off: curl shows no answer, but the log does
    statuses = [line["status"] for line in balancer.lines()]
    assert statuses[-5:] == [413, 413, 411, 411, 411]
    assert not any(gateway.requests for gateway in gateways)


def test_streams_pass_chunk_by_chunk(two: Two) -> None:
    """The first arrives at once, and no two together."""
    balancer, _ = two
    times = [t for t, _ in stream(balancer.url)]
    assert len(times) == CHUNKS and times[0] < times[-1] / 2 and times[-1] > (CHUNKS - 1) * PAUSE_S * 0.9
    assert min(later - earlier for earlier, later in pairwise(times)) > PAUSE_S / 4


def test_connections_to_the_gateways_are_reused(two: Two) -> None:
    """Twenty requests of one client need no twenty connections."""
    balancer, gateways = two
    before = sum(gateway.connections for gateway in gateways)
    balancer.names(20)
    assert sum(gateway.connections for gateway in gateways) - before <= 4


def test_a_client_that_leaves_is_noticed_by_the_gateway(two: Two) -> None:
    """Within two seconds, before the first byte too, so that the engine is freed."""
    balancer, gateways = two
    before = sum(gateway.left for gateway in gateways)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(balancer.url + "/never", timeout=0.5)
    within(2, lambda: sum(gateway.left for gateway in gateways) == before + 1)


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
def test_the_request_id_is_passed_on_and_back_and_logged(two: Two, sent: list[str], kept: bool) -> None:
    """The client's if it is harmless, else a new one; the log's line is JSON and carries it."""
    balancer, _ = two
    answer = httpx.get(balancer.url + "/v1/x?secret=1", headers=[("x-request-id", value) for value in sent])
    request_id = answer.headers["x-request-id"]
    assert answer.json()["headers"]["x-request-id"] == request_id
    assert (request_id == sent[0]) if kept else (len(request_id) == 36)
    within(2, lambda: balancer.logged(request_id))
    line = balancer.logged(request_id)[-1]
    assert line["status"] == 200 and line["path"] == "/v1/x" and line["server"] in ("a", "b")


def test_a_gateway_that_breaks_off_is_a_502_if_the_other_does_so_too(two: Two) -> None:
    """Asked three times in all: what breaks gateways must not go round for ever."""
    balancer, (a, b) = two
    answer = httpx.post(balancer.url + "/break", json={})
    assert is_openai_error(answer, 502) and answer.headers["retry-after"] == "1"
    assert a.requests and b.requests and len(a.requests + b.requests) == 3
    assert answer.headers["x-request-id"]


def test_a_gateway_that_dies_before_it_answers_costs_no_request(two: Two) -> None:
    """The other one gets it, the same in all."""
    balancer, (a, b) = two
    for _ in range(4):
        answer = httpx.post(balancer.url + "/break/a", json={"x": 1})
        assert answer.status_code == 200 and answer.json()["name"] == "b"
    assert a.requests and len(b.requests) == 4
    assert b.requests[0]["content-length"] == a.requests[0]["content-length"]


def test_no_gateway_at_all_is_a_503(two: Two) -> None:
    """With Retry-After, and at once."""
    balancer, gateways = two
    for gateway in gateways:
        gateway.ready = False
    within(CHECK_S + 2, lambda: httpx.get(balancer.url).status_code == 503)
    began = time.monotonic()
    answer = httpx.get(balancer.url)
    assert is_openai_error(answer, 503) and answer.headers["retry-after"] == "5"
    assert time.monotonic() - began < 1.0


def raw(port: int, *parts: bytes, pause_s: float = 0.0) -> httpx.Response:
    """The answer to bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", port), 15) as s:
        with contextlib.suppress(BrokenPipeError):  # it has heard enough
            for part in parts:
                s.sendall(part)
                time.sleep(pause_s)
        received = b"".join(iter(lambda: s.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines[1:]]
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)  # type: ignore[arg-type]


def test_what_is_no_request_is_a_400(two: Two) -> None:
    """Headers larger than its buffer, too many of them, two lengths (smuggling), no HTTP; in HAProxy's own words, for
    what cannot be parsed is answered before the configuration's errors apply.
    """
    balancer, gateways = two
    large = b"GET / HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 100_000 + b"\r\n\r\n"
    many = b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(500)) + b"\r\n"
    lengths = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nabcde"
    for request in (large, many, lengths, b"\x00\x01\x02 nonsense\r\n\r\n"):
        assert raw(balancer.port, request).status_code == 400
    assert not any(gateway.requests for gateway in gateways)


def test_timeouts_are_errors_of_openais_shape(tmp_path: Path) -> None:
    """504 for a gateway that is silent, 408 for a body that trickles in; made quicker here."""
    changes = {"timeout server 660s": "timeout server 1s", "wait-for-body time 10s": "wait-for-body time 1s"}
    with balanced(tmp_path, changes) as (balancer, gateways):
        answer = httpx.get(balancer.url + "/never", timeout=10)
        assert is_openai_error(answer, 504) and answer.headers["retry-after"] == "5"
        slow = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
        assert is_openai_error(raw(balancer.port, slow, *[b"x"] * 4, pause_s=0.5), 408)
        assert [r[":path"] for g in gateways for r in g.requests] == ["/never"]


def test_tls_as_the_configuration_says(tmp_path: Path) -> None:
    """The line in its head, with HTTP/2 for clients that speak it."""
    pem = tmp_path / "site.pem"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    done = subprocess.run([*new, "-keyout", "-", "-out", "-"], capture_output=True, check=True)
    pem.write_bytes(done.stdout)
    line = '    bind "${LISTEN}" ssl crt ' + str(pem) + " alpn h2,http/1.1"
    with balanced(tmp_path, {'    bind "${LISTEN}"': line}) as (balancer, _):
        url = f"https://127.0.0.1:{balancer.port}"
        assert httpx.get(url, verify=False).json()["headers"]["x-forwarded-proto"] == "https"
        curl = ["curl", "-sk", "-m", "10", "-o", "/dev/null", "-w", "%{http_version} %{http_code}", url]
        assert subprocess.run(curl, capture_output=True, text=True).stdout == "2 200"


def test_haproxys_metrics_are_on_a_port_of_their_own(two: Two) -> None:
    """For Prometheus; the public port has none."""
    balancer, _ = two
    text = httpx.get(f"http://127.0.0.1:{balancer.metrics_port}/metrics").text
    for metric in ("haproxy_server_status", "haproxy_backend_http_responses_total", "haproxy_backend_active_servers"):
        assert metric in text
    answer: Any = httpx.get(balancer.url + "/metrics").json()
    assert answer["name"] in ("a", "b")  # passed on like any path
