"""What is known of each decision, and the rule that folds events into a policy exactly once.

The router's state is fold(events): the same code runs live, after a restart and in a replay.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from policies.base import Policy
from policies.types import Decision, Feedback, Outcome

ACCEPTED, DUPLICATE, UNKNOWN = "accepted", "duplicate", "unknown"
CROWDED = "crowded"  # the decision has votes from as many sources as it may have
ANYBODY = "*"  # owner of feedback that may be for anybody's decision
MAX_SOURCES = 8  # of one decision: each is a vote, and their names are the client's choice


@dataclass
class Record:
    """One decision with all that came of it so far; scores by source, one vote each."""

    decision: Decision
    outcome: Outcome | None = None
    scores: dict[str, float] = field(default_factory=dict)


class Ledger:
    """The most recent decisions; older ones are looked up with `find`.

    Args:
        capacity: how many decisions to keep at hand.
        find: gives the record of an older decision from the durable log, or None.
    """

    def __init__(self, capacity: int = 10_000, find: Callable[[str], Record | None] = lambda _: None):
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._capacity, self._find = capacity, find

    def get(self, decision_id: str) -> Record | None:
        """The record of a decision, however old."""
        record = self._records.get(decision_id)
        if record is None and (record := self._find(decision_id)) is not None:
            self._keep(record)
        return record

    def _keep(self, record: Record) -> None:
        self._records[record.decision.id] = record
        while len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def apply(self, event: Decision | Outcome | Feedback, policy: Policy | None) -> str:
        """Fold one event into the policy, unless it was before.

        Args:
            event: of any kind; a decision must come before what belongs to it.
            policy: None only takes note, for events that a snapshot already contains.

        Returns:
            ACCEPTED; DUPLICATE if nothing changed; UNKNOWN if nobody made such a decision, or it is somebody else's;
            CROWDED.
        """
        if isinstance(event, Decision):
            if self.get(event.id) is not None:
                return DUPLICATE
            self._keep(Record(event))
            return ACCEPTED
        record = self.get(event.decision_id)
        if record is None:
            return UNKNOWN
        if isinstance(event, Outcome):
            if record.outcome is not None:
                return DUPLICATE
            record.outcome = event
            if policy is not None:
                policy.learn(record.decision, event)
            return ACCEPTED
        if event.owner not in (record.decision.owner, ANYBODY):
            return UNKNOWN
        if event.source not in record.scores and len(record.scores) >= MAX_SOURCES:
            return CROWDED
        earlier = record.scores.get(event.source)
        if earlier == event.score:
            return DUPLICATE
        record.scores[event.source] = event.score
        if policy is not None:
            if earlier is not None:
                policy.score(record.decision, earlier, weight=-1.0)
            policy.score(record.decision, event.score)
        return ACCEPTED
