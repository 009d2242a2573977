"""Policies played forward along a log: at each decision they know what had come in before it, and nothing later.

So they are judged as they would have been, learning on the way, and never on what they learned from (prequential
evaluation: Dawid, JRSS A 1984). What each would have chosen depends on the past alone, which is all that the
estimators of offpolicy.py ask of a target.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from policies.base import Policy, State
from policies.ledger import Event, Record
from policies.replay import target_probabilities
from policies.roles import Recorder
from policies.types import Decision, ModelState, Outcome, Request, Vector

BLOCK = 32  # decisions that are judged together, before anything is learned of them


class Prequential:
    """Learns like a policy (base.Policy) while a log is folded into it, and notes what each of its policies would do.

    Args:
        policies: by name, in the state at the beginning of the log.
        arms: K names, the columns of the probabilities.
    """

    name = "prequential"

    def __init__(self, policies: Mapping[str, Policy], arms: Sequence[str]):
        self.members, self._columns = dict(policies), tuple(arms)
        self.arms = next(iter(policies.values())).arms
        self._waiting: list[Record] = []
        self._recorder, self._rows = Recorder(), {name: dict[str, Vector]() for name in policies}

    def note(self, event: Event, record: Record) -> None:
        """An event of the log, as Ledger tells of it before anybody learns from it."""
        if isinstance(event, Decision):
            self._waiting.append(record)
            if len(self._waiting) >= BLOCK:
                self._judge()

    def _judge(self) -> None:
        for name, policy in self.members.items():
            table = target_probabilities(self._waiting, policy, self._columns) if self._waiting else ()
            self._rows[name] |= {record.decision.id: row for record, row in zip(self._waiting, table)}
            self._recorder.play(policy)
            if self._waiting:
                policy.advance(self._waiting[-1].decision.sequence + 1)
        self._recorder, self._waiting = Recorder(), []

    def knows(self, record: Record) -> bool:
        """Whether a decision was in the log, and between arms that are columns."""
        self._judge()
        known = record.decision.id in next(iter(self._rows.values()))
        return known and all(estimate.arm in self._columns for estimate in record.decision.estimates)

    def probabilities(self, name: str, records: Sequence[Record]) -> Vector:
        """[N, K] probabilities with which that policy would have taken each arm at each of these decisions."""
        self._judge()
        rows = self._rows[name]
        return np.array([rows[r.decision.id] for r in records]).reshape(len(records), len(self._columns))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy."""
        self._recorder.learn(decision, outcome)

    def score(self, decision: Decision, score: float, weight: float = 1.0, again: bool = False) -> None:
        """See base.Policy."""
        self._recorder.score(decision, score, weight, again)

    def advance(self, sequence: int) -> None:
        """See base.Policy; each block does it by itself."""

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """See base.Policy; what is played forward decides nothing."""
        raise NotImplementedError("a log was decided already")

    def state(self) -> State:
        """See base.Policy; nothing to keep."""
        return {}

    def restore(self, state: State) -> None:
        """See base.Policy; nothing to take over."""
