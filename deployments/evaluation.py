"""What the journal says of policy versions: which is better, and in what they differ. Blocking; read only."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deployments.journal import Journal
from deployments.seating import Branch, catch_up, fold, row_of
from deployments.settings import GatewaySettings
from deployments.snapshot import Snapshot
from policies.base import Policy
from policies.gate import may_promote
from policies.ledger import Event, Record
from policies.prequential import Prequential
from policies.registry import make_policy
from policies.replay import apart, arms_of, target_probabilities, to_log, usable
from policies.roles import CHALLENGER, CHAMPION
from policies.succession import take_over

ROWS = 30_000  # of the journal, the newest, on which versions are judged: about 10,000 decisions
COMPARED = 500  # decisions on which two versions are compared


class Evaluator:
    """Reads the journal of a running router.

    Args:
        settings: of the gateway; only arms of today are judged.
    """

    def __init__(self, settings: GatewaySettings):
        self._settings, self._arms = settings, settings.arms()

    @contextmanager
    def _journal(self) -> Iterator[Journal]:
        journal = Journal(self._settings.journal)
        try:
            yield journal
        finally:
            journal.engine.dispose()

    def _policy(self, snapshot: Snapshot) -> Policy:
        policy = make_policy(snapshot.policy, self._arms, snapshot.options)
        names = [arm.name for arm in self._arms]
        if not set(names) & set(snapshot.arms):
            raise ValueError(f"version {snapshot.version} knows none of the arms of today: {', '.join(names)}")
        take_over(policy, snapshot.state, snapshot.arms)
        return policy

    def learned(self, name: str, options: dict[str, Any], champion: Snapshot) -> Snapshot:
        """A policy that has learned all that the journal has, up to the row of the champion's snapshot.

        Raises:
            ValueError: there is no such policy, it has no such options, or the journal is not the router's.
        """
        make_policy(name, self._arms, options)
        with self._journal() as journal:
            if journal.id != champion.journal:
                raise ValueError("this is not the router's journal; on several nodes both need the same PostgreSQL")
            memory = fold(Branch(journal, 0, None, champion.row), lambda: make_policy(name, self._arms, options))
        return Snapshot(
            name,
            tuple(arm.name for arm in self._arms),
            champion.sequence,
            version=0,
            state=memory.policy.state(),
            held=memory.ledger.held,
            trust=memory.trust.state(),
            row=champion.row,
            journal=champion.journal,
            options=options,
        )

    def evaluate(self, challenger: Snapshot, champion: Snapshot) -> dict[str, Any]:
        """Judge a version beside another on what was decided since both were made, each learning on the way.

        Returns:
            The report of gate.may_promote, and the `rows` of the journal that it is about.

        Raises:
            ValueError: the journal does not have the rows that they would have to learn from.
        """
        with self._journal() as journal:
            last = journal.last_row
            start = max(row_of(challenger, journal), row_of(champion, journal), last - ROWS)
            both = {}
            for role, snapshot in ((CHALLENGER, challenger), (CHAMPION, champion)):
                both[role] = catch_up(journal, snapshot, lambda snapshot=snapshot: self._policy(snapshot), start)  # type: ignore[misc]
            arms = [arm.name for arm in self._arms]
            policies = {role: memory.policy for role, memory in both.items()}
            walk, records = Prequential(policies, arms), dict[str, Record]()

            def applied(event: Event, record: Record) -> None:
                records[record.decision.id] = record
                walk.note(event, record)

            fold(Branch(journal, start, None, last), lambda: walk, applied, both[CHAMPION].trust.state())
        judged = [record for record in usable(list(records.values())) if walk.knows(record)]
        champions, challengers = (walk.probabilities(role, judged) for role in (CHAMPION, CHALLENGER))
        gate = self._settings.rollout
        report = may_promote(to_log(judged, arms), champions, challengers, gate.margin, gate.level, gate.repeated)
        return {**report, "rows": [start + 1, last]}

    def diff(self, one: Snapshot, other: Snapshot) -> dict[str, Any]:
        """What differs between two versions, and how they would have decided the newest requests."""
        with self._journal() as journal:
            records: dict[str, Record] = {}
            start = max(0, journal.last_row - 3 * COMPARED)
            fold(
                Branch(journal, start, None, journal.last_row),
                lambda: make_policy("static", self._arms),
                lambda _, record: records.update({record.decision.id: record}),
            )
        shown = usable(list(records.values()))[-COMPARED:]
        policies = [self._policy(one), self._policy(other)]
        arms = arms_of(shown, *policies)
        tables = [target_probabilities(shown, policy, arms) for policy in policies]
        changed = {
            key: [getattr(one, key), getattr(other, key)]
            for key in ("policy", "options", "arms", "sequence", "row")
            if getattr(one, key) != getattr(other, key)
        }
        found: dict[str, Any] = {"versions": [one.version, other.version], "changed": changed, "decisions": len(shown)}
        if shown:
            found["shares"] = [dict(zip(arms, table.mean(axis=0).round(4).tolist())) for table in tables]
            found["decide_otherwise"] = apart(*tables)
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain
