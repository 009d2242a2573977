"""Admission control: queues are bounded and ordered by priority, and a failed request is sent to one other arm."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.dispatch.admission import (
    BATCH,
    HIGH,
    NORMAL,
    AdmissionControl,
    FullError,
    ModelQueue,
)
from deployments.models.report import ModelReport
from deployments.settings import AdmissionSettings
from tests.support import clock
from tests.support.fakes import failing
from tests.support.gateway import Gateway

Script = Callable[[str, dict[str, Any]], AsyncIterator[tuple[bytes, Any]]]
REPORT = ModelReport(7, 2, "stop")


def takes(seconds: float, slots: int = 10**6) -> Script:
    """A model script that answers after a time, for at most `slots` requests at once."""
    free = asyncio.Semaphore(slots)

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        async with free:
            await asyncio.sleep(seconds)
        yield b"{}", REPORT

    return script


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_queue(clock: Clock, **limits: Any) -> ModelQueue:
    made = ModelQueue(clock)
    made.settings = AdmissionSettings.model_validate(limits)
    return made


# --- queues --------------------------------------------------------------------------------------------------------


async def test_queue_serves_by_priority_then_by_arrival() -> None:
    async def run() -> list[str]:
        one = make_queue(Clock(), max_running=1, max_queued=20)
        served = []
        entered = await one.enter(NORMAL)

        async def come(name: str, rank: int) -> None:
            mine = await one.enter(rank)
            served.append(name)
            one.leave(mine)

        arrivals = (
            ("b1", BATCH),
            ("n1", NORMAL),
            ("b2", BATCH),
            ("h1", HIGH),
            ("n2", NORMAL),
        )
        tasks = [asyncio.create_task(come(*arrival)) for arrival in arrivals]
        await asyncio.sleep(0)
        one.leave(entered)
        await asyncio.gather(*tasks)
        assert (one.running, one.waiting) == (0, 0)
        return served

    assert (await run()) == ["h1", "n1", "n2", "b1", "b2"]


async def test_queue_keeps_room_for_higher_priorities() -> None:
    """Batch work may fill half of a queue, normal requests three quarters, and high priority all of it."""

    async def run() -> list[int]:
        one = make_queue(Clock(), max_running=1, max_queued=8)
        await one.enter(NORMAL)
        tasks = []
        waiting = []
        for rank in (BATCH, NORMAL, HIGH):
            tasks += [asyncio.create_task(one.enter(rank)) for _ in range(9)]
            await asyncio.sleep(0)
            waiting.append(one.waiting)
        refused = [
            task
            for task in tasks
            if task.done() and isinstance(task.exception(), FullError)
        ]
        assert len(refused) == 27 - 8
        for task in tasks:
            task.cancel()
        return waiting

    assert (await run()) == [4, 6, 8]


async def test_queue_refuses_a_request_whose_expected_wait_is_too_long() -> None:
    """Two slots are held for ten seconds each, so the fourth waiting request would wait 20 s."""

    clock = Clock()
    one = make_queue(clock, max_running=2, max_queued=100, max_queue_wait_s=18)
    entered = [await one.enter(NORMAL), await one.enter(NORMAL)]
    clock.now = 10.0
    for mine in entered:
        one.leave(mine)
    await one.enter(NORMAL)
    await one.enter(NORMAL)
    tasks = [asyncio.create_task(one.enter(NORMAL)) for _ in range(3)]
    await asyncio.sleep(0)
    assert one.waiting == 3 and one.wait_s(HIGH) == 5.0
    with pytest.raises(FullError) as refused:
        await one.enter(NORMAL)
    assert refused.value.retry_after_s == pytest.approx(20.0)
    for task in tasks:
        task.cancel()


def test_queue_refuses_a_request_after_the_maximum_wait() -> None:
    """The expected wait was shorter."""

    async def run() -> None:
        one = make_queue(Clock(), max_running=1, max_queue_wait_s=30)
        loop = asyncio.get_running_loop()
        await one.enter(NORMAL)
        began = loop.time()
        with pytest.raises(FullError):
            await one.enter(HIGH)
        assert loop.time() - began == pytest.approx(30) and one.waiting == 0

    clock.run(run())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["come", "leave", "cancel", "tick"]), st.integers(0, 2)
        ),
        max_size=60,
    )
)
@settings(max_examples=150, deadline=None)
def test_queue_never_loses_a_slot(steps: list[tuple[str, int]]) -> None:
    """Requests come, end and are cancelled in any order: the bounds hold, and in the end all slots are free."""

    async def run() -> None:
        one = make_queue(Clock(), max_running=2, max_queued=4)
        tasks: list[asyncio.Task[float]] = []
        for verb, number in steps:
            if verb == "come":
                tasks.append(asyncio.create_task(one.enter(number)))
            elif verb == "tick":
                await asyncio.sleep(0)
            elif tasks:
                task = tasks.pop(number % len(tasks))
                ended = (verb == "leave" and task.done()) or not task.cancel()
                if ended and task.exception() is None:
                    one.leave(task.result())
            assert 0 <= one.running <= 2 and one.waiting <= 4
        while tasks:
            await asyncio.sleep(0)
            done = [task for task in tasks if task.done()]
            for task in done:
                tasks.remove(task)
                if task.exception() is None:
                    one.leave(task.result())
        for _ in range(5):
            await asyncio.sleep(0)
        assert (one.running, one.waiting) == (0, 0)

    asyncio.run(run())


def test_admission_bounds_all_requests_together() -> None:
    """Requests that are being decided count as well."""
    admission = AdmissionControl(("a", "b"))
    admission.configure(AdmissionSettings(max_in_flight=4))
    for rank, most in ((BATCH, 2), (NORMAL, 3), (HIGH, 4)):
        admission.check(rank)
        admission._deciding = most - 1
        admission.check(rank)
        admission._deciding = most
        with pytest.raises(FullError):
            admission.check(rank)


# --- through the gateway --------------------------------------------------------------------------------------------


def test_failover_asks_at_most_one_other_arm(tmp_path: Path) -> None:
    """Of three broken models two are asked."""
    models = {name: {"context_tokens": 512} for name in ("a", "b", "c")}
    gateway = Gateway(tmp_path, models=models)
    with gateway.client:
        for model in gateway.models.values():
            model.script = failing(RuntimeError())
        assert gateway.chat().status_code == 503
        assert sum(len(model.calls) for model in gateway.models.values()) == 2
        assert not any(gateway.ingress.router_client.in_flight.values())


def test_stream_ends_with_an_error_after_a_long_pause(tmp_path: Path) -> None:
    """After chunk_timeout_s the engine's request is cancelled, and it counts as a failure of the arm."""
    gateway = Gateway(tmp_path)

    async def stuck(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        yield b"data: 1\n\n", None
        await asyncio.sleep(3600)

    async def run() -> None:
        async with gateway.at_once() as client:
            gateway.tune(chunk_timeout_s=7.0)
            gateway.models["large"].script = stuck
            began = asyncio.get_running_loop().time()
            body = {
                "model": "large",
                "stream": True,
                "messages": [{"role": "user", "content": "a"}],
            }
            answer = await client.post("/v1/chat/completions", json=body)
            assert asyncio.get_running_loop().time() - began == pytest.approx(7.0)
            assert (
                '"server_error"' in answer.text
                and gateway.models["large"].cancelled == 1
            )
            assert not any(gateway.ingress.router_client.in_flight.values())

    clock.run(run())


def test_overload_is_refused_at_once_and_the_rest_is_answered(
    tmp_path: Path,
) -> None:
    """120 requests come at once for 2 × 4 slots and 2 × 6 places in queues. Afterwards all counters are 0."""
    gateway = Gateway(tmp_path)

    async def run() -> None:
        async with gateway.at_once() as client:
            gateway.tune(
                admission={
                    "max_running": 4,
                    "max_queued": 8,
                    "max_queue_wait_s": 20,
                    "max_in_flight": 1000,
                }
            )
            gateway.models["small"].script = takes(0.5, 4)
            gateway.models["large"].script = takes(0.5, 4)
            body = {"model": "auto", "messages": [{"role": "user", "content": "a"}]}
            # the queues learn how long a slot is held
            for model in ("small", "large"):
                await client.post("/v1/chat/completions", json={**body, "model": model})
            answers = await asyncio.gather(
                *(client.post("/v1/chat/completions", json=body) for _ in range(120))
            )
            statuses = [answer.status_code for answer in answers]
            assert set(statuses) == {200, 429} and statuses.count(200) >= 8 + 2 * 6
            for answer in answers:
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert answer.json()["error"]["type"] == "rate_limit_error"
            admission = gateway.ingress.dispatcher.admission
            assert admission.in_flight_total == 0
            blocked = [
                asyncio.create_task(client.post("/v1/chat/completions", json=body))
                for _ in range(60)
            ]
            while min(admission.queues[arm].waiting for arm in ("small", "large")) < 6:
                await asyncio.sleep(0.01)
            began = asyncio.get_running_loop().time()
            for _ in range(5):
                assert (
                    await client.post("/v1/chat/completions", json=body)
                ).status_code == 429
            assert asyncio.get_running_loop().time() == began
            urgent = await client.post(
                "/v1/chat/completions", json={**body, "service_tier": "priority"}
            )
            assert urgent.status_code == 200
            await asyncio.gather(*blocked)
        assert not any(gateway.ingress.router_client.in_flight.values())

    clock.run(run())


def test_queue_forgets_clients_that_disconnect_while_waiting(
    tmp_path: Path,
) -> None:
    """40 clients disconnect at once. Afterwards all slots are free and all counters are 0."""
    gateway = Gateway(tmp_path)

    async def run() -> None:
        async with gateway.at_once() as client:
            gateway.tune(admission={"max_running": 1, "max_queued": 100})
            gateway.models["large"].script = takes(30)
            body = {"model": "large", "messages": [{"role": "user", "content": "a"}]}
            tasks = [
                asyncio.create_task(client.post("/v1/chat/completions", json=body))
                for _ in range(40)
            ]
            admission = gateway.ingress.dispatcher.admission
            large = gateway.models["large"]
            for _ in range(100):  # its model takes 30 s
                await asyncio.sleep(0.01)
            assert admission.queues["large"].waiting == 39
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.05)
            assert admission.in_flight_total == 0 and not any(
                gateway.ingress.router_client.in_flight.values()
            )
            assert large.cancelled == len(large.calls) == 1

    clock.run(run())
