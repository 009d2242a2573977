"""Wakes arms that sleep: one without a replica (min_replicas: 0) is never chosen, so nothing would ever start it.

Requests that it might answer go to arms that are awake, and in the background one tiny request waits at the sleeping
one: from that Serve's autoscaler sees that it is wanted. Nobody waits for a model that is being loaded.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

AGAIN_S = 60.0  # after a wake-up call ended
PATIENCE_S = 900.0  # for a large model on a new node
BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
    "completion": {"prompt": "Hello", "max_tokens": 1},
    "embed": {"input": "Hello"},
}
log = logging.getLogger(__name__)


class Waker:
    """Of one ingress replica.

    Args:
        method: gives what asks an arm for an answer in one piece.
        clock: seconds, monotonic.
    """

    def __init__(self, method: Callable[[str], Awaitable[Any]], clock: Callable[[], float] = time.monotonic):
        self._method, self._clock = method, clock
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._next_s: dict[str, float] = {}

    def wake(self, arm: str, task: str) -> None:
        """Start one wake-up call, unless one is under way or just ended."""
        if arm not in self._calls and self._clock() >= self._next_s.get(arm, 0.0):
            log.info("%s has no replica and is wanted; waking it", arm)
            self._calls[arm] = asyncio.get_running_loop().create_task(self._call(arm, task))

    async def _call(self, arm: str, task: str) -> None:
        try:
            with suppress(Exception):  # it may be gone for another reason; the next request tries again
                async with asyncio.timeout(PATIENCE_S):
                    await (await self._method(arm)).remote(task, BODIES[task])
        finally:
            self._next_s[arm] = self._clock() + AGAIN_S
            del self._calls[arm]
