"""Circuit breaker: an arm that keeps failing gets no requests until a probe succeeds."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.dispatch.circuit_breaker import Breaker
from deployments.settings import BreakerSettings
from policies.constraints import Exclusion
from tests.deployments.dispatch.test_admission import Clock
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually


def open_breaker(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    breaker.settings = BreakerSettings(
        failure_threshold=3, cooldown_s=5, max_cooldown_s=15
    )
    for _ in range(3):
        assert breaker.admits
        breaker.end("error", breaker.begin())
    return breaker


def test_breaker_opens_admits_one_probe_and_closes() -> None:
    """Three failures in a row open it, after the pause it is half-open, and a successful probe closes it."""
    clock = Clock()
    breaker = open_breaker(clock)
    assert not breaker.admits and breaker.retry_after_s == 5
    clock.now = 5.0
    assert breaker.admits
    probe = breaker.begin()
    assert probe and not breaker.admits  # one probe at a time
    breaker.end("ok", probe)
    assert breaker.admits
    # closed: a second request is admitted beside the first
    assert not breaker.begin() and breaker.admits


def test_a_failed_probe_doubles_the_pause_up_to_the_maximum() -> None:
    clock = Clock()
    pauses = []
    breaker = open_breaker(clock)
    for _ in range(4):
        pauses.append(breaker.retry_after_s)
        clock.now += breaker.retry_after_s
        breaker.end("error", breaker.begin())
    assert pauses == [5, 10, 15, 15]


def test_only_errors_in_a_row_open_the_breaker() -> None:
    """Rejected and disconnected requests do not count. A probe that ends so makes room for another probe."""
    breaker = Breaker(clock := Clock())
    for status in (
        "error",
        "error",
        "ok",
        "error",
        "rejected",
        "disconnected",
        "error",
    ):
        breaker.end(status, breaker.begin())
    assert breaker.admits
    breaker.end("error", False)
    assert not breaker.admits
    clock.now = 5.0
    breaker.end("disconnected", breaker.begin())
    assert breaker.admits
    breaker.begin()
    assert not breaker.admits  # still half-open


@pytest.mark.parametrize("status", ["ok", "error", "disconnected"])
def test_requests_from_before_the_opening_do_not_change_the_breaker(
    status: str,
) -> None:
    """Their results change neither the pause nor what is admitted, with or without a probe under way."""
    clock = Clock()
    breaker = open_breaker(clock)
    clock.now = 6.0
    breaker.end(status, False)
    assert breaker.admits and breaker.retry_after_s == 0
    probe = breaker.begin()
    breaker.end(status, False)
    assert not breaker.admits  # the probe is under way
    breaker.end("error", probe)
    assert breaker.retry_after_s == 10


def test_failing_arm_gets_no_requests_until_a_probe_succeeds(
    gateway: Gateway,
) -> None:
    """Clients see no failure. While the breaker is open, the decision's explanation names it as the reason."""
    gateway.tune(breaker={"failure_threshold": 3, "cooldown_s": 0.3})
    small = gateway.models["small"]
    now = [0.0]
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
    assert len(small.calls) == asked  # the pause has not ended
    answer = gateway.chat()
    found = gateway.client.get(
        f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    ).json()
    removed_by = next(m for m in found["models"] if m["arm"] == "small")["removed_by"]
    assert removed_by == Exclusion.CIRCUIT_OPEN.sentence()
    named = gateway.chat(model="small")
    assert named.status_code == 503 and int(named.headers["retry-after"]) >= 1
    small.script = None
    now[0] = 0.4
    assert gateway.chat(model="small").status_code == 200


def test_breaker_closes_when_the_probe_begins_to_answer(gateway: Gateway) -> None:
    """Other requests do not wait for the end of its stream. If the stream breaks off, that counts as a failure."""
    gateway.tune(breaker={"failure_threshold": 1, "cooldown_s": 0.2})
    small = gateway.models["small"]
    seen: list[bool] = []
    breaker = gateway.ingress.dispatcher.breakers["small"]
    small.script = failing(RuntimeError())
    now = [0.0]
    breaker._clock = lambda: now[0]
    gateway.chat(model="small")
    eventually(lambda: not breaker.admits)
    assert gateway.chat(model="small").status_code == 503
    now[0] = 0.3

    async def streams(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        yield b"data: 1\n\n", None
        seen.append(breaker.admits)
        raise RuntimeError

    small.script = streams
    assert '"server_error"' in gateway.chat(model="small", stream=True).text
    assert seen == [True]
    eventually(lambda: not breaker.admits)


def test_open_breakers_of_all_arms_give_a_503_with_retry_after(
    gateway: Gateway,
) -> None:
    """The error comes at once, and no arm is asked."""
    for model in gateway.models.values():
        model.script = failing(RuntimeError())
    breakers = [
        gateway.ingress.dispatcher.breakers[name] for name in ("small", "large")
    ]
    for _ in range(3):
        assert gateway.chat().status_code == 503
    eventually(lambda: not any(breaker.admits for breaker in breakers))
    asked = sum(len(model.calls) for model in gateway.models.values())
    assert asked == 8  # three requests and a check each
    answer = gateway.chat()
    assert (
        answer.status_code == 503
        and sum(len(model.calls) for model in gateway.models.values()) == asked
    )
    assert (
        answer.headers["retry-after"] == "5"
        and answer.json()["error"]["code"] == "model_unavailable"
    )
