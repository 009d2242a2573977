"""Tests of deploy/haproxy: headers that it strips and requests that it refuses, before a gateway gets them."""

import json
import subprocess

import httpx
import pytest

from tests.support.balancer import Two, is_openai_error, raw

HOSTILE = {
    "x-request-timeout-seconds": "0",
    "X-Request-Disconnect-Disabled": "?1",
    "serve_multiplexed_model_id": "large",
    "serve-multiplexed-model-id": "large",
    "Serve_Multiplexed-Model_Id": "large",
    "X-Session-Id": "another",
    "x_session_id": "another",
    "x-session_id": "another",
    "x_request_timeout_seconds": "0",
    "x-serve-router-kv-token-key": "k",
    "x-router-model": "large",
    "x-router-fallback": "none",
    "X-Ray-Authorization": "Bearer token",
    "x-forwarded-host": "elsewhere",
    "forwarded": "for=10.0.0.1",
}


def test_headers_that_clients_must_not_set_are_stripped(two: Two) -> None:
    """Other headers are passed on; the client's address comes from the load balancer, not from the client."""
    balancer, _ = two
    kept = {
        "authorization": "Bearer sk-1",
        "idempotency-key": "k-1",
        "openai-beta": "x",
    }
    sent = {**HOSTILE, **kept, "x-forwarded-for": "10.9.9.9"}
    seen = httpx.get(balancer.url, headers=sent).json()["headers"]
    assert not {name.lower() for name in HOSTILE} & set(seen)
    assert {name: seen[name] for name in kept} == kept
    assert (
        seen["x-forwarded-for"] == "127.0.0.1" and seen["x-forwarded-proto"] == "http"
    )


def test_an_undecodable_header_value_does_not_reach_the_gateway(two: Two) -> None:
    """Serve decodes x-request-timeout-seconds at a place where an error would leak a queue."""
    balancer, (a, b) = two
    httpx.get(
        balancer.url,
        headers=[
            (b"x-request-timeout-seconds", b"\xff"),
            (b"X-REQUEST-TIMEOUT-SECONDS", b"nan"),
        ],
    )
    (request,) = a.requests + b.requests
    assert "x-request-timeout-seconds" not in request


def test_bodies_have_a_limit(two: Two) -> None:
    """1 MiB passes; more gets a 413 and an unknown length a 411, and neither reaches a gateway."""
    balancer, gateways = two
    assert httpx.post(balancer.url, content=b"x" * 2**20).status_code == 200
    for gateway in gateways:
        gateway.requests.clear()
    assert is_openai_error(httpx.post(balancer.url, content=b"x" * (2**20 + 1)), 413)
    assert is_openai_error(httpx.post(balancer.url, content=b"x" * 2**24), 413)
    assert is_openai_error(httpx.post(balancer.url, content=iter([b"x", b"y"])), 411)
    curl = [
        "curl",
        "-s",
        "-m",
        "10",
        "--http2-prior-knowledge",
        "-T",
        "-",
        "-X",
        "POST",
        balancer.url,
    ]
    # HTTP/2 may leave the length out
    done = subprocess.run(curl, input=b"x", capture_output=True)
    assert json.loads(done.stdout)["error"]["code"] == "length_required"
    # the request is cut off: curl shows no answer, but the log does
    subprocess.run(curl, input=b"x" * 2**21, capture_output=True)
    statuses = [line["status"] for line in balancer.lines()]
    assert statuses[-5:] == [413, 413, 411, 411, 411]
    assert not any(gateway.requests for gateway in gateways)


END = b"host: x\r\nconnection: close\r\n\r\n"
URL = b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n" + END
HEADER = b"GET / HTTP/1.1\r\nx-a: " + b"a" * 20_000 + b"\r\n" + END
HEADERS = b"GET / HTTP/1.1\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(150)) + END
HEADS = [(URL, 414), (HEADER, 431), (HEADERS, 431)]


@pytest.mark.parametrize(("head", "status"), HEADS)
def test_a_head_that_is_too_large_is_refused_in_openais_shape(
    two: Two, head: bytes, status: int
) -> None:
    """A long URL, large headers and many headers. Somewhat less reaches a gateway."""
    balancer, (a, b) = two
    assert is_openai_error(raw(balancer.port, head), status)
    assert not a.requests + b.requests
    many = {f"x-{i}": "a" * 100 for i in range(80)}
    assert httpx.get(balancer.url + "/" + "a" * 4_000, headers=many).status_code == 200


def test_a_malformed_request_gets_a_400(two: Two) -> None:
    """Too large or too many headers, two lengths (smuggling) and text that is not HTTP get HAProxy's plain 400.

    HAProxy answers a request that it cannot parse before the configuration's errors apply.
    """
    balancer, gateways = two
    large = b"GET / HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 100_000 + b"\r\n\r\n"
    many = (
        b"GET / HTTP/1.1\r\nhost: x\r\n"
        + b"".join(b"x-%d: a\r\n" % i for i in range(500))
        + b"\r\n"
    )
    lengths = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 5\r\n\r\nabcde"
    for request in (large, many, lengths, b"\x00\x01\x02 nonsense\r\n\r\n"):
        assert raw(balancer.port, request).status_code == 400
    assert not any(gateway.requests for gateway in gateways)
