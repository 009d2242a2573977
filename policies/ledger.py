"""What is known of each decision, and the rule that folds events into a policy exactly once.

The router's state is fold(events): the same code runs live, after a restart and in a replay. Events commute: whatever
order they come in and however often, the same votes count in the end.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from policies.base import Policy
from policies.features import D
from policies.trust import Trust
from policies.types import Decision, Feedback, Outcome

ACCEPTED, DUPLICATE, UNKNOWN = "accepted", "duplicate", "unknown"
HELD = "held"  # noted; it counts when its decision arrives
REPEATED = "repeated"  # the score that counts already, given again later: noted, as an older correction may still come
CROWDED = "crowded"  # the decision has votes from as many sources as it may have
NOTED = (ACCEPTED, HELD, REPEATED)  # what must be written down
IMPLICIT = "implicit"  # source of scores that nobody gave
WEIGHTS = {IMPLICIT: 0.25}  # of a source's vote; all others weigh 1
ANYBODY = "*"  # owner of feedback that may be for anybody's decision
MAX_SOURCES = 8  # of one decision: each is a vote, and their names are the client's choice
HELD_CAPACITY = 10_000  # decisions that are waited for

Event = Decision | Outcome | Feedback


@dataclass
class Record:
    """One decision with all that came of it so far; scores by source, one vote each, when they were given and by whom.

    silenced: whose scores do not count (trust.py).
    """

    decision: Decision
    outcome: Outcome | None = None
    scores: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    silenced: Container[str] = ()

    def votes(self) -> dict[str, float]:
        """The scores that count, by source: what somebody said takes the place of what was merely read out."""
        return self.said() or self._counting()

    def said(self) -> dict[str, float]:
        """The scores that somebody gave and that count, by source."""
        return {source: score for source, score in self._counting().items() if source != IMPLICIT}

    def _counting(self) -> dict[str, float]:
        if not self.silenced:
            return self.scores
        out = self.silenced
        return {source: score for source, score in self.scores.items() if self.owners.get(source) not in out}


class Ledger:
    """The most recent decisions; older ones are looked up with `find`.

    Args:
        capacity: how many decisions to keep at hand.
        find: gives the record of an older decision from the durable log, or None.
        absent: what to say of an event whose decision nobody knows: HELD waits for it, any other status refuses it.
        applied: is told of every event that changed a record, with that record.
        trust: says whose scores count; without, everybody's do.
    """

    def __init__(
        self,
        capacity: int = 10_000,
        find: Callable[[str], Record | None] = lambda _: None,
        absent: Callable[[str], str] = lambda _: UNKNOWN,
        applied: Callable[[Event, Record], None] = lambda _, __: None,
        trust: Trust | None = None,
    ):
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._held: OrderedDict[str, dict[str, Outcome | Feedback]] = OrderedDict()  # by decision, then by source
        self._capacity, self._find, self._absent, self._applied = capacity, find, absent, applied
        self.trust = trust

    @property
    def held(self) -> tuple[str, ...]:
        """The decisions that are waited for, in the order in which they were first heard of."""
        return tuple(self._held)

    def get(self, decision_id: str) -> Record | None:
        """The record of a decision, however old."""
        record = self._records.get(decision_id)
        if record is None and (record := self._find(decision_id)) is not None:
            self.keep(record)
        return record

    def look_elsewhere(self, find: Callable[[str], Record | None], absent: Callable[[str], str]) -> None:
        """From now on ask these two (see the class) of decisions that are not at hand."""
        self._find, self._absent = find, absent

    def keep(self, record: Record) -> None:
        """Have a record at hand as the newest."""
        self._records[record.decision.id] = record
        if self.trust is not None:
            record.silenced = self.trust.silenced
        while len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def missing(self, decision_ids: Iterable[str]) -> list[str]:
        """Those of these decisions that are not at hand; those that are stay at hand longest."""
        absent = []
        for decision_id in decision_ids:
            if decision_id in self._records:
                self._records.move_to_end(decision_id)
            else:
                absent.append(decision_id)
        return absent

    def apply(self, event: Event, policy: Policy | None, fresh: bool = False) -> str:
        """Fold one event into the policy, unless it was before.

        Args:
            event: of any kind, in any order.
            policy: None only takes note, for events that a snapshot already contains.
            fresh: the caller knows that this decision is new; nobody need look for it among the older ones.

        Returns:
            ACCEPTED; DUPLICATE if nothing changed; REPEATED, HELD or CROWDED (see there); UNKNOWN if the decision is
            somebody else's; or what `absent` says.
        """
        if isinstance(event, Decision):
            if event.id in self._records or (not fresh and self.get(event.id) is not None):
                return DUPLICATE
            record = Record(event)
            self.keep(record)
            self._applied(event, record)
            for early in self._held.pop(event.id, {}).values():
                self._fold(record, early, policy)
            return ACCEPTED
        known = self.get(event.decision_id)
        if known is not None:
            return self._fold(known, event, policy)
        status = self._absent(event.decision_id)
        return self._hold(event) if status == HELD else status

    def _hold(self, event: Outcome | Feedback) -> str:
        waiting = self._held.setdefault(event.decision_id, {})
        key = event.source if isinstance(event, Feedback) else ""
        earlier = waiting.get(key)
        if isinstance(earlier, Outcome) or (earlier and isinstance(event, Feedback) and event.time_s < earlier.time_s):
            return DUPLICATE
        if earlier == event and getattr(earlier, "time_s", 0.0) == getattr(event, "time_s", 0.0):
            return DUPLICATE
        if key not in waiting and len(waiting) > MAX_SOURCES:
            return CROWDED
        waiting[key] = event
        while len(self._held) > HELD_CAPACITY:
            self._held.popitem(last=False)
        return HELD

    def _fold(self, record: Record, event: Outcome | Feedback, policy: Policy | None) -> str:
        if record.decision.profile.features.shape != (D,):
            policy = None  # made by a version with other features: on record, but nothing to learn from
        if isinstance(event, Outcome):
            if record.outcome is not None:
                return DUPLICATE
            record.outcome = event
            self._applied(event, record)
            if policy is not None:
                policy.learn(record.decision, event)
            return ACCEPTED
        if event.owner not in (record.decision.owner, ANYBODY):
            return UNKNOWN
        if event.source not in record.scores and len(record.scores) >= MAX_SOURCES:
            return CROWDED
        earlier, given = record.scores.get(event.source), record.times.get(event.source, event.time_s)
        if event.time_s < given or (earlier == event.score and event.time_s == given):
            return DUPLICATE
        record.times[event.source] = event.time_s
        if earlier == event.score:
            return REPEATED
        before, corrected = dict(record.votes()), earlier if record.owners.get(event.source) == event.owner else None
        record.scores[event.source], record.owners[event.source] = event.score, event.owner
        self._applied(event, record)
        if policy is not None:
            _replace(policy, record.decision, before, record.votes())
            if self.trust is not None and self.trust.observe(event, record.decision, corrected):
                self._turn(self.trust, event, policy)
        return ACCEPTED

    def _turn(self, trust: Trust, event: Feedback, policy: Policy) -> None:
        """A key's standing changes: its latest votes are taken back, or given back."""
        found = [record for decision_id in trust.recent(event.owner) if (record := self.get(decision_id)) is not None]
        records = [record for record in found if record.decision.profile.features.shape == (D,)]
        before = [dict(record.votes()) for record in records]
        trust.turn(event)
        for record, votes in zip(records, before, strict=True):
            _replace(policy, record.decision, votes, record.votes(), again=True)


def _replace(
    policy: Policy, decision: Decision, before: dict[str, float], after: dict[str, float], again: bool = False
) -> None:
    """Take back the votes that no longer count, and add the new ones."""
    for source, score in before.items():
        if after.get(source) != score:
            policy.score(decision, score, weight=-WEIGHTS.get(source, 1.0))
    for source, score in after.items():
        if before.get(source) != score:
            policy.score(decision, score, weight=WEIGHTS.get(source, 1.0), again=again or source in before)
