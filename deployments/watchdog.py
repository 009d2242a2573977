"""Notices an engine that hangs: it has requests, and makes no step for any of them.

vLLM calls an engine healthy as long as its process is there. One that hangs (a GPU fault, a deadlock, a stopped
process) would keep its replica, and every request it is given, until each runs into its deadline.

A step that reads a part of a long prompt makes no token; that it was made the engine tells with its statistics. Without
them (`disable_log_stats: true`) a prompt must be read within STALL_S.

A request whose grammar is being compiled makes no step either, and its engine is well. While all requests are such, an
engine's silence says nothing; that its process answers a call, ModelServer.check_health asks besides.
"""

import time
from collections.abc import Callable
from typing import Any

STALL_S = 20.0  # a step takes milliseconds, a chunk of a long prompt a second
ANSWER_S = 10.0  # to a call that an engine answers between two steps


class HungEngineError(RuntimeError):
    """Requests wait, and no step is made."""


class Watchdog:
    """Listens to what an engine puts out.

    Args:
        outputs: vLLM's output processor: `update_scheduler_stats` is called whenever the engine tells of a step, and
            `get_num_unfinished_requests` says whether there is anything to do.
        constrained: how many of the requests may wait for their grammar.
        stall_s: silence that is too long.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        outputs: Any,
        constrained: Callable[[], int] = lambda: 0,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._constrained = constrained
        self._outputs, self._update = outputs, outputs.update_scheduler_stats
        self._stall_s, self._clock, self._heard_s = stall_s, clock, clock()
        outputs.update_scheduler_stats = self._hear

    def _hear(self, *args: Any, **options: Any) -> Any:
        self._heard_s = self._clock()
        return self._update(*args, **options)

    def check(self) -> None:
        """To be called every few seconds: silence counts from the last step, or the last call at which none was due.

        Raises:
            HungEngineError: there are requests, and it has been silent for too long.
        """
        now = self._clock()
        if self._outputs.get_num_unfinished_requests() <= self._constrained():
            self._heard_s = now
        elif now - self._heard_s > self._stall_s:
            raise HungEngineError(f"the engine has requests and has made no step for {now - self._heard_s:.0f} s")
