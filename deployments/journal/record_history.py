"""Finds in the journal the decision records that the router no longer has in memory."""

from collections.abc import Sequence
from math import inf

from deployments.journal.ids import IdFactory
from deployments.journal.journal import Journal
from policies.events import PENDING, UNKNOWN, Record
from policies.feedback.decision_records import DecisionRecords, History

# maximum delay until a decision that an ingress made by itself has reached the router
MAX_LOCAL_DELAY_S = 900.0


class JournalHistory(History):
    """The decision records of one journal.

    Attributes:
        last_row: the records contain the journal's events up to this row; during a replay the row before the event that
            is applied next, otherwise infinite.
        now_s: time of the current call, in seconds since the epoch.

    Args:
        journal: the journal.
        ids: reads the time from the id of a decision.
    """

    def __init__(self, journal: Journal, ids: IdFactory):
        super().__init__()
        self.last_row: float = inf
        self.now_s = 0.0
        self._journal = journal
        self._ids = ids

    def find(self, decision_id: str) -> Record | None:
        """The record of a decision; None if the journal does not have the decision."""
        return self.find_all([decision_id]).get(decision_id)

    def find_all(self, decision_ids: Sequence[str]) -> dict[str, Record]:
        """The records of these decisions; decisions that the journal does not have are left out."""
        if not decision_ids:
            return {}
        records = DecisionRecords(history=History(keeps_unknown=True))
        for events in self._journal.find_all(decision_ids, self.last_row).values():
            for event in events:
                records.apply(event, None, fresh=True)
        found = {}
        for decision_id in decision_ids:
            record = records.get(decision_id)
            if record is not None:
                found[decision_id] = record
        return found

    def status_without_decision(self, decision_id: str) -> str:
        """The status of an event whose decision is neither in memory nor in the journal.

        The learner has already refused the events of decisions that retention deleted.
        """
        if self.last_row < inf:
            return PENDING  # the journal has the event, so it was accepted before
        created_s = self._ids.created_at(decision_id)
        if created_s is not None and self.now_s - created_s < MAX_LOCAL_DELAY_S:
            return PENDING
        return UNKNOWN
