"""Metrics of a policy's latest decisions for MLflow: reward, regret, shares, cost, latency, feedback.

kind_figures.py defines the words. All metrics are of routed decisions, except for those whose name begins with
`forced/`: a policy is not responsible for a model that a client named.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isnan, nan

import numpy as np
from msgspec import structs

from policies.constraints import Exclusion
from policies.coverage import FeedbackCoverage, is_unflawed
from policies.evaluation.kind_figures import (
    Figures,
    FigureTable,
    Totals,
    dearest_cost_usd,
    figures_of,
    is_answer,
    is_routed,
    regret,
)
from policies.events import Decision, Event, Outcome, Record

SIZE = 500  # routed decisions in a window, and as many forced ones
SCORED_SIZE = 200  # latest votes in the mean score
LEAST_VOTES = 20  # no mean score of fewer votes
FORCED_PREFIX = "forced/"
# fields of Figures that become metrics of an arm and kind
KIND_METRICS = (
    *("answers", "availability", "votes", "score", "score_low", "score_high"),
    *("latency_p50_s", "latency_p95_s", "tokens_per_s"),
)

# fields of Figures that become metrics of an arm
ARM_METRICS = (
    *("decisions", "answers", "availability", "scored", "votes", "score"),
    *("score_low", "score_high", "overall_score", "cost_usd"),
    *("latency_p50_s", "latency_p95_s", "ttft_p50_s", "ttft_p95_s", "tokens_per_s"),
)


def kind_metrics(table: FigureTable) -> dict[str, float]:
    """The known figures of every arm and kind, named `kind/KIND/ARM/FIGURE`."""
    metrics = {}
    for arm, kinds in table.kinds.items():
        for kind, figures in kinds.items():
            known = asdict(figures)
            for name in KIND_METRICS:
                if known[name] is not None:
                    metrics[f"kind/{kind}/{arm}/{name}"] = float(known[name])
    return metrics


def arm_metrics(
    table: FigureTable, routed: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """The known figures of every arm, with the same names for all arms.

    Args:
        table: gives the figures.
        routed: the metrics of a Window, which has the shares of the arms.
    """
    metrics: dict[str, dict[str, float]] = {}
    for arm, figures in table.arms.items():
        known = {name: getattr(figures, name) for name in ARM_METRICS}
        known["share"] = routed.get(f"share/{arm}")
        metrics[arm] = {
            name: float(value) for name, value in known.items() if value is not None
        }
    return metrics


class Window:
    """The latest decisions of one policy version, or of all versions together.

    Args:
        size: number of routed decisions that it holds.
        totals: start values of the totals, by the names of `totals`.
    """

    def __init__(self, size: int = SIZE, totals: Mapping[str, float] | None = None):
        self._routed: deque[Record] = deque(maxlen=size)
        self._forced: deque[Record] = deque(maxlen=size)
        self._scored: OrderedDict[str, Record] = OrderedDict()
        self._coverage = FeedbackCoverage()
        self._totals = Totals()
        self.sequence = 0  # of the latest decision
        self.restore(totals or {})

    def add(self, event: Event, record: Record) -> None:
        """Add an event that changed a record, with that record."""
        self._totals.add(event, record)
        if record.is_background:
            return
        routed = is_routed(record.decision)
        if isinstance(event, Decision):
            (self._routed if routed else self._forced).append(record)
            self.sequence = max(self.sequence, event.sequence)
        elif routed and is_unflawed(record):
            if isinstance(event, Outcome):
                self._coverage.add_answer(record)
                first = bool(record.given_scores())
            else:
                first = len(record.given_scores()) == 1
                first = first and record.is_first_of_source(event)
            if first:
                self._add_score(record)

    def _add_score(self, record: Record) -> None:
        """Keep an unflawed answer whose first score has arrived."""
        if record.vote is not None:
            self._coverage.add_score(record)
        self._scored[record.decision.id] = record
        if len(self._scored) > SCORED_SIZE:
            self._scored.popitem(last=False)

    @property
    def totals(self) -> dict[str, float]:
        """The numbers of events since the beginning, `NAME_total` for each field of Counts."""
        totals = {}
        for prefix, counts in (
            ("", self._totals.routed),
            (FORCED_PREFIX, self._totals.forced),
        ):
            for name, value in structs.asdict(counts).items():
                if value or not prefix:
                    totals[f"{prefix}{name}_total"] = float(value)
        return totals

    def restore(self, totals: Mapping[str, float]) -> None:
        """Continue from the totals of an earlier window; a total that is not given keeps its value."""
        for prefix, counts in (
            ("", self._totals.routed),
            (FORCED_PREFIX, self._totals.forced),
        ):
            for name, value in structs.asdict(counts).items():
                given = totals.get(f"{prefix}{name}_total", value)
                setattr(counts, name, type(value)(given))

    def figures(self) -> dict[str, float]:
        """The metrics of the decisions in the window; metrics without data are left out.

        Returns:
            `score`: availability · mean vote of the latest SCORED_SIZE votes, each of which counts for all answers
            that are like it (FeedbackCoverage). `reward`: `score` less the mean price of the answers' latency and cost
            under their own objectives. Both only from LEAST_VOTES `votes` on. `availability` of the `answers`, `regret`
            (per decision, as estimated then), `share/ARM`, `fallback_rate`, `cost_usd` per outcome, `error_rate`,
            `feedback_coverage` (share of the answers that arrived with a score that counts), `estimated_saving` (1 less
            the cost as a share of what the dearest size would have cost, by the decisions' estimates), `ttft_p50_s/ARM`
            and `ttft_p95_s/ARM` of streams with their number `streams/ARM`, `forced/availability`, and the totals.
        """
        routed = list(self._routed)
        whole = figures_of(routed)
        price = _mean(_price(r) for r in routed if is_answer(r))
        finished = [r.outcome for r in routed if r.outcome is not None]
        arrived = [
            r for r in routed if r.outcome is not None and r.outcome.status == "ok"
        ]
        score, votes = self._score(whole)
        figures = {
            "reward": score - price,
            "score": score,
            "votes": float(votes),
            "availability": _known(whole.availability),
            "answers": float(whole.answers),
            "regret": _mean(regret(r.decision) for r in routed),
            "fallback_rate": _mean(float(r.decision.fallback != "") for r in routed),
            "cost_usd": _mean(outcome.cost_usd for outcome in finished),
            "error_rate": _mean(float(o.status == "error") for o in finished),
            "feedback_coverage": _mean(
                float(bool(r.explicit_scores())) for r in arrived
            ),
            "estimated_saving": _saving(routed),
            f"{FORCED_PREFIX}availability": _known(
                figures_of(self._forced).availability
            ),
        }
        figures |= _shares(routed)
        figures |= _first_tokens(routed)
        known = {name: value for name, value in figures.items() if not isnan(value)}
        return known | self.totals

    def _score(self, whole: Figures) -> tuple[float, int]:
        """The overall score, NaN without enough votes, and the number of votes."""
        voted = [r for r in self._scored.values() if r.vote is not None]
        mean = figures_of(voted, self._coverage).score
        if len(voted) < LEAST_VOTES or mean is None or whole.availability is None:
            return nan, len(voted)
        return whole.availability * mean, len(voted)


def _price(record: Record) -> float:
    """Score points that the latency and the cost of an answer are worth under its objective."""
    outcome = record.outcome
    if outcome is None:
        return nan
    objective = record.decision.objective
    return -objective.utility(0.0, outcome.latency_s, outcome.cost_usd)


def _saving(routed: Iterable[Record]) -> float:
    """The share of the dearest size's cost that was saved, as an estimate; NaN if that size costs nothing."""
    cost_usd = 0.0
    dearest_usd = 0.0
    for record in routed:
        if record.outcome is not None:
            cost_usd += record.outcome.cost_usd
            if record.outcome.status == "ok":
                dearest_usd += dearest_cost_usd(record.decision)
    return 1.0 - cost_usd / dearest_usd if dearest_usd > 0 else nan


def _shares(routed: Sequence[Record]) -> dict[str, float]:
    """Each arm's share of the decisions; an arm that could do the latest task has one, even if it is 0."""
    shares = {}
    for record in routed[-1:]:
        for estimate in record.decision.estimates:
            if Exclusion.of(estimate.removed_by) is not Exclusion.TASK:
                shares[f"share/{estimate.arm}"] = 0.0
    for arm, count in Counter(r.decision.arm for r in routed).items():
        shares[f"share/{arm}"] = count / len(routed)
    return shares


def _first_tokens(routed: Sequence[Record]) -> dict[str, float]:
    """Median and 95th percentile of each arm's time to the first token."""
    found = {}
    for arm in {r.decision.arm for r in routed}:
        figures = figures_of(r for r in routed if r.decision.arm == arm)
        if figures.ttft_p50_s is not None and figures.ttft_p95_s is not None:
            found[f"ttft_p50_s/{arm}"] = figures.ttft_p50_s
            found[f"ttft_p95_s/{arm}"] = figures.ttft_p95_s
            found[f"streams/{arm}"] = float(figures.streams)
    return found


def _known(value: float | None) -> float:
    return nan if value is None else value


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return float(np.mean(known)) if known else nan
