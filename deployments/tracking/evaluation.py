"""Evaluates and compares policy versions on the journal. All methods block; the journal is only read."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from deployments.journal.journal import Journal
from deployments.journal.snapshot import Snapshot
from deployments.router.replay import (
    JournalView,
    RecordCollector,
    catch_up,
    replay,
    row_of,
)
from deployments.settings import GatewaySettings
from policies.base import Policy, restore_for_arms
from policies.evaluation.prequential import Prequential
from policies.evaluation.replay import (
    arms_of,
    evaluable,
    policy_distance,
    select,
    target_probabilities,
    to_log,
)
from policies.registry import make_policy
from policies.rollout.promotion_gate import may_promote
from policies.rollout.roles import CHALLENGER, CHAMPION
from policies.types import Vector

# newest rows of the journal on which a version is evaluated: about 10,000 decisions
EVALUATED_ROWS = 30_000
# newest decisions on which two versions are compared
COMPARED_DECISIONS = 500
# journal rows of one decision: the decision, its outcome, a score
ROWS_PER_DECISION = 3
# reason to leave a decision out
UNKNOWN = "made before both versions existed, or with an arm that is gone"
# fields of a Snapshot that a comparison shows
COMPARED_FIELDS = ("policy", "options", "arms", "sequence", "row")


def _compare(arms: tuple[str, ...], one: Vector, other: Vector) -> dict[str, object]:
    """The share of each arm under two policies, and how often they decide differently; both tables are [N, K]."""
    shares = [table.mean(axis=0).round(4).tolist() for table in (one, other)]
    return {
        "shares": [dict(zip(arms, row)) for row in shares],
        "decide_otherwise": policy_distance(one, other),
    }


class Evaluator:
    """Evaluates policy versions on the journal of a running router.

    Args:
        settings: the gateway's settings; only the arms that they name are evaluated.
    """

    def __init__(self, settings: GatewaySettings):
        self._settings = settings
        self._arms = settings.arms()

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
            raise ValueError(
                f"version {snapshot.version} knows none of the current arms: {', '.join(names)}"
            )
        restore_for_arms(policy, snapshot.state, snapshot.arms)
        return policy

    def train(
        self, name: str, options: dict[str, object], champion: Snapshot
    ) -> Snapshot:
        """Train a new policy on the journal, up to the row of the champion's snapshot.

        Args:
            name: name of the policy.
            options: its options.
            champion: the champion's snapshot.

        Returns:
            A snapshot of the trained policy, not yet registered.

        Raises:
            ValueError: the policy or its options are unknown, or the journal is not the router's.
        """
        make_policy(name, self._arms, options)
        with self._journal() as journal:
            if journal.id != champion.journal:
                raise ValueError(
                    "this is not the router's journal; on several nodes both need the same PostgreSQL"
                )
            learner = replay(
                JournalView(journal, 0, None, champion.row),
                lambda: make_policy(name, self._arms, options),
            )
        return Snapshot(
            name,
            tuple(arm.name for arm in self._arms),
            champion.sequence,
            version=0,
            state=learner.policy.state(),
            held=learner.records.pending,
            trust=learner.reputation.state(),
            row=champion.row,
            journal=champion.journal,
            options=options,
        )

    def evaluate(self, challenger: Snapshot, champion: Snapshot) -> dict[str, object]:
        """Compare two versions on the decisions made since both exist. Both learn from every event as it passes.

        Returns:
            The report of promotion_gate.may_promote, the first and last of the journal's `rows` it covers, `logged`
            (number of decisions in them) and `left_out` (of these, the decisions that were not used, by the reason).

        Raises:
            ValueError: the journal no longer has the rows from which the versions must learn.
        """
        with self._journal() as journal:
            last = journal.last_row
            start = max(
                row_of(challenger, journal),
                row_of(champion, journal),
                last - EVALUATED_ROWS,
            )
            learners = {}
            for role, snapshot in ((CHALLENGER, challenger), (CHAMPION, champion)):
                learners[role] = catch_up(
                    journal,
                    snapshot,
                    partial(self._policy, snapshot),
                    start,
                )
            arms = [arm.name for arm in self._arms]
            policies = {role: learner.policy for role, learner in learners.items()}
            walk = Prequential(policies, arms)
            collector = RecordCollector(walk)
            replay(
                JournalView(journal, start, None, last),
                lambda: walk,
                collector,
                learners[CHAMPION].reputation.state(),
            )
        selection = select(list(collector.records.values()))
        evaluated = [record for record in selection.records if walk.knows(record)]
        left_out = dict(selection.left_out)
        if len(evaluated) < len(selection.records):
            left_out[UNKNOWN] = len(selection.records) - len(evaluated)
        gate = self._settings.rollout
        report = may_promote(
            to_log(evaluated, arms),
            walk.probabilities(CHAMPION, evaluated),
            walk.probabilities(CHALLENGER, evaluated),
            gate.margin,
            gate.confidence_level,
            gate.anytime_valid,
        )
        return {
            **report,
            "rows": [start + 1, last],
            "logged": len(collector.records),
            "left_out": left_out,
        }

    def diff(self, one: Snapshot, other: Snapshot) -> dict[str, object]:
        """How two versions differ, and how each would have decided the newest requests.

        Returns:
            `versions`, `changed` (pairs of values by field), `decisions`; with decisions also `shares` (of each arm,
            under each version), `decide_otherwise`, the share of the requests that the two decide differently, and
            `kinds`: the number of decisions and these two by kind of work, most frequent kind first.
        """
        collector = RecordCollector()
        with self._journal() as journal:
            last = journal.last_row
            start = max(0, last - ROWS_PER_DECISION * COMPARED_DECISIONS)
            replay(
                JournalView(journal, start, None, last),
                lambda: make_policy("static", self._arms),
                collector,
            )
        compared = evaluable(list(collector.records.values()))[-COMPARED_DECISIONS:]
        policies = [self._policy(one), self._policy(other)]
        arms = arms_of(compared, *policies)
        tables = [target_probabilities(compared, policy, arms) for policy in policies]
        changed = {}
        for field in COMPARED_FIELDS:
            values = [getattr(one, field), getattr(other, field)]
            if values[0] != values[1]:
                changed[field] = values
        report: dict[str, object] = {
            "versions": [one.version, other.version],
            "changed": changed,
            "decisions": len(compared),
        }
        if compared:
            report |= _compare(arms, *tables)
            kinds = np.array([record.decision.profile.kind for record in compared])
            report["kinds"] = {
                kind: {"decisions": count}
                | _compare(arms, *(table[kinds == kind] for table in tables))
                for kind, count in Counter(kinds.tolist()).most_common()
            }
        plain: dict[str, object] = json.loads(json.dumps(report))
        return plain
