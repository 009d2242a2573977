"""Figures of each arm by kind of work, over the latest decisions; the state, Prometheus, MLflow, the explanations and
the notebook all read them from here.

The words, which mean the same on every surface:

decision: one choice of an arm. A failover or a hedge is a second decision on the same request.
routed: the router chose the arm. The client named the arm of a forced decision. No client asked for a calibration, or
    for the second answer of a pair.
answer: a decision that ended with the status ok or error. A client that left, or a request that was wrong or found no
    room, shows nothing of the arm.
score: what one source gives for one decision. A correction replaces it and is no second score.
scored: a decision with at least one score.
vote: the mean of the scores of an answer without a visible flaw (Record.vote).
feedback: an event that gives or corrects a score. Of the scores that a source gives before the decision has reached
    the router, the last one is an event; the others have no effect.

Whether an answer has a visible flaw is known for every answer, its score for few. So availability and mean score are
separate figures, each with its own number of observations, and their product is the overall score.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, sqrt

import msgspec

from policies.coverage import FeedbackCoverage
from policies.events import (
    NOT_ROUTED,
    PAIR,
    Decision,
    Event,
    Outcome,
    Record,
    is_derived,
)
from policies.profiling.features import KINDS

SIZE = 2000  # decisions in a window
# rows of a journal from which a window is rebuilt: of each decision four, with its outcome and two scores
ROWS = 4 * SIZE
Z = 1.959964  # of a 95 % interval
ANSWERED = ("ok", "error")  # statuses of an answer
OTHER = "other"  # stands for the kinds of earlier releases


@dataclass(frozen=True)
class Figures:
    """What a number of decisions shows of their arm. Unknown values are None.

    decisions, routed: number of decisions, and of those that the router chose.
    cost_usd: sum over the decisions.
    answers: number of answers, the n of `availability`: the share of them without a visible flaw.
    scores, scored: number of scores that count, and of decisions that have one.
    votes: number of scored answers without a visible flaw, the n of `score`: the mean of their votes, with a 95 %
        interval from score_low to score_high. A mean over several kinds weights each vote by 1 / rate of scores of its
        arm and kind (FeedbackCoverage).
    overall_score: availability · score.
    arrived: number of answers that arrived, the n of latency_p50_s, latency_p95_s (with the wait in the queue) and
        tokens_per_s (output tokens per second of answering; None for answers without tokens).
    streams: number of streams that arrived, the n of ttft_p50_s and ttft_p95_s.
    latest_s: time of the latest decision with an answer, in seconds since the epoch.
    """

    decisions: int = 0
    routed: int = 0
    cost_usd: float = 0.0
    answers: int = 0
    availability: float | None = None
    scores: int = 0
    scored: int = 0
    votes: int = 0
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    overall_score: float | None = None
    arrived: int = 0
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    tokens_per_s: float | None = None
    streams: int = 0
    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    latest_s: float | None = None


@dataclass(frozen=True)
class FigureTable:
    """The figures of a window.

    total: of all decisions.
    arms: by arm.
    kinds: by arm, then by kind; without the kinds of which an arm has no decision.
    """

    total: Figures = field(default_factory=Figures)
    arms: Mapping[str, Figures] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> dict[str, Figures]:
        """The figures of each arm that has decisions of this kind."""
        wanted = known_kind(kind)
        return {
            arm: kinds[wanted] for arm, kinds in self.kinds.items() if wanted in kinds
        }


def known_kind(kind: str) -> str:
    """The kind, or OTHER if this release does not have it; so the number of kinds is bounded."""
    return kind if kind in KINDS else OTHER


def is_routed(decision: Decision) -> bool:
    """Whether the router chose the arm for a client."""
    return decision.fallback not in NOT_ROUTED


def regret(decision: Decision) -> float:
    """The expected utility of the best eligible arm less that of the chosen arm, both as the policy estimated them.

    It is an estimate: the cost of exploration if the policy's estimates are right. A choice that is wrong because an
    estimate is wrong has a regret of 0 here.
    """
    eligible = [e.utility for e in decision.estimates if not e.removed_by]
    if not eligible:
        return 0.0
    return max(0.0, max(eligible) - decision.estimate().utility)


def dearest_cost_usd(decision: Decision) -> float:
    """The largest cost that the policy expected of an arm that no limit excluded, for this request.

    It is an estimate, of what the request would have cost if all requests went to the dearest size. A rule estimates
    no costs; the policy that is tried beside it does.
    """
    estimates = decision.shadow_estimates or decision.estimates
    return max((e.cost_usd for e in estimates if not e.removed_by), default=0.0)


def is_answer(record: Record) -> bool:
    """Whether a decision has an answer, with or without a flaw."""
    return record.outcome is not None and record.outcome.status in ANSWERED


def interval(mean: float, n: float, z: float = Z) -> tuple[float, float]:
    """The interval of Wilson (JASA 1927) for a mean of n values in [0, 1]; with the default of z at 95 %.

    It assumes the largest variance that such values can have, mean · (1 - mean), so it is exact for right and wrong,
    and too wide for grades between.
    """
    scale = 1.0 + z * z / n
    centre = (mean + z * z / (2.0 * n)) / scale
    half = z / scale * sqrt(mean * (1.0 - mean) / n + z * z / (4.0 * n * n))
    # the mean itself is within, whatever the rounding
    return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


class _Tally:
    """What some decisions of one arm and kind show, before means and quantiles."""

    def __init__(self) -> None:
        self.decisions = 0
        self.routed = 0
        self.cost_usd = 0.0
        self.answers = 0
        self.unflawed = 0
        self.scores = 0
        self.scored = 0
        self.tokens = 0
        self.answering_s = 0.0
        self.latest_s: float | None = None
        self.votes: list[float] = []
        self.latencies: list[float] = []
        self.ttfts: list[float] = []

    def add(self, record: Record) -> None:
        """Count one decision."""
        counting = record.explicit_scores() if record.scores else None
        self.decisions += 1
        self.routed += is_routed(record.decision)
        if counting:
            self.scores += len(counting)
            self.scored += 1
        outcome = record.outcome
        if outcome is None:
            return
        self.cost_usd += outcome.cost_usd
        if outcome.status not in ANSWERED:
            return
        self.answers += 1
        self.latest_s = max(self.latest_s or 0.0, record.decision.time_s)
        if outcome.status == "ok":
            self._time(outcome)
        if not record.flaw:
            self.unflawed += 1
            if counting:
                self.votes.append(sum(counting.values()) / len(counting))

    def _time(self, outcome: Outcome) -> None:
        self.latencies.append(outcome.latency_s)
        self.tokens += outcome.output_tokens
        self.answering_s += max(0.0, outcome.latency_s - outcome.waited_s)
        if outcome.ttft_s > 0:
            self.ttfts.append(outcome.ttft_s)


def figures_of(
    records: Iterable[Record], coverage: FeedbackCoverage | None = None
) -> Figures:
    """The figures of some decisions.

    Args:
        records: the decisions.
        coverage: gives the weights of the votes; by default it is that of these records.
    """
    return _table(records, coverage).total


def _table(
    records: Iterable[Record], coverage: FeedbackCoverage | None = None
) -> FigureTable:
    """The figures of some decisions, by arm and kind."""
    cells: dict[tuple[str, str], _Tally] = defaultdict(_Tally)
    examples: dict[tuple[str, str], Record] = {}  # a record of each cell
    for record in records:
        decision = record.decision
        cell = decision.arm, known_kind(decision.profile.kind)
        cells[cell].add(record)
        examples[cell] = record
    coverage = coverage or _coverage(cells)
    by_arm: dict[str, list[tuple[_Tally, float]]] = defaultdict(list)
    kinds: dict[str, dict[str, Figures]] = defaultdict(dict)
    for cell, tally in cells.items():
        arm, kind = cell
        by_arm[arm].append((tally, 1.0 / coverage.rate(examples[cell])))
        kinds[arm][kind] = _figures([(tally, 1.0)])
    return FigureTable(
        total=_figures([part for parts in by_arm.values() for part in parts]),
        arms={arm: _figures(parts) for arm, parts in by_arm.items()},
        kinds=dict(kinds),
    )


def _coverage(cells: Mapping[tuple[str, str], _Tally]) -> FeedbackCoverage:
    """The coverage of all the decisions that were tallied (FeedbackCoverage.of, without reading them again)."""
    answered: dict[tuple[str, str], float] = defaultdict(float)
    scored: dict[tuple[str, str], float] = defaultdict(float)
    for (arm, kind), tally in cells.items():
        for cell in (("", ""), ("", kind), (arm, kind)):
            answered[cell] += tally.unflawed
            scored[cell] += len(tally.votes)
    coverage = FeedbackCoverage()
    coverage.restore((*cell, n, scored[cell]) for cell, n in answered.items())
    return coverage


def _figures(parts: Sequence[tuple[_Tally, float]]) -> Figures:
    """The figures of some tallies, each with the weight of its votes."""
    tallies = [tally for tally, _ in parts]
    answers = sum(t.answers for t in tallies)
    availability = sum(t.unflawed for t in tallies) / answers if answers else None
    votes = [vote for t in tallies for vote in t.votes]
    weights = [weight for t, weight in parts for _ in t.votes]
    score, low, high = _mean_score(votes, weights)
    overall = None
    if availability is not None and score is not None:
        overall = availability * score
    latencies = [seconds for t in tallies for seconds in t.latencies]
    latency_p50_s, latency_p95_s = _quantiles(latencies)
    ttfts = [seconds for t in tallies for seconds in t.ttfts]
    ttft_p50_s, ttft_p95_s = _quantiles(ttfts)
    tokens = sum(t.tokens for t in tallies)
    answering_s = sum(t.answering_s for t in tallies)
    return Figures(
        decisions=sum(t.decisions for t in tallies),
        routed=sum(t.routed for t in tallies),
        cost_usd=fsum(t.cost_usd for t in tallies),
        answers=answers,
        availability=availability,
        scores=sum(t.scores for t in tallies),
        scored=sum(t.scored for t in tallies),
        votes=len(votes),
        score=score,
        score_low=low,
        score_high=high,
        overall_score=overall,
        arrived=len(latencies),
        latency_p50_s=latency_p50_s,
        latency_p95_s=latency_p95_s,
        tokens_per_s=tokens / answering_s if tokens and answering_s > 0 else None,
        streams=len(ttfts),
        ttft_p50_s=ttft_p50_s,
        ttft_p95_s=ttft_p95_s,
        latest_s=max(
            (t.latest_s for t in tallies if t.latest_s is not None), default=None
        ),
    )


def _mean_score(
    votes: list[float], weights: list[float]
) -> tuple[float | None, float | None, float | None]:
    """Weighted mean of the votes and its interval, for the number of equally weighted votes that vary as much."""
    if not votes:
        return None, None, None
    total = sum(weights)
    mean = sum(w * vote for w, vote in zip(weights, votes, strict=True)) / total
    mean = min(1.0, max(0.0, mean))
    return mean, *interval(mean, total * total / sum(w * w for w in weights))


def _quantiles(seconds: list[float]) -> tuple[float | None, float | None]:
    """Median and 95th percentile, interpolated linearly as numpy does."""
    if not seconds:
        return None, None
    ordered = sorted(seconds)
    return _quantile(ordered, 0.5), _quantile(ordered, 0.95)


def _quantile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class RecentFigures:
    """The figures of the latest decisions, in the order in which they were recorded.

    It refers to the decision records, so late scores, corrections, and keys that are suspended or cleared show in the
    next table.

    Args:
        size: number of decisions in the window.
    """

    def __init__(self, size: int = SIZE):
        self._size = size
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._table: FigureTable | None = None  # of the present records

    def __len__(self) -> int:
        """Number of decisions in the window."""
        return len(self._records)

    def record(self, event: Event, record: Record) -> None:
        """Take in an event that has changed this decision record.

        An event of an older decision is ignored, and so is an answer that no client asked for: its latency is not that
        of traffic.
        """
        if record.is_background:
            return
        decision_id = record.decision.id
        if isinstance(event, Decision) or decision_id in self._records:
            self._records[decision_id] = record
            self._table = None
        if len(self._records) > self._size:
            self._records.popitem(last=False)

    def remove(self, gone: Iterable[str]) -> None:
        """Remove these decisions."""
        for decision_id in gone:
            self._records.pop(decision_id, None)
        self._table = None

    def clear(self) -> None:
        """Forget all decisions."""
        self._records.clear()
        self._table = None

    def table(self) -> FigureTable:
        """The figures of the window; they are computed again only after the next event."""
        if self._table is None:
            self._table = _table(self._records.values())
        return self._table


class Counts(msgspec.Struct):
    """Numbers of events since the beginning; see the module's docstring for the words.

    fallback: second attempts, and decisions without the profiler or the router.
    cost_usd: of all outcomes.
    regret: sum over the routed decisions (see `regret`).
    dearest_cost_usd: what the routed answers that arrived would have cost with the dearest size, by the estimates of
        their decisions (see `dearest_cost_usd`). 0 of decisions that earlier releases counted.
    """

    decisions: int = 0
    fallback: int = 0
    answers: int = 0
    feedback: int = 0
    scores: int = 0
    scored: int = 0
    cost_usd: float = 0.0
    regret: float = 0.0
    dearest_cost_usd: float = 0.0

    def add(self, event: Event, record: Record) -> None:
        """Count an event that has changed this decision record."""
        if isinstance(event, Decision):
            self.decisions += 1
            if is_routed(event):
                self.fallback += event.fallback != ""
                self.regret += regret(event)
        elif isinstance(event, Outcome):
            self.answers += event.status in ANSWERED
            self.cost_usd += event.cost_usd
            if event.status == "ok" and is_routed(record.decision):
                self.dearest_cost_usd += dearest_cost_usd(record.decision)
        elif not is_derived(event.source, event.owner):
            self.feedback += 1
            if record.is_first_of_source(event):
                self.scores += 1
                self.scored += len(record.given_scores()) == 1


class Totals(msgspec.Struct):
    """The counts of routed decisions, of forced ones, of calibrations, and of second answers in the background."""

    routed: Counts = msgspec.field(default_factory=Counts)
    forced: Counts = msgspec.field(default_factory=Counts)
    calibrated: Counts = msgspec.field(default_factory=Counts)
    paired: Counts = msgspec.field(default_factory=Counts)

    def add(self, event: Event, record: Record) -> None:
        """Count an event that has changed this decision record."""
        counts = self.routed if is_routed(record.decision) else self.forced
        if record.is_calibration:
            counts = self.calibrated
        elif record.decision.fallback == PAIR:
            counts = self.paired
        counts.add(event, record)

    def copy(self) -> "Totals":
        """A copy that later events do not change."""
        return Totals(
            msgspec.structs.replace(self.routed),
            msgspec.structs.replace(self.forced),
            msgspec.structs.replace(self.calibrated),
            msgspec.structs.replace(self.paired),
        )

    def of_all(self) -> Counts:
        """The counts of all decisions."""
        return Counts(
            *(
                sum(counts)
                for counts in zip(
                    msgspec.structs.astuple(self.routed),
                    msgspec.structs.astuple(self.forced),
                    msgspec.structs.astuple(self.calibrated),
                    msgspec.structs.astuple(self.paired),
                    strict=True,
                )
            )
        )
