"""Keeps the profiler's forecasts up to date: refitted from the journal, off the router's event loop."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import structs

from policies.forecast import Forecaster
from policies.ledger import Ledger
from policies.types import Arm, Decision

REFIT_EVERY = 600  # rows of the journal: 200 requests with decision, outcome and score
WINDOW = 10_000  # newest decisions that it is fitted on
ROWS_A_DECISION = 3
PREFIX = "profile."  # of its arrays in a snapshot, beside the policy's

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]


def unpack(state: Arrays, names: Sequence[str], arms: Sequence[Arm]) -> Forecaster | None:
    """The forecasts in the state of a snapshot over arms of these names, for these arms; None if it has none.

    Raises:
        ValueError: the arrays have other shapes, or are not finite.
    """
    mine = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if not mine:
        return None
    known = {arm.name: arm for arm in arms}
    return Forecaster.restored(mine, [known.get(name, Arm(name)) for name in names]).over(arms)


class Refitter:
    """The one owner of what the profiler learns; a part of the router.

    It reads the journal behind the router's back, only rows that are on disk, so that a restart knows the same; as they
    come, so that its memory is as full after minutes as it will ever be, however long it rests.

    Args:
        arms: whose answers to foretell.
        journal: has `last_row` and `replay(after)`.
        rest: times as long as a fit took, until the next one: in a rush decisions need the processor.
    """

    def __init__(self, arms: Sequence[Arm], journal: Any, rest: float = 0.0):
        self.forecaster = Forecaster.prior(arms)
        self._journal, self._rest = journal, rest
        self._read = max(0, journal.last_row - WINDOW * ROWS_A_DECISION)  # the row up to which it has read
        self._fitted = 0  # the last row when it was last fitted
        self._rested_s = 0.0  # when it may be fitted again
        self._ids: deque[str] = deque(maxlen=WINDOW)
        self._ledger = Ledger(WINDOW)

    def configure(self, arms: Sequence[Arm]) -> None:
        """Go on with other arms; what was learned about those that stay is kept."""
        self.forecaster = self.forecaster.over(arms)

    def state(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """For a snapshot."""
        return {PREFIX + name: value for name, value in self.forecaster.state().items()}

    def take(self, state: Arrays, names: Sequence[str]) -> None:
        """Go on from a snapshot over arms of these names, unless it does not fit: the journal teaches it again."""
        try:
            self.forecaster = unpack(state, names, self.forecaster.arms) or self.forecaster
        except ValueError as error:
            log.warning("the snapshot's forecasts are not taken over (%s)", error)

    async def turn(self, silenced: Collection[str] = ()) -> bool:
        """Read what is new, and refit if enough has happened.

        Args:
            silenced: whose scores do not count now (policies/trust.py).

        Returns:
            Whether there is a new version.
        """
        if self._journal.last_row > self._read:
            await asyncio.to_thread(self._catch_up)
        began = time.monotonic()
        if self._journal.last_row - self._fitted < REFIT_EVERY or began < self._rested_s:
            return False
        self._fitted = self._journal.last_row
        before = self.forecaster
        fitted = await asyncio.to_thread(self._refit, before, frozenset(silenced))
        self._rested_s = time.monotonic() + self._rest * (time.monotonic() - began)
        if fitted.version == before.version or self.forecaster.version != before.version:
            return False  # nothing new, or a published version was taken over meanwhile
        self.forecaster = fitted.over(self.forecaster.arms)
        return True

    def _catch_up(self) -> None:
        for row, event in self._journal.replay(after=self._read):
            if isinstance(event, Decision):
                event = structs.replace(event, estimates=())  # most of its size, and of no use here
                self._ids.append(event.id)
            self._ledger.apply(event, policy=None)
            self._read = row

    def _refit(self, before: Forecaster, silenced: Collection[str]) -> Forecaster:
        found = (self._ledger.get(decision_id) for decision_id in self._ids)
        records = [record for record in found if record is not None]
        for record in records:
            record.silenced = silenced
        return before.refit(records)
