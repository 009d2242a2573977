"""One call for all that waits: items of the same tick of the event loop travel together, and so do those that came
while enough calls were under way; the busier, the larger the batches.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Coalescer(Generic[Item, Answer]):
    """Turns a call that takes a batch into one that takes an item; alone, an item waits for nobody.

    Args:
        call: takes a list of items and gives their answers in the same order.
        limit: the largest batch.
        calls: how many may be under way at once; `call` has to end in time by itself, or it holds up the others.
    """

    def __init__(self, call: Callable[[list[Item]], Awaitable[Sequence[Answer]]], limit: int = 64, calls: int = 2):
        self._call, self._limit, self._calls = call, limit, calls
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, item: Item) -> Answer:
        """The answer to one item, or the exception of the call that it travelled in."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        if not self._waiting and len(self._running) < self._calls:
            self._schedule()
        self._waiting.append((item, future))
        return await future

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._calls:
            batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            batch = [(item, future) for item, future in batch if not future.done()]  # less those that gave up
            if not batch:
                continue
            task = asyncio.get_running_loop().create_task(self._send(batch))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _schedule(self) -> None:
        asyncio.get_running_loop().call_soon(self._start)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._waiting:
            self._schedule()

    async def _send(self, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._call([item for item, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
