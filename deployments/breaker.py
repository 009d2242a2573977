"""A circuit breaker for each arm: one that fails again and again is left alone for a while, and then tried by one."""

import time
from collections.abc import Callable

from deployments.settings import BreakerSettings


class Breaker:
    """Closed, it lets everybody through; after some failures in a row it opens and lets nobody; after a pause it is
    half-open and lets one request through as a probe. A probe that begins to answer closes it; one that fails opens it
    again, for twice as long as before (Nygard, Release It!, 2nd edition, 2018, "Circuit Breaker").

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.settings = BreakerSettings()
        self._clock = clock
        self._failures = 0  # in a row
        self._until: float | None = None  # closed while None
        self._pause_s = 0.0
        self._probing = False

    @property
    def admits(self) -> bool:
        """Whether the next request gets through."""
        return self._until is None or (not self._probing and self._clock() >= self._until)

    @property
    def retry_after_s(self) -> float:
        """Seconds until it may let somebody through."""
        return 0.0 if self._until is None else max(0.0, self._until - self._clock())

    def begin(self) -> bool:
        """A request goes to the arm; whether it is the probe."""
        self._probing = self._until is not None
        return self._probing

    def end(self, status: str, probe: bool) -> None:
        """How it ended: `ok` and `error` count; a client that left, or was wrong itself, says nothing of the arm. What
        was under way when the breaker opened says nothing of the arm as it is now: only the probe changes an open one.
        """
        if self._until is not None and not probe:
            return
        if probe:
            self._probing = False
        if status == "ok":
            self._failures, self._until, self._pause_s = 0, None, 0.0
        elif status == "error":
            self._failures += 1
            if probe or self._failures >= self.settings.failures:
                self._open()

    def _open(self) -> None:
        self._pause_s = min(self.settings.max_open_s, 2 * self._pause_s or self.settings.open_s)
        self._until = self._clock() + self._pause_s
