"""Reward sampling: which rewards the regression watch takes, so that they represent all answers.

A flaw is always seen and a score is sampled, by users at other rates for other kinds of work. A mean over whatever is
seen is that of another mix of answers than the one that was served: a policy with few failures and many good answers
that were not scored seems bad. So each reward is taken with a probability that makes all answers equally likely to be
taken (FeedbackCoverage.inclusion). With a judge's sample only its decisions are taken, because their rate does not
depend on the answer.

A request has one reward. If a hedge answered it, it is the reward of the first decision, or slow models would not get
their worst rewards.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from policies.coverage import FeedbackCoverage, is_unflawed
from policies.evaluation.replay import (
    HEDGE,
    MIN_SAMPLE,
    MIN_SCORED,
    answered_by_hedge,
)
from policies.events import Decision, Event, Outcome, Record

MAX_COUNTED = 1000  # latest decisions whose score was counted
MAX_HEDGES = 1000  # latest requests whose hedge is known
Counts = list[tuple[str, str, float, float]]


@dataclass
class SamplingState:
    """The state of a RewardSampler: the coverage of all answers and of a judge's sample, and the counted decisions."""

    all_answers: Counts = field(default_factory=list)
    sample: Counts = field(default_factory=list)
    counted: list[str] = field(default_factory=list)


class RewardSampler:
    """Measures how often answers are scored, and says how probable it must be that a reward is taken."""

    def __init__(self) -> None:
        self._all = FeedbackCoverage()
        self._sample = FeedbackCoverage()  # of decisions with a score_chance of 1
        self._counted: deque[str] = deque(maxlen=MAX_COUNTED)
        # By the id of the request's first decision. A restart forgets them: a few hedged requests have no reward then.
        self._hedges: OrderedDict[str, Record] = OrderedDict()
        self._lost: OrderedDict[str, Record] = OrderedDict()

    def record(self, event: Event, record: Record) -> Record | None:
        """Count an event that has changed this record.

        Returns:
            The record of the request's first decision, with the answer that the request got; None if it is not known.
        """
        whole = self._request(record)
        if whole is None or isinstance(event, Decision) or not is_unflawed(whole):
            return whole
        if whole.is_background:  # no answer to a client
            return whole
        if isinstance(event, Outcome):
            self._count(whole, FeedbackCoverage.add_answer)
        if whole.vote is not None and whole.decision.id not in self._counted:
            self._counted.append(whole.decision.id)
            self._count(whole, FeedbackCoverage.add_score)
        return whole

    def _request(self, record: Record) -> Record | None:
        decision = record.decision
        if decision.fallback == HEDGE:
            _keep(self._hedges, decision.retry_of, record)
            first = self._lost.get(decision.retry_of)
            return None if first is None else answered_by_hedge(first, record)
        outcome = record.outcome
        if outcome is not None and outcome.status == "disconnected":
            _keep(self._lost, decision.id, record)
            return answered_by_hedge(record, self._hedges.get(decision.id))
        return record

    def _count(
        self, record: Record, add: Callable[[FeedbackCoverage, Record], None]
    ) -> None:
        add(self._all, record)
        if record.decision.score_chance >= 1.0:
            add(self._sample, record)

    def probability(self, record: Record) -> float:
        """Probability with which the reward of a request must be taken."""
        answers, rate = self._sample.overall()
        if answers < MIN_SAMPLE or rate < MIN_SCORED:
            return self._all.inclusion(record)
        if record.decision.score_chance < 1.0:
            return 0.0
        return self._sample.inclusion(record)

    def forget_decisions(self, gone: Container[str]) -> None:
        """Remove these decisions; the counts stay."""
        counted = [name for name in self._counted if name not in gone]
        self._counted = deque(counted, maxlen=MAX_COUNTED)
        for records in (self._hedges, self._lost):
            for name in [name for name in records if name in gone]:
                del records[name]

    def state(self) -> SamplingState:
        """The counts, for `restore`."""
        return SamplingState(
            self._all.state(), self._sample.state(), list(self._counted)
        )

    def restore(self, state: SamplingState) -> None:
        """Replace the counts by those of `state()`."""
        self._all.restore(state.all_answers)
        self._sample.restore(state.sample)
        self._counted.clear()
        self._counted.extend(state.counted)


def _keep(records: OrderedDict[str, Record], key: str, record: Record) -> None:
    records[key] = record
    while len(records) > MAX_HEDGES:
        records.popitem(last=False)
