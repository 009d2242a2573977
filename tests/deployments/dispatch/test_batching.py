"""Request batching: concurrent items share a call, and a single item is sent at once."""

import asyncio

import pytest

from deployments.dispatch.batching import Batcher
from tests.support import clock


def test_items_of_one_tick_are_sent_in_batches_up_to_the_limit() -> None:
    """Seven items at a limit of three make calls of 3, 3 and 1, and every item gets its own answer."""
    calls: list[list[int]] = []

    async def double(items: list[int]) -> list[int]:
        calls.append(items)
        return [2 * item for item in items]

    async def run() -> list[int]:
        ask = Batcher(double, limit=3)
        return await asyncio.gather(*(ask(i) for i in range(7)))

    assert clock.run(run()) == [0, 2, 4, 6, 8, 10, 12]
    assert sorted(map(len, calls)) == [1, 3, 3]


def test_a_failed_call_fails_its_own_items_only() -> None:
    """The next call succeeds."""

    async def picky(items: list[int]) -> list[int]:
        if 0 in items:
            raise RuntimeError("zero")
        return items

    async def run() -> int:
        ask = Batcher(picky)
        with pytest.raises(RuntimeError, match="zero"):
            await ask(0)
        return await ask(1)

    assert clock.run(run()) == 1


def test_a_slow_call_does_not_delay_the_next() -> None:
    """An item that comes while a call is under way starts another call."""

    async def slow_first(items: list[float]) -> list[float]:
        await asyncio.sleep(items[0])
        return items

    async def run() -> list[float]:
        ask = Batcher(slow_first)
        done = []

        async def one(delay: float) -> None:
            done.append(await ask(delay))

        first = asyncio.create_task(one(0.2))
        await asyncio.sleep(0.02)
        await one(0.0)
        await first
        return done

    assert clock.run(run()) == [0.0, 0.2]


def test_items_wait_for_a_shared_call_while_enough_calls_are_under_way() -> None:
    """Ten items, one a tick, while two slow calls run: the third call takes the other eight."""
    calls: list[list[int]] = []

    async def slow(items: list[int]) -> list[int]:
        calls.append(items)
        await asyncio.sleep(0.1)
        return items

    async def run() -> list[int]:
        ask = Batcher(slow)
        tasks = []
        for i in range(10):
            tasks.append(asyncio.create_task(ask(i)))
            await asyncio.sleep(0.001)
        return await asyncio.gather(*tasks)

    assert clock.run(run()) == list(range(10))
    assert calls == [[0], [1], list(range(2, 10))]


def test_cancelled_items_are_not_sent() -> None:
    """An item whose caller was cancelled is left out of its batch."""
    calls: list[list[int]] = []

    async def slow(items: list[int]) -> list[int]:
        calls.append(items)
        await asyncio.sleep(0.05)
        return items

    async def run() -> None:
        ask = Batcher(slow, calls=1)
        first = asyncio.create_task(ask(1))
        second = asyncio.create_task(ask(2))
        third = asyncio.create_task(ask(3))
        await asyncio.sleep(0.01)
        fourth = asyncio.create_task(ask(4))
        await asyncio.sleep(0)
        fourth.cancel()
        await asyncio.gather(first, second, third)
        await ask(5)

    clock.run(run())
    assert calls == [[1, 2, 3], [5]]
