"""Prequential evaluation: policies learn along a log, and at each decision they know only the events before it.

So each policy is evaluated while it learns, and never on the events that it learned from (Dawid, JRSS A 1984). Its
probabilities depend on the past alone, which is all that the estimators of offpolicy.py require of a target.

A judge's sample represents all requests, but policies explore in it, and serve their best estimate elsewhere. A policy
is judged by what it earns of all requests. So its probabilities at a decision of the sample are the mixture of those
with the chance of the sample and those with the mean chance outside of it, by the share of the sample so far.
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
        # Number of decisions in a judge's sample, and of those outside with the sum of their chances to be scored.
        self._sampled = 0
        self._others = 0
        self._chances = 0.0

    def record(self, event: Event, record: Record) -> None:
        """Take in an event of the log before the policies learn from it; see DecisionRecords."""
        if isinstance(event, Decision):
            self._waiting.append(record)
            if _in_sample(record):
                self._sampled += 1
            else:
                self._others += 1
                self._chances += event.score_chance
            if len(self._waiting) >= BLOCK:
                self._judge()

    def _judge(self) -> None:
        for name, policy in self.members.items():
            table = self._probabilities(policy) if self._waiting else ()
            for record, row in zip(self._waiting, table):
                self._rows[name][record.decision.id] = row
            self._recorder.play(policy)
            if self._waiting:
                last = self._waiting[-1].decision
                policy.advance(last.sequence + 1, last.scored)
        self._recorder = LearningBuffer()
        self._waiting = []

    def _probabilities(self, policy: Policy) -> Vector:
        """[W, K] the probabilities of a policy at the waiting decisions."""
        table = target_probabilities(self._waiting, policy, self._columns)
        sample = [n for n, record in enumerate(self._waiting) if _in_sample(record)]
        if sample and self._others:
            share = self._sampled / (self._sampled + self._others)
            records = [self._waiting[n] for n in sample]
            chance = self._chances / self._others
            outside = target_probabilities(records, policy, self._columns, chance)
            table[sample] = share * table[sample] + (1 - share) * outside
        return table

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
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """See base.EventLearner."""
        self._recorder.score(decision, score, weight, again, expected)

    def advance(self, sequence: int, scored: int = -1) -> None:
        """See base.EventLearner; `_judge` advances the policies at the end of each block."""

    def discount(self, arm: str, events: float) -> None:
        """See base.EventLearner."""
        for policy in self.members.values():
            policy.discount(arm, events)


def _in_sample(record: Record) -> bool:
    return record.decision.score_chance >= 1.0
