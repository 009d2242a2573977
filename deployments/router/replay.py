"""Replays the journal into a policy: all of it, or the rows since a version was published."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from math import inf
from types import MappingProxyType
from typing import cast

import msgspec
from msgspec import structs

from deployments.journal.forgotten import ForgottenScores
from deployments.journal.journal import Journal
from deployments.journal.snapshot import Snapshot
from deployments.router.learner import Learner, Projection
from deployments.router.model_revisions import RevisionState
from policies.base import EventLearner, Policy, shift_sequence
from policies.events import Decision, Event, Record
from policies.feedback.decision_records import EventProjection
from policies.feedback.reputation import with_decisions


class JournalView:
    """A read-only part of a journal: a snapshot at one row, and the events from there up to another row.

    Args:
        journal: the whole journal.
        row: the row of the snapshot; the events after it are part of the view.
        snapshot: what was learned up to that row; None if the policies bring their own state.
        up_to: the last row of the view.
        forgotten: the scores that are no part of the view; by default those that count no more.
    """

    def __init__(
        self,
        journal: Journal,
        row: int,
        snapshot: Snapshot | None,
        up_to: float = inf,
        forgotten: ForgottenScores | None = None,
    ):
        self._forgotten = forgotten
        self._journal = journal
        self._row = row
        self._snapshot = snapshot
        self._up_to = up_to
        self.salt = journal.salt

    def snapshot(self) -> tuple[int, Snapshot | None]:
        """See Journal.snapshot."""
        return self._row, self._snapshot

    @property
    def revisions(self) -> dict[str, object]:
        """See Journal.revisions; changes after the last row of the view are left out."""
        state = msgspec.convert(self._journal.revisions, RevisionState)
        visible = [change for change in state.successions if change.row <= self._up_to]
        plain: dict[str, object] = msgspec.to_builtins(
            structs.replace(state, successions=visible)
        )
        return plain

    def pages(self, after: int = 0) -> Iterator[list[tuple[int, Event]]]:
        """See Journal.pages."""
        for page in self._journal.pages(after, self._forgotten):
            if page[0][0] > self._up_to:
                return
            yield [item for item in page if item[0] <= self._up_to]

    def find_all(
        self, decision_ids: Collection[str], up_to: float = inf
    ) -> dict[str, list[Event]]:
        """See Journal.find_all."""
        up_to = min(up_to, self._up_to)
        return self._journal.find_all(decision_ids, up_to, self._forgotten)


class RecordCollector(Projection):
    """Projection that keeps all decision records of a replay.

    Attributes:
        records: by decision, in the order of the decisions.

    Args:
        other: takes in the same events; None if there is none.
    """

    def __init__(self, other: EventProjection | None = None):
        self.records: dict[str, Record] = {}
        self._other = other

    def record(self, event: Event, record: Record) -> None:
        """See Projection."""
        self.records[record.decision.id] = record
        if self._other is not None:
            self._other.record(event, record)


def replay(
    view: JournalView,
    make: Callable[[], EventLearner],
    projection: Projection | None = None,
    reputation: Mapping[str, object] = MappingProxyType({}),
) -> Learner:
    """Replay a part of the journal into a new policy; blocking.

    Args:
        view: the part of the journal.
        make: makes what learns from the events; a Policy if the caller uses it as one afterwards.
        projection: takes in every event that changes a decision record, before the policy learns from it.
        reputation: state of the key reputation at the start, where the view has no snapshot.

    Returns:
        The learner with the policy; it must not write.
    """
    journal = cast(Journal, view)  # a learner that is only constructed does not write
    make_policy = cast(Callable[[], Policy], make)  # a replay makes no decisions
    return Learner(journal, make_policy, projection, reputation=reputation)


def row_of(snapshot: Snapshot, journal: Journal) -> int:
    """The last row of this journal that a version has learned from; 0 if it learned from another journal.

    Raises:
        ValueError: the version does not name its journal, the rows after its last one were deleted, or it has learned
            from scores that count no more.
    """
    if not snapshot.journal:
        raise ValueError(
            f"version {snapshot.version} does not say from which rows it learned; choose a newer one"
        )
    row = snapshot.row if snapshot.journal == journal.id else 0
    oldest = journal.first_row(after=row) or row + 1
    # rows may also be missing because they were erased (journal/personal_data.py)
    if oldest > row + 1 and journal.retention.deletable_row > row:
        raise ValueError(
            f"version {snapshot.version} has learned up to row {row} of the journal, of which {oldest} is the oldest "
            "that is kept; choose a newer version, or raise journal_retention_days"
        )
    require_unforgotten(snapshot.version, row, journal, journal.forgotten.after(row))
    return row


def require_unforgotten(
    version: int, row: int, journal: Journal, forgotten: ForgottenScores
) -> None:
    """Refuse a version that has learned from scores that count no more.

    Args:
        version: its number, for the message.
        row: the last row that it has learned from.
        journal: the router's journal.
        forgotten: the scores that count no more, as far as the version does not leave them out.

    Raises:
        ValueError: it has; the message says from how many, and since when.
    """
    if not forgotten:
        return
    times = [
        score.time_s
        for number, score in journal.scores(row)
        if forgotten.covers(number, score)
    ]
    if times:
        first = datetime.fromtimestamp(min(times), UTC).isoformat(timespec="seconds")
        raise ValueError(
            f"version {version} has learned from {len(times)} of the forgotten scores, of which the first arrived at "
            f"{first}; choose a version that was registered before"
        )


def catch_up(
    journal: Journal, snapshot: Snapshot, make: Callable[[], Policy], up_to: float
) -> Learner:
    """Replay the rows that a version has not learned from yet; blocking.

    Args:
        journal: the router's journal.
        snapshot: the version.
        make: makes the policy of the version.
        up_to: the last row to replay.

    Returns:
        The learner, whose policy is the version as if it had learned up to that row.

    Raises:
        ValueError: see row_of.
    """
    row = row_of(snapshot, journal)
    held = snapshot.held if row else ()
    newest = journal.snapshot()[1]
    # a version that was published without a reputation starts with the one that the router has now
    current = newest.trust if newest else {}
    reputation = current
    if snapshot.trust:
        reputation = with_decisions(snapshot.trust, current)
    start = replace(snapshot, held=held, trust=reputation)
    if snapshot.journal != journal.id:
        # the version learned elsewhere, where decisions had other sequence numbers
        sequence, scored = _first_clocks(journal)
        state = shift_sequence(
            start.state, start.sequence - sequence, start.scored - scored
        )
        start = replace(start, trust={}, state=state, sequence=sequence, scored=scored)
    return replay(JournalView(journal, row, start, up_to), make)


def _first_clocks(journal: Journal) -> tuple[int, int]:
    """Sequence number and clock of scores of the first decision in a journal.

    They are not 0 if its router started from a published version.
    """
    for page in journal.pages():
        for _, event in page:
            if isinstance(event, Decision):
                return event.sequence, max(0, event.scored)
    return 0, 0
