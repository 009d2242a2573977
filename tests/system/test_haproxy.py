"""Serve's HAProxy in front of the running system: the addresses it listens at, bodies, headers, disconnects."""

import time
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.serving.saturation import END_TOKEN
from deployments.operations import haproxy
from deployments.operations.launcher import MARK

pytestmark = pytest.mark.live


def processes(system: str) -> list[psutil.Process]:
    """All processes of the system, found by the mark of the one that listens at its port."""
    port = int(system.rpartition(":")[2])
    held = [
        c.pid
        for c in psutil.net_connections("tcp")
        if c.laddr.port == port and c.status == psutil.CONN_LISTEN
    ]
    mark = psutil.Process(held[0]).environ()[MARK]
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if process.environ().get(MARK) == mark else []
        except psutil.Error:
            continue
    return found


def outcome(system: str, decision_id: str) -> dict[str, Any]:
    """Wait for the outcome of a decision."""
    for _ in range(600):
        found = httpx.get(f"{system}/v1/router/decisions/{decision_id}", timeout=30)
        if found.status_code == 200 and found.json()["outcome"]:
            result: dict[str, Any] = found.json()["outcome"]
            return result
        time.sleep(0.1)
    raise AssertionError(f"no outcome of {decision_id}")


def test_haproxy_is_in_front_and_all_of_it_is_on_loopback(system: str) -> None:
    """The gateway, HAProxy's metrics and statistics, the ingress replicas, the fallback proxy."""
    of_system = {process.pid: process.name() for process in processes(system)}
    assert "haproxy" in of_system.values()
    listening = [
        c
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.pid in of_system
    ]
    offset = int(system.rpartition(":")[2]) - 8000
    assert set(haproxy.ports(offset).values()) <= {c.laddr.port for c in listening}
    first, count = haproxy.REPLICA_PORTS
    ours = {
        8000 + offset,
        *haproxy.ports(offset).values(),
        *range(first + offset, first + offset + count),
    }
    assert any(c.laddr.port >= first for c in listening)
    assert {c.laddr.ip for c in listening if c.laddr.port in ours} == {"127.0.0.1"}


def test_a_large_body_comes_through_whole(system: str) -> None:
    """The body has a third of a megabyte, far more than HAProxy's buffer, and the answer is larger still."""
    texts = [f"text number {i} " + "word " * 200 for i in range(350)]
    answer = httpx.post(
        f"{system}/v1/embeddings", json={"model": "auto", "input": texts}, timeout=120
    )
    assert answer.status_code == 200, answer.text[:500]
    assert len(answer.json()["data"]) == len(texts) and len(answer.content) > 500_000


def test_answers_carry_the_request_id_of_the_client(system: str) -> None:
    """So do errors. Without an id of the client, Serve makes one."""
    ask: dict[str, Any] = {
        "model": "nano",
        "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
    }
    for body in (ask, {**ask, "model": "unknown"}):
        answer = httpx.post(
            f"{system}/v1/chat/completions",
            json=body,
            headers={"x-request-id": "mine-7"},
            timeout=60,
        )
        assert answer.headers["x-request-id"] == "mine-7"
    assert httpx.get(f"{system}/healthz").headers["x-request-id"]


@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_when_the_client_disconnects(system: str, stream: bool) -> None:
    """The outcome is `disconnected`, and no request stays in flight."""
    ask = "Tom has 347 coins. Tom buys 6 bags with 586 coins in each. How many coins does Tom have now?"
    body: dict[str, Any] = {
        "model": "large",
        "messages": [{"role": "user", "content": ask}],
        "max_tokens": 300,
    }
    # no end of the answer: on a busy machine a short one ends before the disconnect is noticed
    body["logit_bias"] = {END_TOKEN: -100}
    if stream:
        with httpx.stream(
            "POST",
            f"{system}/v1/chat/completions",
            json={**body, "stream": True},
            timeout=60,
        ) as answer:
            next(answer.iter_bytes())
            decision_id = answer.headers["x-router-decision-id"]
        assert outcome(system, decision_id)["status"] == "disconnected"
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{system}/v1/chat/completions",
                json=body,
                timeout=httpx.Timeout(5.0, read=0.1),
            )
    for _ in range(600):
        state = httpx.get(f"{system}/v1/router/state", timeout=30).json()["models"][
            "large"
        ]
        if state["in_flight"] == 0:
            return
        httpx.post(
            f"{system}/v1/chat/completions", json={**body, "model": "nano"}, timeout=60
        )  # its report carries the number of requests in flight
        time.sleep(0.1)
    raise AssertionError(f"{state['in_flight']} stay in flight")
