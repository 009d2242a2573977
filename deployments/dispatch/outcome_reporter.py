"""Reports the outcomes of decisions to the router in batches, and writes them to the log.

Outcomes are queued, so a request never waits for the router. While the router is away, the queue is kept and the batch
is sent again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from itertools import islice
from typing import TypeAlias

from msgspec import structs

from deployments.observability import logs
from policies.events import Decision, Outcome
from policies.types import TaskProfile

SEND_EVERY_S = 0.25
BATCH_SIZE = 1000
SEND_TIMEOUT_S = 10.0  # of one attempt
GIVE_UP_AFTER_S = (
    300.0  # a batch is dropped when the router did not take it for so long
)
MAX_UNSENT = 20_000  # some 100 MB
# pauses between two attempts: the first one, doubled up to the longest
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 2.0
log = logging.getLogger(__name__)

Finished: TypeAlias = tuple[Decision, Outcome]


class OutcomeReporter:
    """Queue of decisions with outcomes that the router has not received yet.

    A background task sends the queue in batches and ends when the queue is empty. When the queue is full, the oldest
    outcome is dropped.

    Args:
        send: hands a batch to the router.
        add_forecasts: completes profiles. Forecasts do not influence the decision, so they are computed here, after
            the answer.

    Attributes:
        unsent: the queue, oldest first, including the batch that is being sent.
    """

    def __init__(
        self,
        send: Callable[[list[Finished]], Awaitable[None]],
        add_forecasts: Callable[[list[TaskProfile]], Sequence[TaskProfile]],
    ):
        self.unsent: deque[Finished] = deque()
        self._send = send
        self._add_forecasts = add_forecasts
        self._in_transit = 0  # length of the batch that is being sent
        self._dropped = 0  # since the start, because the queue was full
        # what the log does not have yet, with the id of the request
        self._unlogged: list[tuple[Decision, Outcome, str]] = []
        self._task: asyncio.Task[None] | None = None

    def report(self, decision: Decision, outcome: Outcome) -> None:
        """Queue an outcome for the router and for the log. Does not wait."""
        self.unsent.append((decision, outcome))
        if len(self.unsent) > MAX_UNSENT:
            self._drop_oldest()
        self._unlogged.append((decision, outcome, logs.REQUEST_ID.get()))
        if self._task is None or self._task.done():
            # an empty context: otherwise every log line of the task would carry the current request's id
            self._task = asyncio.get_running_loop().create_task(
                self._send_all(), context=Context()
            )

    async def drain(self, timeout_s: float) -> None:
        """Wait until the queue is empty, for `timeout_s` at most."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)

    def _drop_oldest(self) -> None:
        self.unsent.popleft()
        self._in_transit = max(0, self._in_transit - 1)
        self._dropped += 1
        if self._dropped % BATCH_SIZE == 1:
            log.error(
                "the router is away, and outcomes are lost: %d so far", self._dropped
            )

    async def _send_all(self) -> None:
        while self.unsent:
            await asyncio.sleep(SEND_EVERY_S)
            batch = self._with_forecasts([*islice(self.unsent, BATCH_SIZE)])
            self._in_transit = len(batch)
            await self._send_batch(batch)
            while self._in_transit:
                self.unsent.popleft()
                self._in_transit -= 1

    async def _send_batch(self, batch: list[Finished]) -> None:
        """Send a batch until the router takes it, or give it up after GIVE_UP_AFTER_S."""
        began = time.monotonic()
        pause_s = FIRST_PAUSE_S
        while True:
            self._write_log()  # in every round, so the log does not wait for the router
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._send(batch)
                return
            except Exception as error:
                if time.monotonic() - began >= GIVE_UP_AFTER_S:
                    log.error(
                        "%d outcomes were lost: the router was away for %g s",
                        len(batch),
                        GIVE_UP_AFTER_S,
                    )
                    return
                log.warning(
                    "the router did not take %d outcomes (%s); trying again",
                    len(batch),
                    type(error).__name__,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def _write_log(self) -> None:
        unlogged = self._unlogged
        self._unlogged = []
        for row in unlogged:
            logs.finished(*row)

    def _with_forecasts(self, batch: list[Finished]) -> list[Finished]:
        """The batch with forecasts in all profiles."""
        profiles = self._add_forecasts([decision.profile for decision, _ in batch])
        completed = []
        for (decision, outcome), profile in zip(batch, profiles, strict=True):
            if decision.profile is not profile:
                decision = structs.replace(decision, profile=profile)
            completed.append((decision, outcome))
        return completed
