"""Circuit breaker of an arm: after repeated failures requests are kept away from it, and a probe tests it again.

Failures alone do not open the breaker, because the requests of one client can make a healthy engine fail. A check
decides: a request that any healthy engine answers (arm_check.py).
"""

import time
from collections.abc import Callable

from deployments.settings import BreakerSettings


class Breaker:
    """Circuit breaker with the states closed, open and half-open (Nygard, Release It!, 2nd edition, 2018).

    Closed, it admits all requests. Some failures in a row and a failed check open it. Open, it admits none. After a
    pause it is half-open and admits one request as a probe. A probe that begins to answer closes it. A probe that
    fails, followed by a failed check, opens it again for twice the pause.

    Args:
        clock: seconds, monotonic.
        check: called when the arm is suspected to be broken; the result is given to `on_check`. Without it, the arm
            counts as broken as soon as it is suspected.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[], None] | None = None,
    ):
        self.settings = BreakerSettings()
        self._check = check
        self._checking = False
        self._clock = clock
        self._failures = 0  # in a row
        self._open_until_s: float | None = None  # None while it is closed
        self._pause_s = 0.0
        self._probing = False

    @property
    def closed(self) -> bool:
        """Whether the arm counts as healthy."""
        return self._open_until_s is None

    @property
    def admits(self) -> bool:
        """Whether the next request is admitted."""
        if self._open_until_s is None:
            return True
        return not self._probing and self._clock() >= self._open_until_s

    @property
    def retry_after_s(self) -> float:
        """Seconds until the next request may be admitted."""
        if self._open_until_s is None:
            return 0.0
        return max(0.0, self._open_until_s - self._clock())

    def begin(self) -> bool:
        """Record that a request is sent to the arm. Returns whether it is the probe."""
        self._probing = self._open_until_s is not None
        return self._probing

    def end(self, status: str, probe: bool) -> None:
        """Record the result of a request.

        Only the statuses `ok` and `error` count. While the breaker is open, only the probe's result changes its state.
        """
        if self._open_until_s is not None and not probe:
            return
        if status == "ok":
            self._close()
        elif status == "error":
            self._failures += 1
            if probe or self._failures >= self.settings.failure_threshold:
                self._suspect()
        elif probe:
            self._probing = False

    def on_check(self, healthy: bool) -> None:
        """Record the result of a check. If the arm is healthy, its failures were caused by the requests."""
        self._checking = False
        is_open = self._open_until_s is not None
        if healthy:
            self._close()
        elif is_open or self._failures >= self.settings.failure_threshold:
            self._open()

    def _suspect(self) -> None:
        if self._check is None:
            self._open()
        elif not self._checking:
            self._checking = True
            self._check()

    def _close(self) -> None:
        self._failures = 0
        self._open_until_s = None
        self._pause_s = 0.0
        self._probing = False

    def _open(self) -> None:
        self._probing = False
        doubled_s = 2 * self._pause_s or self.settings.cooldown_s
        self._pause_s = min(self.settings.max_cooldown_s, doubled_s)
        self._open_until_s = self._clock() + self._pause_s
