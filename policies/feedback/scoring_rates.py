"""Scoring rates: how often the answers of each API key are scored.

An exploring choice pays only if its answer is scored. The rate of a key is the share of its answers that were scored,
by the key itself or by one that may score all decisions. The prior is that all of PRIOR answers are: a new key is taken
to score until it shows that it does not. Without keys, all requests have one rate. The scores of the router's own judge
do not count, because its sample is known beforehand.
"""

from collections import OrderedDict
from collections.abc import Mapping

from policies.events import JUDGE, Decision, Event, Feedback, Outcome, Record

PRIOR = 10.0  # answers
MOST = 1000.0  # answers of a key; beyond it its counts are halved, so that the rate follows a change
MAX_KEYS = 1000  # latest keys that are kept
Counts = tuple[float, float]  # answers, and those of them that were scored


class ScoringRates:
    """The scoring rates of the latest keys."""

    def __init__(self) -> None:
        self._counts: OrderedDict[str, Counts] = OrderedDict()

    def record(self, event: Event, record: Record) -> None:
        """Count an answer, or the first score of an answer.

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
        """By key, the probability in (0, 1] that its next answer is scored."""
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
    """Whether this is the first score of this answer but for that of the router's own judge.

    A client may call its own judge by the same name. The router's judge grades only what it has announced, see
    `Decision.score_chance`, and pairs.
    """
    announced = record.decision.score_chance >= 1.0 or record.decision.pair != ""
    ignored = JUDGE if announced else None
    if event.source == ignored or not record.is_first_of_source(event):
        return False
    return sum(source != ignored for source in record.scores) == 1
