"""What the router has learned, and how that survives: a policy, its ledger and the journal, always in step.

Every event goes the same way, live and after a restart: folded into the policy (once), queued for the journal, and
acknowledged when it is on disk. No Ray in here, so that a test can kill it as often as it likes.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from math import inf
from types import MappingProxyType
from typing import Any

from msgspec import structs

from deployments import collector
from deployments.identity import Identity
from deployments.journal import Journal
from deployments.lineage import Lineage, Succession
from deployments.snapshot import Snapshot
from policies.base import Policy
from policies.ledger import ACCEPTED, HELD, NOTED, UNKNOWN, Event, Ledger, Record
from policies.signals import implied
from policies.succession import inherit, take_over
from policies.trust import Trust
from policies.types import Decision, Feedback, Outcome

EXPIRED = "expired"  # what it belongs to is too old, or no longer kept
BUSY, REUSED = "busy", "reused"  # of an idempotency key: its first request is being answered; it had another body
HOLD_S = 900.0  # how long a decision that an ingress made by itself may take to get here
log = logging.getLogger(__name__)


class Memory:
    """The one owner of what is learned.

    Args:
        journal: where events are written down.
        make: gives a policy that knows nothing.
        applied: is told of every event that counts, with the record of its decision.
        window_s: feedback for decisions older than this is refused.
        complete: adds to a snapshot what others learned from the same events.
        taken: gives it back to them; without `pacer` where the whole journal is about to be replayed.
        trust: state of who is believed at the beginning, where no snapshot tells.
    """

    def __init__(
        self,
        journal: Journal,
        make: Callable[[], Policy],
        applied: Callable[[Event, Record], None] = lambda _, __: None,
        window_s: float = inf,
        complete: Callable[[Snapshot], Snapshot] = lambda snapshot: snapshot,
        taken: Callable[[Snapshot], None] = lambda _: None,
        trust: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._complete, self._taken, self._believed = complete, taken, dict(trust)
        self.journal, self.identity, self.window_s = journal, Identity(journal.salt), window_s
        self.policy, self.sequence, self.version = make(), 0, 0
        self._make, self._applied, self._time_s = make, applied, 0.0
        self._busy: set[str] = set()
        self.whole = True  # False while the policy lacks what the journal has
        self._restore()

    # --- from the journal ---------------------------------------------------------------------------------------

    def _restore(self, whole: bool = False) -> None:
        """The last snapshot, then every row after it; all rows there are, if the snapshot is of no use now."""
        row, snapshot = self.journal.snapshot()
        self.lineage = Lineage(self.journal.lineage)
        if snapshot is not None and (whole or not self.take(snapshot)):
            log.warning("learning from the whole journal: its snapshot is of the policy '%s'", snapshot.policy)
            row, snapshot = 0, None
        horizon, successions, trust = row, self.lineage.after(row), Trust()
        trust.restore(snapshot.trust if snapshot is not None else self._believed)
        self.quarantined, self.silenced = trust.quarantined, trust.silenced  # keys; the former with the evidence
        self.ledger = Ledger(
            find=lambda decision_id: self._look_up([decision_id], horizon).get(decision_id),
            absent=lambda _: HELD,  # or it would not have been written down
            applied=self._note,
            trust=trust,
        )
        self.trust = trust
        for events in self.journal.find_all(snapshot.held if snapshot else (), up_to=row).values():
            for event in events:
                self.ledger.apply(event, None)
        with collector.paused():
            for page in self.journal.pages(after=row):
                horizon = page[0][0] - 1
                made = {event.id for _, event in page if isinstance(event, Decision)}
                needed = {event.decision_id for _, event in page if not isinstance(event, Decision)} - made
                for record in self._look_up(self.ledger.missing(needed), horizon).values():
                    self.ledger.keep(record)
                for number, event in page:
                    while successions and successions[0].row < number:
                        self._succeed(successions.pop(0))
                    horizon = number - 1  # a record looked up now must not yet contain this event
                    self.ledger.apply(event, self.policy, fresh=True)
                self.policy.advance(self.sequence)
        for late in successions:
            self._succeed(late)
        self.ledger.look_elsewhere(lambda decision_id: self._look_up([decision_id]).get(decision_id), self._absent)

    def _look_up(self, decision_ids: Sequence[str], up_to: float = inf) -> dict[str, Record]:
        """The records of those of these decisions that the journal has."""
        ledger = Ledger(absent=lambda _: HELD)
        for events in self.journal.find_all(decision_ids, up_to).values() if decision_ids else ():
            for event in events:
                ledger.apply(event, None, fresh=True)
        found = ((decision_id, ledger.get(decision_id)) for decision_id in decision_ids)
        return {decision_id: record for decision_id, record in found if record is not None}

    def take(self, snapshot: Snapshot) -> bool:
        """Go on from a snapshot; False, with a policy that knows nothing, if it is of no use to this policy."""
        self.sequence, self.version = max(self.sequence, snapshot.sequence), snapshot.version
        fits = snapshot.policy == self.policy.name
        try:
            if fits:
                take_over(self.policy, snapshot.state, snapshot.arms)
        except ValueError as error:
            log.warning("%s", error)
            self.policy, fits = self._make(), False
        self._taken(snapshot if fits else replace(snapshot, pacer={}))
        return fits

    async def rebuild(self, make: Callable[[], Policy], before: Snapshot | None = None) -> None:
        """Go on with another policy: it takes over what was learned (before), or learns it anew from the journal."""
        before = before or self.snapshot()
        self._make, self.policy = make, make()
        if self.whole and self.take(before):
            return
        self.whole = False  # if this fails, the next call must not take what it left for what was learned
        while self.journal.busy:
            await self.journal.flush()
        self.policy = make()
        self._restore(whole=True)
        self.whole = True

    def snapshot(self) -> Snapshot:
        """All that is learned now."""
        names = tuple(arm.name for arm in self.policy.arms)
        state, held = self.policy.state(), self.ledger.held
        now = Snapshot(self.policy.name, names, self.sequence, self.version, state, held=held)
        now = replace(now, row=self.journal.last_row, journal=self.journal.id, lineage=self.lineage.state())
        now = replace(now, trust=self.trust.state())
        return self._complete(now)

    def put_snapshot(self) -> None:
        """Queue a snapshot for the next write, unless it would lack what the journal has."""
        if self.whole:
            self.journal.put_snapshot(self.snapshot())

    async def save(self) -> None:
        """Write a snapshot; returns when it is durable."""
        self.put_snapshot()
        await self.journal.flush()

    async def serve(self, digests: Mapping[str, str]) -> None:
        """Take note of what serves the arms now; a successor inherits with more doubt, and that is durable at once."""
        before = dict(self.lineage.digests)
        for succession in self.lineage.see(self.policy.arms, digests, self.journal.last_row):
            self._succeed(succession)
        if self.lineage.digests != before:
            await self.save()

    def _succeed(self, succession: Succession) -> None:
        inherit(self.policy, succession.arm, succession.keep)

    async def retire(self, now_s: float) -> None:
        """Let go of old rows, and refuse what comes for them from now on."""
        if await self.journal.retire(now_s):
            await self.save()

    # --- live ---------------------------------------------------------------------------------------------------

    def _note(self, event: Event, record: Record) -> None:
        if isinstance(event, Decision):
            self.sequence = max(self.sequence, event.sequence + 1)
        self._applied(event, record)

    def _write_down(self, event: Event, fresh: bool = False) -> str:
        before = len(self.quarantined)
        status = self.ledger.apply(event, self.policy, fresh)
        if len(self.quarantined) != before:
            log.warning("the scores of these keys count no more: %s", ", ".join(self.quarantined) or "none")
        if status in NOTED:
            self.journal.put(event)
        return status

    def _absent(self, decision_id: str) -> str:
        """What to say of an event whose decision is not in the journal: `expired` has looked at its age already."""
        made_s = self.identity.made_at(decision_id)
        return HELD if made_s is not None and self._time_s - made_s < HOLD_S else UNKNOWN

    def _gone(self, decision_id: str, window_s: float = inf) -> bool:
        """Whether a decision is older than what is kept, or than a window."""
        made_s = self.identity.made_at(decision_id)
        if made_s is None and (record := self.ledger.get(decision_id)) is not None:
            made_s = record.decision.time_s or None
        return made_s is not None and (made_s <= self.journal.gone_before_s or self._time_s - made_s > window_s)

    def decided(self, decisions: Sequence[Decision]) -> None:
        """Note decisions that were made just now; they become durable with the next write."""
        for decision in decisions:
            self._write_down(decision, fresh=True)

    def unheard(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Those of these decisions that neither the ledger nor the journal has, by one question for all of them."""
        made = {decision.id: decision for decision in decisions}
        missing = self.ledger.missing(made)
        for record in self._look_up(missing).values():
            self.ledger.keep(record)
        return [made[decision_id] for decision_id in self.ledger.missing(missing)]

    async def observe(
        self, finished: Sequence[tuple[Decision, Outcome]], time_s: float, unheard: Sequence[Decision] = ()
    ) -> list[Outcome]:
        """Learn from answers; the decisions travel with them, in case they were never seen, or lost in a crash.

        Args:
            finished: what came of which decision.
            time_s: now, in seconds since the epoch.
            unheard: those of the decisions that are known to be new.

        Returns:
            The outcomes that were new, when all are durable.
        """
        self._time_s, new, fresh = time_s, [], {decision.id for decision in unheard}
        self.policy.advance(self.sequence)  # the clock runs on, wherever decisions are made
        for decision, outcome in finished:
            if self._gone(decision.id):
                continue
            if decision.id in fresh:  # whoever made it did not know how many others were made
                decision = structs.replace(decision, sequence=self.sequence)
            self._write_down(decision, decision.id in fresh)
            if self._write_down(outcome) == ACCEPTED:
                new.append(outcome)
                if (sign := implied(decision, outcome, time_s)) is not None:
                    self._write_down(sign)
        await self.journal.flush()
        return new

    async def feedback(
        self, items: Sequence[Feedback], time_s: float, reply_to: tuple[str, str] = ("", "")
    ) -> list[str]:
        """Learn from scores.

        Args:
            items: the scores.
            time_s: now, in seconds since the epoch.
            reply_to: idempotency key and digest of the body, to remember what was replied.

        Returns:
            What became of each, when all is durable: accepted, duplicate, held, unknown or expired.
        """
        self._time_s, statuses = time_s, []
        for item in items:
            status = EXPIRED if self._gone(item.decision_id, self.window_s) else self._write_down(item)
            statuses.append("duplicate" if status == "repeated" else status)
        if any(status not in (UNKNOWN, EXPIRED) for status in statuses):
            if reply_to[0]:
                self.journal.put_reply(*reply_to, statuses[0])
            await self.journal.flush()
        return statuses

    async def feedback_once(self, item: Feedback, time_s: float, key: str) -> str:
        """Like `feedback`; under the same idempotency key there is one effect and one reply.

        Returns:
            See there; or BUSY, or REUSED.
        """
        digest = _digest(f"{item.decision_id}\n{item.score!r}\n{item.source}")
        key = _digest(key)  # of any length, and with any characters
        if key in self._busy:
            return BUSY
        self._busy.add(key)
        try:
            before = await asyncio.to_thread(self.journal.reply, key)
            if before is not None:
                return before[1] if before[0] == digest else REUSED
            return (await self.feedback([item], time_s, (key, digest)))[0]
        finally:
            self._busy.discard(key)


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=32).hexdigest()
