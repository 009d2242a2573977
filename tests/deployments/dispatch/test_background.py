"""The rule by which a size is idle, on a fake clock, and the calls that no client asked for."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from deployments.dispatch.admission import BATCH, NORMAL, FullError, ModelQueue
from deployments.dispatch.background import IDLE_S, BackgroundCalls, ModelFailedError
from deployments.dispatch.variants import Variants
from deployments.models.report import failure
from deployments.settings import AdmissionSettings
from policies.types import Arm
from tests.support import clock
from tests.support.fakes import FakeModel


class Others:
    """The part of the router's client that background calls use."""

    def __init__(self) -> None:
        self.in_flight: Counter[str] = Counter()
        self.elsewhere = 0.0
        self.ready = 1

    def others_in_flight(self, arm: str) -> float:
        return self.elsewhere

    def replicas(self, arm: str) -> int:
        return self.ready

    def lacks(self, arm: str) -> frozenset[str]:
        return frozenset()


class Breaker:
    admits = True


class Part:
    """Background calls of one size with four slots."""

    def __init__(self, slots: int = 4) -> None:
        loop = asyncio.get_running_loop()
        self.model = FakeModel("small")
        self.queue = ModelQueue(loop.time)
        self.queue.settings = AdmissionSettings(max_running=slots, max_queued=8)
        self.client = Others()
        self.breaker = Breaker()

        async def method(_: str) -> Any:
            return self.model.complete

        self.calls = BackgroundCalls(
            self.client,  # type: ignore[arg-type]
            {"small": self.queue},
            {"small": self.breaker},  # type: ignore[dict-item]
            method,
            {
                "small": Arm("small"),
                "small-brief": Arm("small-brief", variant_of="small"),
            },
            Variants([]),
            loop.time,
        )

    @property
    def idle(self) -> bool:
        return self.calls.is_idle("small")


def test_a_size_is_idle_two_seconds_after_its_last_load() -> None:
    """Two of four slots are half of them: from the end of the second request on, two seconds pass until it is idle."""

    async def play() -> None:
        part = Part()
        assert part.idle
        one = await part.queue.enter(NORMAL)
        assert part.idle  # one of four
        two = await part.queue.enter(NORMAL)
        await asyncio.sleep(10.0)
        assert not part.idle
        part.queue.leave(two)
        await asyncio.sleep(IDLE_S - 0.1)
        assert not part.idle
        await asyncio.sleep(0.2)
        assert part.idle
        part.queue.leave(one)
        assert part.idle

    clock.run(play())


@pytest.mark.parametrize("seconds", [0.01, 10.0])
def test_a_load_between_two_looks_counts(seconds: float) -> None:
    """The queue notes the load itself, so it is not missed if it comes and goes between two looks."""

    async def play() -> None:
        part = Part()
        await asyncio.sleep(5.0)
        entered = [await part.queue.enter(NORMAL) for _ in range(2)]
        await asyncio.sleep(seconds)
        for slot in entered:
            part.queue.leave(slot)
        await asyncio.sleep(1.0)
        assert not part.idle
        await asyncio.sleep(1.1)
        assert part.idle

    clock.run(play())


def test_a_size_with_a_queued_request_is_not_idle() -> None:
    """With one slot a second request waits. It leaves the queue without an answer."""

    async def play() -> None:
        part = Part(slots=1)
        await part.queue.enter(BATCH, background=True)
        assert part.idle  # the only slot has a background call
        waiting = asyncio.create_task(part.queue.enter(NORMAL))
        await asyncio.sleep(3.0)
        assert not part.idle
        waiting.cancel()
        await asyncio.sleep(IDLE_S - 0.5)
        assert not part.idle
        await asyncio.sleep(1.0)
        assert part.idle

    clock.run(play())


def test_background_calls_do_not_make_their_size_busy() -> None:
    """Three of four slots have background calls, and one that waited for its slot does not count either."""

    async def play() -> None:
        part = Part()
        for _ in range(4):
            await part.queue.enter(BATCH, background=True)
        assert part.idle
        fifth = asyncio.create_task(part.queue.enter(BATCH, background=True))
        await asyncio.sleep(0)
        part.queue.leave(None, background=True)
        await fifth
        await asyncio.sleep(IDLE_S + 0.1)
        assert part.idle and part.queue.background == part.queue.running == 4

    clock.run(play())


def test_requests_at_other_ingresses_count() -> None:
    """They are known from the snapshots: two of them at another ingress are half of the slots."""

    async def play() -> None:
        part = Part()
        part.client.elsewhere = 2.0
        part.calls.observe_load()
        part.client.elsewhere = 0.0
        await asyncio.sleep(1.0)
        assert not part.idle
        await asyncio.sleep(1.1)
        assert part.idle
        part.client.elsewhere = 1.0
        assert part.idle
        await part.queue.enter(NORMAL)
        assert not part.idle  # one here and one there

    clock.run(play())


def test_a_size_that_cannot_answer_is_not_idle() -> None:
    """It has no replica, so a call would start one; or its circuit breaker is open."""

    async def play() -> None:
        part = Part()
        part.client.ready = 0
        assert not part.idle
        part.client.ready = 1
        part.breaker.admits = False
        assert not part.idle

    clock.run(play())


def test_an_answer_comes_with_its_text_tokens_and_durations() -> None:
    """The wait in the queue is known apart; afterwards nothing is in flight."""

    async def play() -> None:
        part = Part(slots=1)

        async def script(task: str, body: Any) -> Any:
            await asyncio.sleep(0.5)
            async for item in part.model._say_name(task, body):
                yield item

        part.model.script = script
        await part.queue.enter(NORMAL)
        asyncio.get_running_loop().call_later(1.5, part.queue.leave, None)
        answer = await part.calls.ask("small", {"messages": []})
        assert answer.text == "small" and answer.report.output_tokens == 2
        assert answer.waited_s == pytest.approx(1.5, abs=0.01)
        assert answer.latency_s == pytest.approx(2.0, abs=0.01)
        assert part.queue.running == part.queue.background == 0
        assert not any(part.client.in_flight.values())

    clock.run(play())


def test_failures_free_the_slot() -> None:
    """An error that the model reports keeps its status; a full queue refuses the call."""

    async def play() -> None:
        part = Part(slots=1)

        async def script(task: str, body: Any) -> Any:
            yield b"{}", failure("too long", 400)

        part.model.script = script
        with pytest.raises(ModelFailedError) as error:
            await part.calls.ask("small", {"messages": []})
        assert error.value.status == 400 and part.model.cancelled == 1
        assert part.queue.running == 0 and not any(part.client.in_flight.values())
        part.queue.settings = AdmissionSettings(max_running=1, max_queued=0)
        await part.queue.enter(NORMAL)
        with pytest.raises(FullError):
            await part.calls.ask("small", {"messages": []})
        assert part.queue.running == 1

    clock.run(play())
