"""Request batching: turns a call that takes a batch into one that takes a single item.

Items of the same tick of the event loop are sent in one batch. While enough calls are under way, further items wait and
form the next batch; so batches grow with the load.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """Batches concurrent items into few calls. A single item is sent at once.

    Args:
        call: takes a list of items and gives their answers in the same order. It needs a timeout of its own, because
            a call that hangs delays the items after it.
        limit: the largest batch.
        calls: number of calls that may be under way at once.
    """

    def __init__(
        self,
        call: Callable[[list[Item]], Awaitable[Sequence[Answer]]],
        limit: int = 64,
        calls: int = 2,
    ):
        self._call = call
        self._limit = limit
        self._calls = calls
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._running: set[asyncio.Task[None]] = set()

    async def __call__(self, item: Item) -> Answer:
        """The answer to one item, or the exception of the call that its batch was sent with."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        if not self._waiting and len(self._running) < self._calls:
            self._schedule()
        self._waiting.append((item, future))
        return await future

    def _schedule(self) -> None:
        asyncio.get_running_loop().call_soon(self._start_calls)

    def _start_calls(self) -> None:
        while self._waiting and len(self._running) < self._calls:
            batch = self._waiting[: self._limit]
            self._waiting = self._waiting[self._limit :]
            # without items whose caller was cancelled
            batch = [(item, future) for item, future in batch if not future.done()]
            if not batch:
                continue
            task = asyncio.get_running_loop().create_task(self._send(batch))
            self._running.add(task)
            task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
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
