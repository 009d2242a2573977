"""Admission control: a bounded priority queue in front of each model's application.

A queue is bounded by its length and by the expected wait; all requests of the ingress together are bounded as well. A
request that exceeds a bound is refused at once, with the time after which a retry is worthwhile. High-priority
requests are served first and may fill a queue; normal ones may fill three quarters of it, and batch work half.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Generic, TypeVar

from deployments.settings import AdmissionSettings

HIGH, NORMAL, BATCH = range(3)
RANKS = {"high": HIGH, "normal": NORMAL, "batch": BATCH}
SHARES = (1.0, 0.75, 0.5)  # of each limit, by rank
SMOOTHING = 0.1  # weight of the newest duration in the moving average

Ticket = TypeVar("Ticket")


class FullError(Exception):
    """There is no room; there may be after `retry_after_s`."""

    def __init__(self, retry_after_s: float):
        super().__init__("full")
        self.retry_after_s = retry_after_s


class Places(Generic[Ticket]):
    """The rule of one model's queue, without waiting: who has a slot, who is in the queue, who gets the next slot.

    ModelQueue drives it with futures, and the simulator of a cluster (benchmarks/cluster) on a simulated clock.

    Attributes:
        running: number of requests that have a slot.
        background: number of those that no client asked for (background.py).

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.settings = AdmissionSettings()
        self.replicas = 1
        self.running = 0
        self.background = 0
        self._last_busy_s = -inf
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, Ticket]] = []  # a heap
        self._held_s = 0.0  # moving average of how long a slot is held

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    def waiting_of(self, rank: int) -> int:
        """Number of waiting requests of this rank."""
        return sum(1 for other, _, _ in self._waiting if other == rank)

    @property
    def slots(self) -> int:
        """Number of requests that may run at once."""
        return self.settings.max_running * max(1, self.replicas)

    @property
    def busy(self) -> bool:
        """Whether a request waits, or requests of clients have at least half of the slots."""
        return bool(self._waiting) or 2 * (self.running - self.background) >= self.slots

    @property
    def idle_s(self) -> float:
        """For how long the queue has not been busy; infinite if it never was, 0 if it is."""
        self._note_load()
        return self._clock() - self._last_busy_s

    def _note_load(self) -> None:
        """Note the time if the queue is busy: after each change that adds load, before each that removes some."""
        if self.busy:
            self._last_busy_s = self._clock()

    def wait_s(self, rank: int) -> float:
        """Expected wait of a new request of this rank.

        It is the number of requests before it, times the mean time between two slots that become free.
        """
        if self._slot_is_free():
            return 0.0
        before = sum(1 for other, _, _ in self._waiting if other <= rank)
        return (before + 1) * self._held_s / self.slots

    def full(self, rank: int) -> bool:
        """Whether a new request of this rank would be refused."""
        if self._slot_is_free():
            return False
        if len(self._waiting) >= SHARES[rank] * self.settings.max_queued:
            return True
        return self.wait_s(rank) > self.settings.max_queue_wait_s

    def take(self, background: bool = False) -> bool:
        """Take a slot for a new request, if one is free and no other request waits for it."""
        if not self._slot_is_free():
            return False
        self.running += 1
        self.background += background
        self._note_load()
        return True

    def queue(self, rank: int, ticket: Ticket) -> tuple[int, int, Ticket]:
        """Put a request into the queue; returns the entry, for `withdraw`."""
        entry = (rank, next(self._numbers), ticket)
        heapq.heappush(self._waiting, entry)
        return entry

    def withdraw(self, entry: tuple[int, int, Ticket]) -> None:
        """Take an entry out of the queue, if it is still there."""
        if entry in self._waiting:
            self._note_load()
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)

    def next_ticket(self) -> Ticket | None:
        """Take the first request out of the queue if a slot is free for it. The caller adds it to `running`."""
        if not self._waiting or self.running >= self.slots:
            return None
        return heapq.heappop(self._waiting)[2]

    def release(self, entered: float | None, background: bool = False) -> None:
        """Free a slot; `entered` is None if the slot was never used, `background` is that of `take`."""
        self._note_load()
        self.running -= 1
        self.background -= background
        if entered is not None:
            held_s = self._clock() - entered
            weight = SMOOTHING if self._held_s else 1.0
            self._held_s += weight * (held_s - self._held_s)

    def _slot_is_free(self) -> bool:
        return self.running < self.slots and not self._waiting


class ModelQueue(Places[asyncio.Future[None]]):
    """Bounded priority queue of one model: the requests that wait for a slot, and the number of those that have one."""

    async def enter(self, rank: int, background: bool = False) -> float:
        """Wait for a slot. Returns the time at which it was taken, for `leave`.

        Args:
            rank: priority of the request.
            background: no client asked for it, so it does not make the queue busy once it has its slot.

        Raises:
            FullError: there is no room, or no slot became free within `settings.max_queue_wait_s`.
        """
        self._assign_slots()  # the number of replicas may have grown since the last `leave`
        if self.full(rank):
            raise FullError(self.wait_s(rank))
        if self.take(background):
            return self._clock()
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = self.queue(rank, slot)
        try:
            async with asyncio.timeout(self.settings.max_queue_wait_s):
                await slot
        except BaseException as error:
            if slot.done() and not slot.cancelled():
                self.leave(None)  # the slot was assigned at the same moment
            else:
                self.withdraw(entry)  # unless _assign_slots has removed it
            if isinstance(error, TimeoutError):
                raise FullError(self.wait_s(rank)) from None
            raise
        self.background += background
        return self._clock()

    def leave(self, entered: float | None, background: bool = False) -> None:
        """Free a slot; `entered` is None if the slot was never used, `background` is that of `enter`."""
        self.release(entered, background)
        self._assign_slots()

    def _assign_slots(self) -> None:
        while (slot := self.next_ticket()) is not None:
            if not slot.done():
                self.running += 1
                slot.set_result(None)


class AdmissionControl:
    """The queues of all applications, and the bound on the number of all requests.

    Args:
        applications: their names.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        applications: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.queues = {name: ModelQueue(clock) for name in applications}
        self._deciding = 0
        self.configure(AdmissionSettings())

    def configure(self, settings: AdmissionSettings) -> None:
        """Take over changed settings."""
        self._settings = settings
        for queue in self.queues.values():
            queue.settings = settings

    def wait_s(self, application: str, rank: int) -> float:
        """Expected wait of a new request of this rank; 0 for an application that this ingress does not know yet."""
        queue = self.queues.get(application)
        return 0.0 if queue is None else queue.wait_s(rank)

    @property
    def in_flight_total(self) -> int:
        """Number of requests that are being decided, wait or run."""
        in_queues = sum(queue.running + queue.waiting for queue in self.queues.values())
        return self._deciding + in_queues

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Count a request that is not in a queue yet."""
        self._deciding += 1
        try:
            yield
        finally:
            self._deciding -= 1

    def check(self, rank: int) -> None:
        """Refuse a request before any work is done for it.

        Raises:
            FullError: the ingress has as many requests as this rank may fill.
        """
        if self.in_flight_total >= SHARES[rank] * self._settings.max_in_flight:
            wait_s = min(queue.wait_s(rank) for queue in self.queues.values())
            raise FullError(wait_s)
