"""Who may come in, who waits, and who is told to come back later: a short line in front of each model.

A line is bounded three ways: by its places, by the time that waiting in it would take, and by all requests in the
house together. What does not fit is refused at once, with the time after which it is worth trying again. Urgent
requests go first and may fill a line, normal ones three quarters of it, batch work half.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deployments.settings import AdmissionSettings

HIGH, NORMAL, BATCH = range(3)
RANKS = {"high": HIGH, "normal": NORMAL, "batch": BATCH}
SHARES = (1.0, 0.75, 0.5)  # of each limit, by rank
SMOOTHING = 0.1  # weight of the newest answer's duration in the moving average


class FullError(Exception):
    """There is no room; after `retry_after_s` there may be."""

    def __init__(self, retry_after_s: float):
        super().__init__("full")
        self.retry_after_s = retry_after_s


class Line:
    """The requests that wait for a place at one model, the most urgent first, and those that have one.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.settings = AdmissionSettings()
        self.replicas = 1
        self.running = 0
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._busy_s = 0.0  # moving average of how long a place is held

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def places(self) -> int:
        """How many may run at once."""
        return self.settings.running * max(1, self.replicas)

    def wait_s(self, rank: int) -> float:
        """The wait that somebody of this rank has to expect: those before it, times how often a place gets free."""
        if self.running < self.places and not self._waiting:
            return 0.0
        before = sum(1 for other, _, _ in self._waiting if other <= rank)
        return (before + 1) * self._busy_s / self.places

    def full(self, rank: int) -> bool:
        """Whether somebody of this rank is refused now."""
        if self.running < self.places and not self._waiting:
            return False
        no_place = len(self._waiting) >= SHARES[rank] * self.settings.waiting
        return no_place or self.wait_s(rank) > self.settings.wait_s

    async def enter(self, rank: int) -> float:
        """Wait for a place; gives the time at which it was taken, for `leave`.

        Raises:
            FullError: there is no room, or it did not come free in `settings.wait_s`.
        """
        self._wake()  # there may be more replicas than when somebody left last
        if self.full(rank):
            raise FullError(self.wait_s(rank))
        if self.running < self.places and not self._waiting:
            self.running += 1
            return self._clock()
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (rank, next(self._numbers), place)
        heapq.heappush(self._waiting, entry)
        try:
            async with asyncio.timeout(self.settings.wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():  # the place came in the same moment
                self.leave(None)
            elif entry in self._waiting:  # or _wake has passed over it already
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            if isinstance(error, TimeoutError):
                raise FullError(self.wait_s(rank)) from None
            raise
        return self._clock()

    def leave(self, entered: float | None) -> None:
        """Give a place back; `entered` is None if it was never used."""
        self.running -= 1
        if entered is not None:
            busy_s = self._clock() - entered
            self._busy_s += (SMOOTHING if self._busy_s else 1.0) * (busy_s - self._busy_s)
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self.running < self.places:
            _, _, place = heapq.heappop(self._waiting)
            if not place.done():
                self.running += 1
                place.set_result(None)


class Admission:
    """The lines of all arms, and how many requests there are in all.

    Args:
        arms: their names.
        clock: seconds, never going back.
    """

    def __init__(self, arms: tuple[str, ...], clock: Callable[[], float] = time.monotonic):
        self.lines = {arm: Line(clock) for arm in arms}
        self._deciding = 0
        self.configure(AdmissionSettings())

    def configure(self, settings: AdmissionSettings) -> None:
        """Take over changed settings."""
        self._settings = settings
        for line in self.lines.values():
            line.settings = settings

    @property
    def requests(self) -> int:
        """How many are in the house."""
        return self._deciding + sum(line.running + line.waiting for line in self.lines.values())

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """A request that has no line yet."""
        self._deciding += 1
        try:
            yield
        finally:
            self._deciding -= 1

    def check(self, rank: int) -> None:
        """Refuse before any work is done.

        Raises:
            FullError: the house is full for this rank.
        """
        if self.requests >= SHARES[rank] * self._settings.requests:
            raise FullError(min(line.wait_s(rank) for line in self.lines.values()))
