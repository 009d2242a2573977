"""Learner: keeps the policy, the decision records and the journal consistent.

The router is event-sourced. `Learner.apply` is the one path of an event, and a restart replays the journal through
the same code. This module does not know Ray, so tests can kill and restart it often.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from math import inf
from types import MappingProxyType

from msgspec import structs

from deployments import runtime
from deployments.journal.ids import IdFactory
from deployments.journal.journal import Journal
from deployments.journal.record_history import JournalHistory
from deployments.journal.snapshot import Snapshot
from deployments.router.model_revisions import ModelRevisions, RevisionChange
from policies.base import Policy, restore_for_arms
from policies.events import (
    ACCEPTED,
    BUSY,
    EXPIRED,
    NOTED,
    REUSED,
    UNKNOWN,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
)
from policies.feedback.decision_records import DecisionRecords, History
from policies.feedback.reputation import KeyReputation, without_decisions

log = logging.getLogger(__name__)


class Projection:
    """State that is derived from the same events as the policy, and that snapshots contain. This one has no state.

    Attributes:
        replaying: whether the events of `record` come from the journal, and were counted before.
        rebuild_rows: number of rows up to the snapshot that `rebuild` wants again, for windows of the latest events
            that snapshots do not contain.
    """

    replaying = False
    rebuild_rows = 0

    def record(self, event: Event, record: Record) -> None:
        """Take in an event that has changed this decision record; the policy learns from it afterwards."""

    def reset(self) -> None:
        """Forget the events that were counted, because the whole journal is about to be replayed."""

    def rebuild(self, event: Event, record: Record) -> None:
        """Take in an event that the restored snapshot contains already."""

    def add_to(self, snapshot: Snapshot) -> Snapshot:
        """Add the own state to a snapshot."""
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the own state from a snapshot; its `pacer` is empty if the whole journal will be replayed."""


class _Rebuild:
    """Gives events that a snapshot contains to the projection; the policy does not learn from them."""

    def __init__(self, projection: Projection, reputation: KeyReputation):
        self._projection = projection
        self._reputation = reputation

    def record(self, event: Event, record: Record) -> None:
        """See EventProjection."""
        record.silenced = self._reputation.silenced
        self._projection.rebuild(event, record)


class Learner:
    """The only owner of what the router has learned.

    Attributes:
        policy: learns from the events.
        sequence: number of decisions made so far.
        version: the last published version of the policy.
        window_s: feedback for decisions older than this is refused.
        records: the decision records.
        reputation: the reputation of the API keys that give feedback.
        revisions: the model revisions behind the arms.
        consistent: False while the policy lacks events that the journal has, because a replay has failed.

    Args:
        journal: stores the events; the learner starts from its last snapshot.
        make: makes a policy that has learned nothing.
        projection: derives more state from the same events.
        window_s: see the attributes.
        reputation: state of the key reputation at the start, where the journal has no snapshot.
    """

    def __init__(
        self,
        journal: Journal,
        make: Callable[[], Policy],
        projection: Projection | None = None,
        window_s: float = inf,
        reputation: Mapping[str, object] = MappingProxyType({}),
    ):
        self.journal = journal
        self.ids = IdFactory(journal.salt)
        self.window_s = window_s
        self.policy = make()
        self.sequence = 0
        self.records = DecisionRecords()
        self.version = 0
        self.consistent = True
        self._make = make
        self._projection = projection or Projection()
        self._history = JournalHistory(journal, self.ids)
        self._initial_reputation = dict(reputation)
        self._busy_keys: set[str] = set()  # idempotency keys of requests in progress
        self._replay_journal()

    @property
    def quarantined(self) -> dict[str, dict[str, object]]:
        """The keys whose scores contradict all others', with the evidence; their scores do not count."""
        return self.reputation.quarantined

    @property
    def suspended(self) -> set[str]:
        """The keys whose scores do not count at present: the quarantined ones, and those under suspicion."""
        return self.reputation.silenced

    # --- the path of an event -----------------------------------------------------------------------------------

    def apply(self, event: Event, fresh: bool = False) -> str:
        """Apply one event exactly once.

        The order of effects is always the same:

        1. The decision record changes, or refuses the event (DecisionRecords.apply).
        2. The projection takes the event in (Projection.record).
        3. The policy learns from the event. If the score changes a key's reputation, the policy unlearns or
           relearns the key's latest scores.
        4. The event is queued for the journal. The caller flushes the journal and acknowledges the event afterwards.

        A replay runs steps 1 to 3 for every event of the journal, with the same code.

        Args:
            event: a decision, an outcome or a score.
            fresh: the caller knows that this decision is new.

        Returns:
            The status of the event (policies/events.py).
        """
        quarantined = len(self.quarantined)
        status = self._fold(event, fresh)
        if len(self.quarantined) != quarantined:
            names = ", ".join(self.quarantined) or "none"
            log.warning("the scores of these keys count no more: %s", names)
        if status in NOTED:
            self.journal.put(event)
        return status

    def _fold(self, event: Event, fresh: bool) -> str:
        """Steps 1 to 3 of `apply`."""
        if isinstance(event, Decision):
            event = self._dated(event)
        scored = self.records.scored
        status = self.records.apply(event, self.policy, fresh)
        if self.records.scored != scored:
            self.policy.advance(self.sequence, self.records.scored)
        if isinstance(event, Decision) and status == ACCEPTED:
            self.sequence = max(self.sequence, event.sequence + 1)
        return status

    # --- restart and replay -------------------------------------------------------------------------------------

    def _replay_journal(self, ignore_snapshot: bool = False) -> None:
        """Restore the last snapshot and replay the rows after it, or all rows if the snapshot does not fit."""
        row, snapshot = self.journal.snapshot()
        self.revisions = ModelRevisions(self.journal.revisions)
        if snapshot is not None and (ignore_snapshot or not self.restore(snapshot)):
            log.warning(
                "learning from the whole journal: its snapshot is of the policy '%s'",
                snapshot.policy,
            )
            row = 0
            snapshot = None
        if snapshot is None:
            self._projection.reset()
        self._start_records(row, snapshot)
        self.policy.advance(self.sequence, self.records.scored)
        self._projection.replaying = True
        try:
            with runtime.gc_paused():
                self._rebuild_windows(row)
                self._replay_rows(row)
        finally:
            self._projection.replaying = False
        self._history.last_row = inf

    def _start_records(self, row: int, snapshot: Snapshot | None) -> None:
        """Start with empty decision records, which find older records in the journal up to this row."""
        self.reputation = KeyReputation()
        self.reputation.restore(
            self._initial_reputation if snapshot is None else snapshot.trust
        )
        self._history.last_row = row
        self.records = DecisionRecords(
            history=self._history,
            projection=self._projection,
            reputation=self.reputation,
        )
        self.records.scored = snapshot.scored if snapshot else 0
        held = snapshot.held if snapshot else ()
        for events in self.journal.find_all(held, up_to=row).values():
            for event in events:
                self.records.apply(event, None)

    def _rebuild_windows(self, row: int) -> None:
        """Give the projection the last rows up to this one again."""
        after = max(0, row - self._projection.rebuild_rows)
        if after == row:
            return
        records = DecisionRecords(
            history=History(keeps_unknown=True),
            projection=_Rebuild(self._projection, self.reputation),
        )
        for page in self.journal.pages(after=after):
            for number, event in page:
                if number > row:
                    return
                records.apply(event, None, fresh=True)

    def _replay_rows(self, row: int) -> None:
        """Replay the rows after this one; each change of a model revision is applied at its row."""
        changes = self.revisions.after(row)
        for page in self.journal.pages(after=row):
            self._history.last_row = page[0][0] - 1
            self._preload_records([event for _, event in page])
            self._advance_to([event for _, event in page])
            for number, event in page:
                while changes and changes[0].row < number:
                    self._discount(changes.pop(0))
                # a record that is looked up now must not contain this event yet
                self._history.last_row = number - 1
                self._fold(event, fresh=True)
            self.policy.advance(self.sequence, self.records.scored)
        for change in changes:
            self._discount(change)

    def absorb(self, events: Sequence[tuple[int, Event]]) -> None:
        """Learn from rows that another learner has put into the journal after the last row that this one has."""
        for number, event in events:
            self._history.last_row = number - 1
            self._fold(event, fresh=True)
        self._history.last_row = inf

    def take_over(self, other: "Learner") -> None:
        """Replace the decision records and the reputation by those of a learner of the same journal.

        The caller has replaced what the policy and the projection have learned.
        """
        self.records.take_over(other.records)
        self.reputation = other.reputation
        self.policy.advance(self.sequence, self.records.scored)

    def forget_decisions(self, gone: Collection[str]) -> None:
        """Remove these decisions from memory; what was learned from them stays."""
        self.records.remove(gone)
        self.reputation.restore(without_decisions(self.reputation.state(), gone))

    def _advance_to(self, events: Sequence[Event]) -> None:
        """Advance the policy's clocks to the first of these decisions; rows before it may have been deleted."""
        for event in events:
            if isinstance(event, Decision):
                self.policy.advance(
                    max(self.sequence, event.sequence),
                    max(self.records.scored, event.scored),
                )
                return

    def _preload_records(self, events: Sequence[Event]) -> None:
        """Look up the records that these events need, with one query."""
        made = {event.id for event in events if isinstance(event, Decision)}
        needed = {
            event.decision_id for event in events if not isinstance(event, Decision)
        }
        missing = self.records.unknown_ids(needed - made)
        for record in self._history.find_all(missing).values():
            self.records.add(record)

    def restore(self, snapshot: Snapshot) -> bool:
        """Restore a snapshot.

        Returns:
            Whether the snapshot fits the policy; if not, the policy has learned nothing.
        """
        self.sequence = max(self.sequence, snapshot.sequence)
        self.version = snapshot.version
        fits = snapshot.policy == self.policy.name
        try:
            if fits:
                restore_for_arms(self.policy, snapshot.state, snapshot.arms)
        except ValueError as error:
            log.warning("%s", error)
            self.policy = self._make()
            self.policy.advance(0, self.records.scored)
            fits = False
        if fits:
            self.records.scored = max(self.records.scored, snapshot.scored)
        self._projection.restore(snapshot if fits else replace(snapshot, pacer={}))
        return fits

    async def replace_policy(
        self, make: Callable[[], Policy], before: Snapshot | None = None
    ) -> None:
        """Continue with another policy.

        Args:
            make: makes the policy.
            before: restored if it fits (by default the present state); otherwise the whole journal is replayed.
        """
        before = before or self.snapshot()
        self._make = make
        self.policy = make()
        if self.consistent and self.restore(before):
            self.policy.advance(self.sequence, self.records.scored)
            return
        # stays False if the replay fails: the next call must not restore the incomplete state
        self.consistent = False
        while self.journal.busy:
            await self.journal.flush()
        self.policy = make()
        self._replay_journal(ignore_snapshot=True)
        self.consistent = True

    # --- snapshots ----------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Everything that is learned at present."""
        snapshot = Snapshot(
            policy=self.policy.name,
            arms=tuple(arm.name for arm in self.policy.arms),
            sequence=self.sequence,
            scored=self.records.scored,
            version=self.version,
            state=self.policy.state(),
            held=self.records.pending,
            row=self.journal.last_row,
            journal=self.journal.id,
            lineage=self.revisions.state(),
            trust=self.reputation.state(),
        )
        return self._projection.add_to(snapshot)

    def put_snapshot(self) -> None:
        """Queue a snapshot for the next write, unless it would lack events that the journal has."""
        if self.consistent:
            self.journal.put_snapshot(self.snapshot())

    async def save(self) -> None:
        """Write a snapshot; returns when it is durable."""
        self.put_snapshot()
        await self.journal.flush()

    async def update_revisions(self, digests: Mapping[str, str]) -> None:
        """Record which models are deployed; a new revision is discounted at once, and durably.

        Args:
            digests: digest of the model that is deployed for an arm.
        """
        before = dict(self.revisions.digests)
        changes = self.revisions.update(
            self.policy.arms, digests, self.journal.last_row
        )
        for change in changes:
            self._discount(change)
        if self.revisions.digests != before:
            await self.save()

    def _discount(self, change: RevisionChange) -> None:
        self.policy.discount(change.arm, change.keep)

    async def apply_retention(self, now_s: float) -> None:
        """Delete old rows; events that belong to their decisions are refused from then on."""
        if await self.journal.retention.apply(now_s):
            await self.save()

    # --- live events --------------------------------------------------------------------------------------------

    def _expired(self, decision_id: str, window_s: float = inf) -> bool:
        """Whether a decision is older than the journal's retention, or than a window."""
        created_s = self.ids.created_at(decision_id)
        if created_s is None:
            record = self.records.get(decision_id)
            if record is not None:
                created_s = record.decision.time_s or None
        if created_s is None:
            return False
        if created_s <= self.journal.retention.deleted_before_s:
            return True
        return self._history.now_s - created_s > window_s

    def record_decisions(self, decisions: Sequence[Decision]) -> int:
        """Apply decisions that were made just now; they become durable with the next write.

        Returns:
            How many of them are not recorded now, because the journal is full. A decision comes again with its outcome.
        """
        if self.journal.full:
            return len(decisions)
        for decision in decisions:
            self.apply(self._dated(decision), fresh=True)
        return 0

    def _dated(self, decision: Decision) -> Decision:
        """The decision with the clock of scores, which a policy that does not learn leaves out."""
        if decision.scored >= 0:
            return decision
        return structs.replace(decision, scored=self.records.scored)

    def unseen(self, decisions: Iterable[Decision]) -> list[Decision]:
        """The decisions that neither the records nor the journal have; asks the journal once."""
        made = {decision.id: decision for decision in decisions}
        missing = self.records.unknown_ids(made)
        for record in self._history.find_all(missing).values():
            self.records.add(record)
        return [made[decision_id] for decision_id in self.records.unknown_ids(missing)]

    async def observe(
        self,
        finished: Sequence[tuple[Decision, Outcome]],
        time_s: float,
        unseen: Sequence[Decision] = (),
        scores: Sequence[Feedback] = (),
    ) -> list[Outcome]:
        """Learn from outcomes. Each comes with its decision, which the router may never have seen or lost in a crash.

        Args:
            finished: decisions with their outcomes.
            time_s: the present time, in seconds since the epoch.
            unseen: the decisions that are known to be new.
            scores: of these answers; they become durable together with them.

        Returns:
            The outcomes that were new, when all of them are durable.

        Raises:
            JournalFullError: none of them was taken; the caller keeps them and tries again.
        """
        self.journal.check_room()
        self._history.now_s = time_s
        new = []
        unseen_ids = {decision.id for decision in unseen}
        # decisions of the ingresses count for the clock of forgetting, too
        self.policy.advance(self.sequence, self.records.scored)
        for decision, outcome in finished:
            if self._expired(decision.id):
                continue
            fresh = decision.id in unseen_ids
            if fresh:
                # an ingress does not know how many decisions the others have made
                decision = self._dated(
                    structs.replace(decision, sequence=self.sequence)
                )
            self.apply(decision, fresh)
            if self.apply(outcome) != ACCEPTED:
                continue
            new.append(outcome)
        for score in scores:
            if not self._expired(score.decision_id):
                self.apply(score)
        await self.journal.flush()
        return new

    def find_records(self, decision_ids: Sequence[str]) -> dict[str, Record]:
        """The records of these decisions in the journal; blocking. Rows that are not on disk yet are left out."""
        return self._history.find_all(decision_ids)

    async def feedback(
        self,
        items: Sequence[Feedback],
        time_s: float,
        reply_to: tuple[str, str] = ("", ""),
    ) -> list[str]:
        """Learn from scores.

        Args:
            items: the scores.
            time_s: the present time, in seconds since the epoch.
            reply_to: idempotency key of the request and digest of its body, to store the reply.

        Returns:
            The status of each score, when all of them are durable: accepted, duplicate, pending, too_many_sources,
            unanswered, unknown or expired.

        Raises:
            JournalFullError: none of them was taken; the client may send them again.
        """
        self.journal.check_room()
        self._history.now_s = time_s
        statuses = []
        for item in items:
            status = EXPIRED
            if not self._expired(item.decision_id, self.window_s):
                status = self.apply(item)
            statuses.append("duplicate" if status == "repeated" else status)
        if any(status not in (UNKNOWN, EXPIRED) for status in statuses):
            if reply_to[0]:
                self.journal.put_reply(*reply_to, statuses[0])
            await self.journal.flush()
        return statuses

    async def feedback_once(self, item: Feedback, time_s: float, key: str) -> str:
        """Learn from a score at most once per idempotency key; later requests with the key get the same reply.

        Args:
            item: the score.
            time_s: the present time, in seconds since the epoch.
            key: the idempotency key.

        Returns:
            A status as `feedback` returns it; BUSY while the first request with the key is in progress; REUSED if
            the first request with the key had another body.
        """
        digest = digest_of(item)
        key = _digest(key)  # keys may have any length and any characters
        if key in self._busy_keys:
            return BUSY
        self._busy_keys.add(key)
        try:
            earlier = await asyncio.to_thread(self.journal.reply, key)
            if earlier is not None:
                earlier_digest, status = earlier
                return status if earlier_digest == digest else REUSED
            statuses = await self.feedback([item], time_s, (key, digest))
            return statuses[0]
        finally:
            self._busy_keys.discard(key)


def digest_of(item: Feedback) -> str:
    """Digest of the body of a request with a score."""
    return _digest(f"{item.decision_id}\n{item.score!r}\n{item.source}")


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()
