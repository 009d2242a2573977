"""A circuit breaker for each arm: one that fails again and again is left alone for a while, and then tried by one.

Failures alone do not open it: requests of one client can make a healthy engine fail. A check of the arm decides, a
request that any healthy engine answers.
"""

import time
from collections.abc import Callable

from deployments.settings import BreakerSettings


class Breaker:
    """Closed, it lets everybody through; after some failures in a row, and a check that fails too, it opens and lets
    nobody; after a pause it is half-open and lets one request through as a probe. A probe that begins to answer closes
    it; one that fails, and a check that fails too, open it again, for twice as long as before (Nygard, Release It!,
    2nd edition, 2018, "Circuit Breaker").

    Args:
        clock: seconds, never going back.
        check: called when the arm is suspected; `checked` has to be called with what came of it. Without one every
            suspicion counts.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, check: Callable[[], None] | None = None):
        self.settings = BreakerSettings()
        self._check = check
        self._checking = False
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
        if status == "ok":
            self._close()
        elif status == "error":
            self._failures += 1
            if probe or self._failures >= self.settings.failures:
                self._suspect()
        elif probe:
            self._probing = False

    def checked(self, healthy: bool) -> None:
        """What came of the check: a healthy arm's failures were those of the requests."""
        self._checking = False
        suspected = self._until is not None or self._failures >= self.settings.failures
        if healthy:
            self._close()
        elif suspected:
            self._open()

    def _suspect(self) -> None:
        if self._check is None:
            self._open()
        elif not self._checking:
            self._checking = True
            self._check()

    def _close(self) -> None:
        self._failures = 0
        self._until = None
        self._pause_s = 0.0
        self._probing = False

    def _open(self) -> None:
        self._probing = False
        self._pause_s = min(self.settings.max_open_s, 2 * self._pause_s or self.settings.open_s)
        self._until = self._clock() + self._pause_s
