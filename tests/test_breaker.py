"""An arm that keeps failing is left alone, and comes back by itself."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.breaker import Breaker
from deployments.settings import BreakerSettings
from tests.fakes import failing
from tests.gateway import Gateway, eventually
from tests.test_admission import Clock


def broken(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    breaker.settings = BreakerSettings(failures=3, open_s=5, max_open_s=15)
    for _ in range(3):
        assert breaker.admits
        breaker.end("error", breaker.begin())
    return breaker


def test_a_breaker_opens_lets_one_probe_through_and_closes() -> None:
    """Open after three failures in a row, half-open after the pause, closed by a probe that succeeds."""
    clock = Clock()
    breaker = broken(clock)
    assert not breaker.admits and breaker.retry_after_s == 5
    clock.now = 5.0
    assert breaker.admits
    probe = breaker.begin()
    assert probe and not breaker.admits  # one at a time
    breaker.end("ok", probe)
    assert breaker.admits
    assert not breaker.begin() and breaker.admits  # closed: another one may come beside it


def test_a_failed_probe_doubles_the_pause_up_to_its_limit() -> None:
    """5, 10, 15, 15 seconds."""
    clock, pauses = Clock(), []
    breaker = broken(clock)
    for _ in range(4):
        pauses.append(breaker.retry_after_s)
        clock.now += breaker.retry_after_s
        breaker.end("error", breaker.begin())
    assert pauses == [5, 10, 15, 15]


def test_only_failures_in_a_row_count_and_a_client_that_left_is_none() -> None:
    """Nor is a request that was wrong itself; a probe that says nothing leaves room for another."""
    breaker = Breaker(clock := Clock())
    for status in ("error", "error", "ok", "error", "rejected", "disconnected", "error"):
        breaker.end(status, breaker.begin())
    assert breaker.admits
    breaker.end("error", False)
    assert not breaker.admits
    clock.now = 5.0
    breaker.end("disconnected", breaker.begin())
    assert breaker.admits
    breaker.begin()
    assert not breaker.admits  # it is half-open still


@pytest.mark.parametrize("status", ["ok", "error", "disconnected"])
def test_what_began_before_it_opened_changes_nothing(status: str) -> None:
    """Neither the pause nor who may come, whether the probe is out or not; the probe's own end still counts."""
    clock = Clock()
    breaker = broken(clock)
    clock.now = 6.0
    breaker.end(status, False)
    assert breaker.admits and breaker.retry_after_s == 0
    probe = breaker.begin()
    breaker.end(status, False)
    assert not breaker.admits  # the probe is out
    breaker.end("error", probe)
    assert breaker.retry_after_s == 10


def test_an_arm_that_keeps_failing_is_left_alone_and_comes_back_by_itself(gateway: Gateway) -> None:
    """Clients see no failure; while it is open the arm is not asked, and the explanation says why."""
    gateway.tune(breaker={"failures": 3, "open_s": 0.3})
    small, now = gateway.models["small"], [0.0]
    breaker = gateway.ingress.dispatcher.breakers["small"]
    breaker._clock = lambda: now[0]
    small.script = failing(RuntimeError())
    for _ in range(100):
        assert gateway.chat().status_code == 200
        if not breaker.admits:
            break
    assert not breaker.admits
    asked = len(small.calls)
    for _ in range(20):
        assert gateway.chat().status_code == 200
    assert len(small.calls) == asked  # time stands still
    answer = gateway.chat()
    found = gateway.client.get(f"/v1/router/decisions/{answer.headers['x-router-decision-id']}").json()
    assert next(m for m in found["models"] if m["arm"] == "small")["removed_by"].startswith("its circuit breaker")
    named = gateway.chat(model="small")
    assert named.status_code == 503 and int(named.headers["retry-after"]) >= 1
    small.script = None
    now[0] = 0.4
    assert gateway.chat(model="small").status_code == 200


def test_a_probe_that_has_begun_to_answer_lets_the_others_in(gateway: Gateway) -> None:
    """They do not wait for the end of its stream; should it break off, that is one failure more."""
    gateway.tune(breaker={"failures": 1, "open_s": 0.2})
    small, seen, breaker = gateway.models["small"], list[bool](), gateway.ingress.dispatcher.breakers["small"]
    small.script, now = failing(RuntimeError()), [0.0]
    breaker._clock = lambda: now[0]
    gateway.chat(model="small")
    eventually(lambda: not breaker.admits)
    assert gateway.chat(model="small").status_code == 503
    now[0] = 0.3

    async def streams(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        yield b"data: 1\n\n", None
        seen.append(breaker.admits)
        raise RuntimeError

    small.script = streams
    assert '"server_error"' in gateway.chat(model="small", stream=True).text
    assert seen == [True]
    eventually(lambda: not breaker.admits)


def test_when_every_breaker_is_open_the_client_hears_when_to_come_back(gateway: Gateway) -> None:
    """A 503 at once; nobody is asked."""
    for model in gateway.models.values():
        model.script = failing(RuntimeError())
    breakers = [gateway.ingress.dispatcher.breakers[name] for name in ("small", "large")]
    for _ in range(3):
        assert gateway.chat().status_code == 503
    eventually(lambda: not any(breaker.admits for breaker in breakers))
    asked = sum(len(model.calls) for model in gateway.models.values())
    assert asked == 8  # three requests and a check each
    answer = gateway.chat()
    assert answer.status_code == 503 and sum(len(model.calls) for model in gateway.models.values()) == asked
    assert answer.headers["retry-after"] == "5" and answer.json()["error"]["code"] == "model_unavailable"
