"""The records of decisions, and the rule by which each event updates a policy exactly once.

The router's state is a fold over the events: the same code runs live, after a restart and in a replay. Events commute:
in whatever order and however often they arrive, the same votes count in the end. There is one exception: if more than
MAX_SOURCES sources score one decision, those that came first count.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from policies.base import EventLearner
from policies.events import (
    ACCEPTED,
    ANY_OWNER,
    DUPLICATE,
    MAX_SOURCES,
    PENDING,
    REPEATED,
    TOO_MANY_SOURCES,
    UNANSWERED,
    UNKNOWN,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
)
from policies.feedback.reputation import KeyReputation
from policies.profiling.features import D

PENDING_CAPACITY = 10_000  # unknown decisions for which events are kept
OUTCOME = (
    "",
    "",
)  # where the outcome of an unknown decision is kept; a score has a source


class History:
    """The decision records that are no longer in memory. This history has none.

    Args:
        keeps_unknown: keep an event of an unknown decision until the decision arrives, instead of refusing it.
    """

    def __init__(self, keeps_unknown: bool = False):
        self._status = PENDING if keeps_unknown else UNKNOWN

    def find(self, decision_id: str) -> Record | None:
        """The record of a decision; None if there is none."""
        return None

    def status_without_decision(self, decision_id: str) -> str:
        """The status of an event whose decision is unknown.

        PENDING keeps the event until the decision arrives; any other status refuses it.
        """
        return self._status


class EventProjection(Protocol):
    """Derives state from the events that change decision records."""

    def record(self, event: Event, record: Record) -> None:
        """Take in an event that has changed this decision record; a policy learns from it afterwards."""


class DecisionRecords:
    """The records of the most recent decisions, in memory.

    Attributes:
        scored: number of decisions that have had a score; the forgetting clock of quality. The scores of a calibration
            do not tick it, because no traffic passes meanwhile.

    Args:
        capacity: number of records in memory.
        history: has the records of older decisions.
        projection: takes in every event that changes a record; None if there is none.
        reputation: decides which keys' scores count; None counts the scores of all keys.
    """

    def __init__(
        self,
        capacity: int = 10_000,
        history: History | None = None,
        projection: EventProjection | None = None,
        reputation: KeyReputation | None = None,
    ):
        self._records: OrderedDict[str, Record] = OrderedDict()
        # By decision, then by owner and source. One key's scores do not displace another's: it is not known yet which
        # of them owns the decision.
        self._pending: OrderedDict[str, dict[tuple[str, str], Outcome | Feedback]] = (
            OrderedDict()
        )
        self._capacity = capacity
        self._history = history or History()
        self._projection = projection
        self.reputation = reputation
        self.scored = 0

    @property
    def pending_scores(self) -> int:
        """Number of scores that are kept until their decision arrives."""
        return sum(
            len(waiting.keys() - {OUTCOME}) for waiting in self._pending.values()
        )

    @property
    def pending(self) -> tuple[str, ...]:
        """The unknown decisions for which events are kept, in the order of their first event."""
        return tuple(self._pending)

    def get(self, decision_id: str) -> Record | None:
        """The record of a decision, from memory or from the history."""
        record = self._records.get(decision_id)
        if record is None:
            record = self._history.find(decision_id)
            if record is not None:
                self.add(record)
        return record

    def add(self, record: Record) -> None:
        """Add a record to memory as the newest."""
        self._records[record.decision.id] = record
        if self.reputation is not None:
            record.silenced = self.reputation.silenced
        while len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def take_over(self, other: "DecisionRecords") -> None:
        """Replace the records, and the reputation that decides which scores count, by those of another instance."""
        self._records = other._records
        self._pending = other._pending
        self.reputation = other.reputation
        self.scored = other.scored

    def remove(self, decision_ids: Iterable[str]) -> None:
        """Remove these decisions from memory, with the events that wait for them."""
        for decision_id in decision_ids:
            self._records.pop(decision_id, None)
            self._pending.pop(decision_id, None)

    def unknown_ids(self, decision_ids: Iterable[str]) -> list[str]:
        """Those of these decisions that are not in memory; the known ones are marked as the newest."""
        absent = []
        for decision_id in decision_ids:
            if decision_id in self._records:
                self._records.move_to_end(decision_id)
            else:
                absent.append(decision_id)
        return absent

    def apply(
        self, event: Event, policy: EventLearner | None, fresh: bool = False
    ) -> str:
        """Apply one event to its record and to the policy, unless it was applied before.

        Args:
            event: a decision, outcome or feedback; the order does not matter.
            policy: learns from the event. None updates the record only, for events that a snapshot already contains.
            fresh: the caller knows that this decision is new, so the history is not asked.

        Returns:
            ACCEPTED; DUPLICATE if nothing changed; REPEATED, PENDING, TOO_MANY_SOURCES or UNANSWERED (events.py);
            UNKNOWN if the decision belongs to another owner; or the status of History.status_without_decision.
        """
        if isinstance(event, Decision):
            if event.id in self._records:
                return DUPLICATE
            if not fresh and self.get(event.id) is not None:
                return DUPLICATE
            record = Record(event)
            self.add(record)
            self.scored = max(self.scored, event.scored)
            self._project(event, record)
            for early in self._pending.pop(event.id, {}).values():
                self._apply_to(record, early, policy)
            return ACCEPTED
        known = self.get(event.decision_id)
        if known is not None:
            return self._apply_to(known, event, policy)
        status = self._history.status_without_decision(event.decision_id)
        return self._add_pending(event) if status == PENDING else status

    def _add_pending(self, event: Outcome | Feedback) -> str:
        waiting = self._pending.setdefault(event.decision_id, {})
        key = OUTCOME
        if isinstance(event, Feedback):
            key = (event.owner, event.source)
        earlier = waiting.get(key)
        if isinstance(earlier, Outcome):
            return DUPLICATE
        if (
            earlier is not None
            and isinstance(event, Feedback)
            and not _counts_after(event, earlier.score, earlier.time_s)
        ):
            return DUPLICATE
        of_owner = sum(owner == key[0] for owner, _ in waiting.keys() - {OUTCOME})
        if key not in waiting and key != OUTCOME and of_owner >= MAX_SOURCES:
            return TOO_MANY_SOURCES
        waiting[key] = event
        while len(self._pending) > PENDING_CAPACITY:
            self._pending.popitem(last=False)
        return PENDING

    def _project(self, event: Event, record: Record) -> None:
        if self._projection is not None:
            self._projection.record(event, record)

    def _apply_to(
        self, record: Record, event: Outcome | Feedback, policy: EventLearner | None
    ) -> str:
        if record.decision.profile.features.shape != (D,):
            # A version with other features made this decision: the policy cannot learn from it.
            policy = None
        if isinstance(event, Outcome):
            if record.outcome is not None:
                return DUPLICATE
            before = record.vote
            record.outcome = event
            self._project(event, record)
            if policy is not None:
                policy.learn(record.decision, event)
                # A score may have arrived before the outcome that shows the flaw.
                _replace(policy, record.decision, before, record.vote)
            return ACCEPTED
        if event.owner not in (record.decision.owner, ANY_OWNER):
            return UNKNOWN
        if record.refused:
            return UNANSWERED
        if event.source not in record.scores and len(record.scores) >= MAX_SOURCES:
            return TOO_MANY_SOURCES
        earlier = record.scores.get(event.source)
        if earlier is not None and not _counts_after(
            event, earlier, record.times[event.source]
        ):
            return DUPLICATE
        record.times[event.source] = event.time_s
        if earlier == event.score:
            return REPEATED
        before = record.vote
        self.scored += not record.scores and not record.is_calibration
        corrected = earlier if record.owners.get(event.source) == event.owner else None
        record.scores[event.source] = event.score
        record.owners[event.source] = event.owner
        if earlier is not None:
            record.corrected.add(event.source)
        self._project(event, record)
        if policy is not None:
            _replace(policy, record.decision, before, record.vote)
            if self.reputation is not None and self.reputation.observe(
                event, record.decision, corrected
            ):
                self._apply_standing(self.reputation, event, policy)
        return ACCEPTED

    def _apply_standing(
        self, reputation: KeyReputation, event: Feedback, policy: EventLearner
    ) -> None:
        """Change a key's standing, and withdraw its latest votes or restore them."""
        records = []
        for decision_id in reputation.recent(event.owner):
            record = self.get(decision_id)
            if record and record.decision.profile.features.shape == (D,):
                records.append(record)
        before = [record.vote for record in records]
        reputation.update(event)
        for record, vote in zip(records, before, strict=True):
            _replace(policy, record.decision, vote, record.vote, again=True)


def _counts_after(event: Feedback, score: float, time_s: float) -> bool:
    """Whether a score of the same source replaces this one: it is later or, of two at the same time, the lower one."""
    return (event.time_s, -event.score) > (time_s, -score)


def _replace(
    policy: EventLearner,
    decision: Decision,
    before: float | None,
    after: float | None,
    again: bool = False,
) -> None:
    """Withdraw a decision's earlier vote from the policy, and add the new one."""
    if before == after:
        return
    if before is not None:
        policy.score(decision, before, weight=-1.0)
    if after is not None:
        policy.score(decision, after, again=again or before is not None)
