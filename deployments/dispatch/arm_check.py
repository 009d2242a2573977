"""Checks an arm that failed several times in a row: sends it a request that any healthy engine answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from ray.serve.exceptions import BackPressureError

from deployments.models.handle import Body, CompleteMethod

BODIES: dict[str, Body] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
    "completion": {"prompt": "Hello", "max_tokens": 1},
    "embed": {"input": "Hello"},
}
DEADLINE_S = 5.0
VALID_S = 1.0  # how long the result of a successful check is used again


class ArmCheck:
    """Health check of one arm.

    Args:
        task: a task that the arm can do.
        method: gives the handle's method that asks the arm for an answer in one piece.
        report: called with whether the arm is healthy.
        clock: seconds, monotonic.
        deadline_s: a healthy arm answers within this time.
    """

    def __init__(
        self,
        task: str,
        method: Callable[[], Awaitable[CompleteMethod]],
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
        """Check in the background, or report at once if a check has just succeeded."""
        if self._healthy_s is not None and self._clock() - self._healthy_s < VALID_S:
            self._report(True)
        else:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        healthy = False
        try:
            async with asyncio.timeout(self._deadline_s):
                _, report = await (await self._method()).remote(
                    self._task, BODIES[self._task]
                )
            healthy = report is not None and report.error is None
        except BackPressureError:
            healthy = True  # busy, not broken
        except Exception:
            healthy = False
        if healthy:
            self._healthy_s = self._clock()
        self._report(healthy)
