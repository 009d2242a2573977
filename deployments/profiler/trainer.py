"""Trains the forecasts of answers from the journal, outside the router's event loop."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from msgspec import structs

from deployments.journal.snapshot import PREFIX, Arrays, unpack
from policies.events import Decision, Event, Record
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


class RecentRecords:
    """The records of the newest decisions in a journal, read as the rows come.

    Attributes:
        last_row: the row up to which the journal has been read.
        records: of the decisions.

    Args:
        last_row: the row after which reading begins.
    """

    def __init__(self, last_row: int):
        self.last_row = last_row
        # a score may stand in the journal before its decision
        self.records = DecisionRecords(WINDOW, history=History(keeps_unknown=True))
        self._ids: deque[str] = deque(maxlen=WINDOW)

    def read(self, journal: EventSource) -> None:
        """Read the new rows; blocking."""
        for row, event in journal.replay(after=self.last_row):
            if isinstance(event, Decision):
                # the estimates are most of a decision's size, and forecasts do not need them
                event = structs.replace(event, estimates=())
                self._ids.append(event.id)
            self.records.apply(event, policy=None)
            self.last_row = row

    def newest(self, silenced: Collection[str]) -> list[Record]:
        """The records, in which the scores of these keys do not count."""
        found = []
        for decision_id in self._ids:
            record = self.records.get(decision_id)
            if record is not None:
                record.silenced = silenced
                found.append(record)
        return found


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
        self._recent = self._unread()
        self._last_fitted_row = 0  # the journal's last row at the latest fit
        self._cooldown_until_s = 0.0

    def _unread(self) -> RecentRecords:
        return RecentRecords(
            max(0, self._journal.last_row - WINDOW * ROWS_PER_DECISION)
        )

    def start_over(self, state: Arrays, names: Sequence[str]) -> None:
        """Take over the forecasts of a snapshot under a new number, and read the journal again before the next fit.

        Args:
            state: arrays of the snapshot; forecasts that do not fit, or are missing, are replaced by the prior ones.
            names: the arms of the snapshot.
        """
        version = self.forecaster.version + 1
        self.forecaster = Forecaster.prior(self.forecaster.arms)
        self.restore(state, names)
        # those who have the forecasts of the old number fetch the new ones
        self.forecaster = replace(self.forecaster, version=version)
        self._recent = self._unread()
        self._last_fitted_row = 0

    def forget_decisions(self, gone: Collection[str]) -> None:
        """Remove these decisions from the next fit."""
        self._recent.records.remove(gone)

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
        recent = self._recent
        if self._journal.last_row > recent.last_row:
            await asyncio.to_thread(recent.read, self._journal)
        if recent is not self._recent:
            return False
        began = time.monotonic()
        new_rows = self._journal.last_row - self._last_fitted_row
        if new_rows < REFIT_EVERY or began < self._cooldown_until_s:
            return False
        self._last_fitted_row = self._journal.last_row
        before = self.forecaster
        fitted = await asyncio.to_thread(
            lambda: before.refit(recent.newest(frozenset(silenced)))
        )
        ended = time.monotonic()
        self._cooldown_until_s = ended + self._cooldown_factor * (ended - began)
        if fitted.version == before.version:
            return False  # the fit found nothing to learn from
        if self.forecaster.version != before.version:
            return False  # a published version was restored meanwhile
        self.forecaster = fitted.for_arms(self.forecaster.arms)
        return True
