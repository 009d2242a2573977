"""Lines about a step that takes long, each with the seconds since it began."""

import sys
import time
from collections.abc import Callable

QUIET_S = 15.0  # after so long without a line, one says what is awaited


class Progress:
    """Prints the lines on standard error, because they are no result.

    Args:
        clock: gives the seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began = self._printed = clock()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

    def say(self, message: str) -> None:
        """Print a line."""
        self._printed = self._clock()
        print(f"[{self.seconds:5.0f} s] {message}", file=sys.stderr, flush=True)

    def waiting(self, what: str) -> None:
        """Say what is awaited, unless a line was printed a short while ago; call it again and again."""
        if self._clock() - self._printed >= QUIET_S:
            self.say(f"  still waiting for {what}")
