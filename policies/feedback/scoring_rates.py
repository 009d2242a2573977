"""Scoring rates: how often each API key scores the answers that it gets.

An exploring choice pays only if its answer is scored. The rate of a key is the share of its answers that it scored,
under the prior that it scores all of PRIOR answers: a new key is taken to score until it shows that it does not. A
judge's scores do not count, because a judge's sample is known beforehand.
"""

from collections import OrderedDict
from collections.abc import Mapping

from policies.events import ANY_OWNER, Decision, Event, Feedback, Outcome, Record

PRIOR = 10.0  # answers
MOST = 1000.0  # answers of a key; beyond it its counts are halved, so that the rate follows a change
MAX_KEYS = 1000  # latest keys that are kept
Counts = tuple[float, float]  # answers, and those of them that the key scored


class ScoringRates:
    """The scoring rates of the latest keys."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, Counts] = OrderedDict()

    def record(self, event: Event, record: Record) -> None:
        """Count an answer, or the first score that a key gives for one of its answers.

        Answers that no client asked for do not count.
        """
        if record.is_background:
            return
        owner = record.decision.owner
        if isinstance(event, Decision):
            return
        if isinstance(event, Outcome):
            if event.status == "ok":
                self._add(owner, 1.0, 0.0)
        elif _is_first(event, record):
            self._add(owner, 0.0, 1.0)

    def _add(self, owner: str, answers: float, scores: float) -> None:
        before = self._counts.pop(owner, (0.0, 0.0))
        counts = (before[0] + answers, before[1] + scores)
        if counts[0] > MOST:
            counts = (counts[0] / 2, counts[1] / 2)
        self._counts[owner] = counts
        while len(self._counts) > MAX_KEYS:
            self._counts.popitem(last=False)

    def rates(self) -> dict[str, float]:
        """By key, the probability in (0, 1] that it scores its next answer."""
        return {
            owner: min(1.0, (scores + PRIOR) / (answers + PRIOR))
            for owner, (answers, scores) in self._counts.items()
        }

    def state(self) -> dict[str, Counts]:
        """The counts by key, for `restore`."""
        return dict(self._counts)

    def restore(self, state: Mapping[str, Counts]) -> None:
        """Replace the counts by those of `state()`."""
        self._counts = OrderedDict(
            (owner, (float(answers), float(scores)))
            for owner, (answers, scores) in state.items()
        )


def _is_first(event: Feedback, record: Record) -> bool:
    """Whether this is the first score that a key, and not a judge, gave for this answer."""
    if event.owner == ANY_OWNER or not record.is_first_of_source(event):
        return False
    by_keys = [owner for owner in record.owners.values() if owner != ANY_OWNER]
    return len(by_keys) == 1
