"""Trains the forecasts of answers from the journal, outside the router's event loop."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from msgspec import structs

from deployments.journal.snapshot import PREFIX, Arrays, unpack
from policies.events import Decision, Event
from policies.feedback.decision_records import DecisionRecords, History
from policies.profiling.forecast import Forecaster
from policies.types import Arm, Vector

REFIT_EVERY = 600  # rows of the journal: 200 requests with decision, outcome and score
WINDOW = 10_000  # newest decisions that the forecasts are fitted on
ROWS_PER_DECISION = 3

log = logging.getLogger(__name__)


class EventSource(Protocol):
    """What the trainer needs of a journal."""

    last_row: int

    def replay(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """See Journal.replay."""


class ForecastTrainer:
    """Fits the forecasts again when the journal has enough new rows. A part of the router, which owns all learning.

    The trainer reads only rows that are on disk, so a restart learns the same from them. It reads rows as they come,
    even when no fit is due, so the memory in use does not depend on the cooldown.

    Args:
        arms: whose answers to forecast.
        journal: the router's.
        cooldown_factor: the pause after a fit, as a multiple of the fit's duration. Under high load decisions need
            the processor.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        journal: EventSource,
        cooldown_factor: float = 0.0,
    ):
        self.forecaster = Forecaster.prior(arms)
        self._journal = journal
        self._cooldown_factor = cooldown_factor
        # the row up to which the journal has been read
        self._last_read_row = max(0, journal.last_row - WINDOW * ROWS_PER_DECISION)
        self._last_fitted_row = 0  # the journal's last row at the latest fit
        self._cooldown_until_s = 0.0
        self._ids: deque[str] = deque(maxlen=WINDOW)
        # a score may stand in the journal before its decision
        self._records = DecisionRecords(WINDOW, history=History(keeps_unknown=True))

    def configure(self, arms: Sequence[Arm]) -> None:
        """Change the arms. What was learned about arms that stay is kept."""
        self.forecaster = self.forecaster.for_arms(arms)

    def state(self) -> dict[str, Vector]:
        """The forecasts' arrays, for a snapshot."""
        return {PREFIX + name: value for name, value in self.forecaster.state().items()}

    def restore(self, state: Arrays, names: Sequence[str]) -> None:
        """Take over the forecasts of a snapshot whose arms have these names.

        If they do not fit, the present forecasts are kept, and the next fit learns from the journal.
        """
        try:
            self.forecaster = (
                unpack(state, names, self.forecaster.arms) or self.forecaster
            )
        except ValueError as error:
            log.warning("the snapshot's forecasts are not taken over (%s)", error)

    async def run_once(self, silenced: Collection[str] = ()) -> bool:
        """Read the journal's new rows, and fit the forecasts again if enough of them are new.

        Args:
            silenced: keys whose scores do not count now (policies/feedback/reputation.py).

        Returns:
            Whether there is a new version.
        """
        if self._journal.last_row > self._last_read_row:
            await asyncio.to_thread(self._read_new_rows)
        began = time.monotonic()
        new_rows = self._journal.last_row - self._last_fitted_row
        if new_rows < REFIT_EVERY or began < self._cooldown_until_s:
            return False
        self._last_fitted_row = self._journal.last_row
        before = self.forecaster
        fitted = await asyncio.to_thread(self._fit, before, frozenset(silenced))
        ended = time.monotonic()
        self._cooldown_until_s = ended + self._cooldown_factor * (ended - began)
        if fitted.version == before.version:
            return False  # the fit found nothing to learn from
        if self.forecaster.version != before.version:
            return False  # a published version was restored meanwhile
        self.forecaster = fitted.for_arms(self.forecaster.arms)
        return True

    def _read_new_rows(self) -> None:
        for row, event in self._journal.replay(after=self._last_read_row):
            if isinstance(event, Decision):
                # the estimates are most of a decision's size, and forecasts do not need them
                event = structs.replace(event, estimates=())
                self._ids.append(event.id)
            self._records.apply(event, policy=None)
            self._last_read_row = row

    def _fit(self, before: Forecaster, silenced: Collection[str]) -> Forecaster:
        records = []
        for decision_id in self._ids:
            record = self._records.get(decision_id)
            if record is not None:
                record.silenced = silenced
                records.append(record)
        return before.refit(records)
