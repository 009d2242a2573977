"""Watchdog for an engine that hangs: the engine has requests, and makes no step for any of them.

vLLM reports an engine as healthy as long as its process exists. An engine that hangs (a GPU fault, a deadlock, a
stopped process) would keep its replica, and every request to that replica would run into its deadline.

A step that reads a part of a long prompt makes no token. The engine reports such a step only with its statistics;
without statistics (`disable_log_stats: true`) the whole prompt must be read within STALL_S.

A request makes no step while its grammar is compiled, although the engine is healthy. So the watchdog ignores silence
while all requests may be compiling. ModelServer.check_health also checks that the engine's process answers a call.
"""

import time
from collections.abc import Callable
from typing import Protocol

STALL_S = 20.0  # a step takes milliseconds, a chunk of a long prompt a second
ANSWER_S = 10.0  # for a call that the engine answers between two steps


class HungEngineError(RuntimeError):
    """The engine has requests and has made no step for too long."""


class OutputProcessor(Protocol):
    """What the watchdog uses of vLLM's `OutputProcessor`."""

    # vLLM calls it after every step
    update_scheduler_stats: Callable[..., None]

    def get_num_unfinished_requests(self) -> int:
        """Number of requests under way."""


class Watchdog:
    """Observes the steps of one engine.

    Args:
        outputs: of the engine; its `update_scheduler_stats` is replaced.
        constrained: returns how many of the requests may wait for their grammar.
        stall_s: seconds without a step after which the engine hangs.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        outputs: OutputProcessor,
        constrained: Callable[[], int] = lambda: 0,
        stall_s: float = STALL_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._constrained = constrained
        self._outputs = outputs
        self._update = outputs.update_scheduler_stats
        self._stall_s = stall_s
        self._clock = clock
        self._last_step_s = clock()
        outputs.update_scheduler_stats = self._on_step

    def _on_step(self, *args: object, **options: object) -> None:
        self._last_step_s = self._clock()
        self._update(*args, **options)

    def check(self) -> None:
        """Check the time since the last step; to be called every few seconds.

        The time starts anew at a check that finds no request which should make steps.

        Raises:
            HungEngineError: there are requests, and the last step was too long ago.
        """
        now = self._clock()
        if self._outputs.get_num_unfinished_requests() <= self._constrained():
            self._last_step_s = now
        elif now - self._last_step_s > self._stall_s:
            silence_s = now - self._last_step_s
            raise HungEngineError(
                f"the engine has requests and has made no step for {silence_s:.0f} s"
            )
