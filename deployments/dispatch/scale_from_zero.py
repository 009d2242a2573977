"""Scales arms up from zero replicas (`min_replicas: 0`).

An arm without a replica is never chosen, so no request would ever make Serve start one. When a request comes that the
arm could answer, other arms answer it, and one tiny request is sent to the arm in the background. From that Serve's
autoscaler sees demand and starts a replica. No client waits for a model that is being loaded.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from deployments.models.handle import Body, CompleteMethod

CALL_PAUSE_S = 60.0  # between the end of a call and the next one to the same arm
CALL_TIMEOUT_S = 900.0  # enough to load a large model on a new node
BODIES: dict[str, Body] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
    "completion": {"prompt": "Hello", "max_tokens": 1},
    "embed": {"input": "Hello"},
}
log = logging.getLogger(__name__)


class ZeroScaler:
    """Makes Serve start replicas of arms that have none, for one ingress replica.

    Args:
        method: gives the handle's method that asks an arm for an answer in one piece.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        method: Callable[[str], Awaitable[CompleteMethod]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._method = method
        self._clock = clock
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._next_s: dict[str, float] = {}

    def request_replica(self, arm: str, task: str) -> None:
        """Send the arm one call in the background, unless one is under way or has just ended."""
        if arm in self._calls or self._clock() < self._next_s.get(arm, 0.0):
            return
        log.info("%s has no replica and is wanted; asking Serve for one", arm)
        self._calls[arm] = asyncio.get_running_loop().create_task(self._call(arm, task))

    async def _call(self, arm: str, task: str) -> None:
        try:
            # the arm may be down for another reason: a later request tries again
            with suppress(Exception):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await (await self._method(arm)).remote(task, BODIES[task])
        finally:
            self._next_s[arm] = self._clock() + CALL_PAUSE_S
            del self._calls[arm]
