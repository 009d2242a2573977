"""Checks of an arm that failed several times in a row: does it answer what any healthy engine answers?"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from deployments.waker import BODIES

DEADLINE_S = 5.0
VALID_S = 1.0  # for which a check that succeeded holds


class ArmCheck:
    """Of one arm.

    Args:
        task: one that the arm can do.
        method: gives what asks the arm for an answer in one piece.
        report: is called with whether the arm is healthy.
        clock: seconds, monotonic.
        deadline_s: within which a healthy arm answers.
    """

    def __init__(
        self,
        task: str,
        method: Callable[[], Awaitable[Any]],
        report: Callable[[bool], None],
        clock: Callable[[], float] = time.monotonic,
        deadline_s: float = DEADLINE_S,
    ):
        self._task = task
        self._method = method
        self._report = report
        self._clock = clock
        self._deadline_s = deadline_s
        self._healthy_s: float | None = None  # when the last check succeeded
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Check in the background; or report at once what a check found a moment ago."""
        if self._healthy_s is not None and self._clock() - self._healthy_s < VALID_S:
            self._report(True)
        else:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        healthy = False
        try:
            async with asyncio.timeout(self._deadline_s):
                _, answer = await (await self._method()).remote(self._task, BODIES[self._task])
            healthy = answer is not None and "error" not in answer
        except Exception as error:
            healthy = type(error).__name__ == "BackPressureError"  # it is busy, not broken
        if healthy:
            self._healthy_s = self._clock()
        self._report(healthy)
