"""Requests that wait for the first byte of an arm that has lost its last replica do not wait for the next one.

When a replica dies, Serve keeps what it was about to be given until there is another: as long as a model takes to
load. The ingress learns within seconds that there is none left; then what waits has a little time more, and is given to
another arm. What a replica has taken is left to it: one that drains answers still, and of one that dies Serve tells.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

LOOK_EVERY_S = 1.0
GRACE_S = 2.0


def taken(call: Any) -> bool:
    """Whether a replica has taken this call of a handle's; Serve has no public word for it."""
    replica = getattr(call, "_replica_result_future", None)
    return replica is not None and bool(replica.done())


class Patience:
    """Of one ingress replica.

    Args:
        replicas: how many of an arm are ready, as far as is known here.
    """

    def __init__(self, replicas: Callable[[str], int]):
        self._replicas = replicas
        self._deadlines: defaultdict[str, dict[asyncio.Timeout, Callable[[], bool]]] = defaultdict(dict)
        self._looking = False

    def begin(self, arm: str, deadline: asyncio.Timeout, taken: Callable[[], bool]) -> None:
        """From now on this deadline may come sooner, until a replica has `taken` what it is for."""
        self._deadlines[arm][deadline] = taken
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def end(self, arm: str, deadline: asyncio.Timeout) -> None:
        """The first byte is there, or it failed."""
        self._deadlines[arm].pop(deadline, None)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        soon = loop.time() + GRACE_S
        for arm, deadlines in self._deadlines.items():
            if deadlines and not self._replicas(arm):
                for deadline, taken in deadlines.items():
                    when = deadline.when()
                    if not deadline.expired() and not taken() and (when is None or when > soon):
                        deadline.reschedule(soon)
        self._looking = any(self._deadlines.values())
        if self._looking:
            loop.call_later(LOOK_EVERY_S, self._look)
