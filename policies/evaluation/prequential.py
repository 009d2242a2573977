"""Prequential evaluation: policies learn along a log, and at each decision they know only the events before it.

So each policy is evaluated while it learns, and never on the events that it learned from (Dawid, JRSS A 1984). Its
probabilities depend on the past alone, which is all that the estimators of offpolicy.py require of a target.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from policies.base import LearningBuffer, Policy
from policies.evaluation.replay import target_probabilities
from policies.events import Decision, Event, Outcome, Record
from policies.types import Vector

BLOCK = 32  # decisions that are evaluated together, before the policies learn from them


class Prequential:
    """Replays a log to several policies, and records the probabilities of each at every decision.

    Args:
        policies: by name, in their state at the beginning of the log.
        arms: K names, the columns of the probabilities.
    """

    def __init__(self, policies: Mapping[str, Policy], arms: Sequence[str]):
        self.members = dict(policies)
        self._columns = tuple(arms)
        self._waiting: list[Record] = []
        self._recorder = LearningBuffer()
        self._rows = {name: dict[str, Vector]() for name in policies}

    def record(self, event: Event, record: Record) -> None:
        """Take in an event of the log before the policies learn from it; see DecisionRecords."""
        if isinstance(event, Decision):
            self._waiting.append(record)
            if len(self._waiting) >= BLOCK:
                self._judge()

    def _judge(self) -> None:
        for name, policy in self.members.items():
            table = (
                target_probabilities(self._waiting, policy, self._columns)
                if self._waiting
                else ()
            )
            for record, row in zip(self._waiting, table):
                self._rows[name][record.decision.id] = row
            self._recorder.play(policy)
            if self._waiting:
                policy.advance(self._waiting[-1].decision.sequence + 1)
        self._recorder = LearningBuffer()
        self._waiting = []

    def knows(self, record: Record) -> bool:
        """Whether a decision was in the log and all its arms are columns."""
        self._judge()
        known = record.decision.id in next(iter(self._rows.values()))
        return known and all(
            estimate.arm in self._columns for estimate in record.decision.estimates
        )

    def probabilities(self, name: str, records: Sequence[Record]) -> Vector:
        """[N, K] probabilities with which that policy would have chosen each arm at each of these decisions."""
        self._judge()
        rows = self._rows[name]
        return np.array([rows[r.decision.id] for r in records]).reshape(
            len(records), len(self._columns)
        )

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.EventLearner."""
        self._recorder.learn(decision, outcome)

    def score(
        self, decision: Decision, score: float, weight: float = 1.0, again: bool = False
    ) -> None:
        """See base.EventLearner."""
        self._recorder.score(decision, score, weight, again)

    def advance(self, sequence: int) -> None:
        """See base.EventLearner; `_judge` advances the policies at the end of each block."""

    def discount(self, arm: str, events: float) -> None:
        """See base.EventLearner."""
        for policy in self.members.values():
            policy.discount(arm, events)
