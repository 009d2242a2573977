"""Metrics of a policy's latest decisions: reward, regret, shares, cost, latency, feedback."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable

import numpy as np

from policies.constraints import Exclusion
from policies.evaluation.replay import score, utility
from policies.events import FORCED, IMPLICIT, Decision, Event, Feedback, Outcome, Record

SIZE = 500  # decisions in a window
TOTALS = ("regret_total", "cost_usd_total", "feedback_total")


def regret(decision: Decision) -> float:
    """The expected utility of the best eligible arm less that of the chosen arm, both as the policy estimated them.

    It is an estimate: the cost of exploration if the policy's estimates are right. A choice that is wrong because an
    estimate is wrong has a regret of 0 here.
    """
    eligible = [e.utility for e in decision.estimates if not e.removed_by]
    if not eligible:
        return 0.0
    return max(0.0, max(eligible) - decision.estimate().utility)


class Window:
    """The latest decisions of one policy version, or of all versions together.

    Args:
        size: number of decisions that it holds.
        totals: start values of the totals, by the names in TOTALS.
    """

    def __init__(self, size: int = SIZE, totals: dict[str, float] | None = None):
        self._records: deque[Record] = deque(maxlen=size)
        self.totals = {name: (totals or {}).get(name, 0.0) for name in TOTALS}
        self.sequence = 0  # of the latest decision

    def add(self, event: Event, record: Record) -> None:
        """Add an event that changed a record, with that record (the `applied` callback of DecisionRecords)."""
        if isinstance(event, Decision):
            self._records.append(record)
            self.sequence = max(self.sequence, event.sequence)
            if event.fallback != FORCED:
                self.totals["regret_total"] += regret(event)
        elif isinstance(event, Outcome):
            self.totals["cost_usd_total"] += event.cost_usd
        elif isinstance(event, Feedback):
            self.totals["feedback_total"] += event.source != IMPLICIT

    def figures(self) -> dict[str, float]:
        """The metrics of the decisions in the window; metrics without data are left out.

        Returns:
            `reward` (utility of the routed requests that have a score), `score`, `regret` (per routed request, as
            estimated at the decision), `share/ARM` and `fallback_rate` of the routed requests, `cost_usd` per answer,
            `ttft_p50_s/ARM` and `ttft_p95_s/ARM` of streams, `error_rate`, `feedback_coverage` (share of the answers
            with an explicit score), and the totals.
        """
        records = list(self._records)
        routed = [r for r in records if r.decision.fallback != FORCED]
        finished = [r.outcome for r in records if r.outcome is not None]
        answered = [
            r for r in records if r.outcome is not None and r.outcome.status == "ok"
        ]
        figures = {
            "reward": _mean(utility(r) for r in routed),
            "score": _mean(score(r) for r in routed),
            "regret": _mean(regret(r.decision) for r in routed),
            "fallback_rate": _mean(float(r.decision.fallback != "") for r in routed),
            "cost_usd": _mean(outcome.cost_usd for outcome in finished),
            "error_rate": _mean(
                float(outcome.status == "error") for outcome in finished
            ),
            "feedback_coverage": _mean(
                float(bool(r.explicit_scores())) for r in answered
            ),
        }
        shares = Counter(r.decision.arm for r in routed)
        # An arm that could do the latest task has a share, even if it is 0.
        for record in routed[-1:]:
            for estimate in record.decision.estimates:
                if Exclusion.of(estimate.removed_by) is not Exclusion.TASK:
                    figures[f"share/{estimate.arm}"] = 0.0
        for arm, count in shares.items():
            figures[f"share/{arm}"] = count / len(routed)
        first = defaultdict(list)
        for record in answered:
            if record.outcome is not None and record.outcome.ttft_s > 0:
                first[record.decision.arm].append(record.outcome.ttft_s)
        for arm, seconds in first.items():
            figures[f"ttft_p50_s/{arm}"], figures[f"ttft_p95_s/{arm}"] = np.quantile(
                seconds, (0.5, 0.95)
            ).tolist()
        return {
            name: value for name, value in figures.items() if not np.isnan(value)
        } | self.totals


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
