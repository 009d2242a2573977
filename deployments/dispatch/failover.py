"""Fails requests over to another model when their model has lost its last replica and has not accepted them yet.

When a replica dies, Serve keeps the calls that wait for it until there is another replica, which takes as long as a
model takes to load. The ingress knows within seconds that a model has no replica. It then shortens the deadlines of
the waiting requests, and the dispatcher gives them to another model. Calls that a replica has accepted are kept: a
draining replica still answers them, and Serve raises an error for the calls of a dead one.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable

CHECK_EVERY_S = 1.0
GRACE_S = 2.0  # from the moment that the lost replica is noticed to the new deadline


class StrandedRequests:
    """Requests of one ingress replica that wait for the first byte, and their deadlines.

    Args:
        replicas: number of ready replicas of an arm, as of the last snapshot.
    """

    def __init__(self, replicas: Callable[[str], int]):
        self._replicas = replicas
        self._deadlines: defaultdict[str, dict[asyncio.Timeout, Callable[[], bool]]] = (
            defaultdict(dict)
        )
        self._checking = False

    def register(
        self, arm: str, deadline: asyncio.Timeout, accepted: Callable[[], bool]
    ) -> None:
        """Register a request whose deadline may be shortened until a replica accepts it."""
        self._deadlines[arm][deadline] = accepted
        if not self._checking:
            self._checking = True
            asyncio.get_running_loop().call_later(CHECK_EVERY_S, self._check)

    def unregister(self, arm: str, deadline: asyncio.Timeout) -> None:
        """Remove a request that has its first byte, or has failed."""
        self._deadlines[arm].pop(deadline, None)

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        soon = loop.time() + GRACE_S
        for arm, deadlines in self._deadlines.items():
            if deadlines and not self._replicas(arm):
                self._shorten(deadlines, soon)
        self._checking = any(self._deadlines.values())
        if self._checking:
            loop.call_later(CHECK_EVERY_S, self._check)

    def _shorten(
        self, deadlines: dict[asyncio.Timeout, Callable[[], bool]], soon: float
    ) -> None:
        for deadline, accepted in deadlines.items():
            if deadline.expired() or accepted():
                continue
            when = deadline.when()
            if when is None or when > soon:
                deadline.reschedule(soon)
