"""Coverage of feedback: the probability that an answer without a visible flaw gets a score, by arm and kind of work.

A visible flaw is always seen, and a score is seen for a sample. A mean over both must divide each scored answer by its
probability to be seen (Horvitz and Thompson, JASA 1952), or flaws count too much. People score some kinds of work more
often than others, so the rate is that of the arm and the kind. With few answers it shrinks towards the rate of the
kind, and that towards the rate of all: an empirical Bayes estimate, whose prior weighs as much as PRIOR_SCORES scores.

Within an arm and a kind the scored answers stand for all others. If users score bad answers more often than good ones,
this is wrong, and no data of theirs can show it. A judge's sample is free of it.
"""

from collections import defaultdict
from collections.abc import Iterable

from policies.events import Record

PRIOR_SCORES = 2.0  # scores of the rate towards which a rate shrinks
UNDER_COMMON = 0.05  # share of the answers whose rate may be below `common_rate`
LEAST_COMMON = 0.1  # smallest rate of an arm and kind that counts for it, as a share of the rate of all answers
MOST = 20_000.0  # answers; beyond it all counts are halved, so that the rates follow a change
LEAST_RATE = 1e-6
ALL = ("", "")  # the cell of all answers


class FeedbackCoverage:
    """Counts answers without a visible flaw, and those of them that have a score."""

    def __init__(self) -> None:
        # by arm and kind; "" stands for all
        self._answered: dict[tuple[str, str], float] = defaultdict(float)
        self._scored: dict[tuple[str, str], float] = defaultdict(float)

    @classmethod
    def of(cls, records: Iterable[Record]) -> "FeedbackCoverage":
        """The coverage of these records."""
        coverage = cls()
        for record in records:
            if is_unflawed(record):
                coverage.add_answer(record)
                if record.vote is not None:
                    coverage.add_score(record)
        return coverage

    def add_answer(self, record: Record) -> None:
        """Count an answer without a visible flaw, unless no client asked for it: such an answer is always scored."""
        if record.is_background:
            return
        _count(self._answered, record)
        if self._answered[ALL] > MOST:
            for counts in (self._answered, self._scored):
                for cell in counts:
                    counts[cell] /= 2

    def add_score(self, record: Record) -> None:
        """Count the first score of an answer without a visible flaw, unless no client asked for it."""
        if record.is_background:
            return
        _count(self._scored, record)

    def rate(self, record: Record) -> float:
        """Probability in (0, 1] that an unflawed answer of this record's arm and kind gets a score.

        It is 1 for an answer that no client asked for.
        """
        return 1.0 if record.is_background else self._rate(_cells(record))

    def overall(self) -> tuple[float, float]:
        """Number of answers without a visible flaw, and the rate of all of them."""
        return self._answered.get(ALL, 0.0), self._rate((ALL,))

    def common_rate(self) -> float:
        """A rate at which the answers of all arms and kinds can be sampled.

        It is the rate that all but UNDER_COMMON of the answers have or exceed, without those of arms and kinds that are
        hardly ever scored. These cannot be represented.
        """
        overall = self._rate((ALL,))
        rates = []
        for arm, kind in self._answered:
            rate = self._rate((ALL, ("", kind), (arm, kind)))
            if arm and kind and rate >= LEAST_COMMON * overall:
                rates.append((rate, self._answered[arm, kind]))
        allowed = UNDER_COMMON * sum(answers for _, answers in rates)
        for rate, answers in sorted(rates):
            allowed -= answers
            if allowed < 0:
                return rate
        return overall

    def inclusion(self, record: Record) -> float:
        """Probability with which a known reward must be sampled, so that all answers are sampled at `common_rate`."""
        rate = self.rate(record)
        common = self.common_rate()
        return min(common, rate) if record.flaw else min(1.0, common / rate)

    def _rate(self, cells: tuple[tuple[str, str], ...]) -> float:
        """The rate of the last cell, shrunk towards the rate of the cell before it, and so on."""
        rate = 1.0
        weight = 0.0
        for cell in cells:
            answered = self._answered.get(cell, 0.0) + weight
            if answered > 0:
                rate = (self._scored.get(cell, 0.0) + weight * rate) / answered
            weight = PRIOR_SCORES / max(rate, LEAST_RATE)
        return min(1.0, max(rate, LEAST_RATE))

    def state(self) -> list[tuple[str, str, float, float]]:
        """Arm, kind, number of answers, and number of those with a score, of every cell."""
        return [
            (*cell, answered, self._scored.get(cell, 0.0))
            for cell, answered in self._answered.items()
        ]

    def restore(self, state: Iterable[tuple[str, str, float, float]]) -> None:
        """Replace the counts by those of `state()`."""
        self._answered.clear()
        self._scored.clear()
        for arm, kind, answered, scored in state:
            self._answered[arm, kind] = answered
            self._scored[arm, kind] = scored

    def weight(self, record: Record) -> float:
        """Weight of a record's reward in a mean: 1 for a visible flaw, 1 / rate for a scored answer."""
        return 1.0 if record.flaw else 1.0 / self.rate(record)


def is_unflawed(record: Record) -> bool:
    """Whether an answer has arrived and shows no flaw."""
    return (
        record.outcome is not None and record.outcome.status == "ok" and not record.flaw
    )


def _cells(record: Record) -> tuple[tuple[str, str], ...]:
    """The cells that a record belongs to, from all answers to those of its arm and kind."""
    arm = record.answered_by or record.decision.arm
    kind = record.decision.profile.kind
    return ALL, ("", kind), (arm, kind)


def _count(counts: dict[tuple[str, str], float], record: Record) -> None:
    for cell in _cells(record):
        counts[cell] += 1.0
