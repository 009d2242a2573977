"""The latest decisions of a policy, and what they show: reward, regret, shares, cost, latency, feedback."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable

import numpy as np

from policies.ledger import IMPLICIT, Event, Record
from policies.replay import score, utility
from policies.types import FORCED, Decision, Feedback, Outcome

SIZE = 500  # decisions over which is averaged
TOTALS = ("regret_total", "cost_usd_total", "feedback_total")


def regret(decision: Decision) -> float:
    """By how much the choice was worth less than the best eligible arm, as the policy itself expected it then.

    An estimate: it is what exploration costs if the policy is right, and 0 where it holds a wrong choice for the best.
    """
    eligible = [e.utility for e in decision.estimates if not e.removed_by]
    return max(0.0, max(eligible, default=0.0) - decision.estimate().utility) if eligible else 0.0


class Window:
    """Of one policy version, or of all together.

    Args:
        size: decisions that it holds.
        totals: to go on from, by the names in TOTALS.
    """

    def __init__(self, size: int = SIZE, totals: dict[str, float] | None = None):
        self._records: deque[Record] = deque(maxlen=size)
        self.totals = {name: (totals or {}).get(name, 0.0) for name in TOTALS}
        self.sequence = 0  # of the latest decision

    def add(self, event: Event, record: Record) -> None:
        """Take in an event that counts, with the record of its decision (Ledger's `applied`)."""
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
        """What the decisions that it holds show now; what nothing is known of is left out.

        Returns:
            `reward` (utility of the routed requests that have a score), `score`, `regret` (per routed request, as
            estimated then), `share/ARM` and `fallback_rate` of the routed, `cost_usd` per answer, `ttft_p50_s/ARM`
            and `ttft_p95_s/ARM` of streams, `error_rate`, `feedback_coverage` (share of the answers that somebody
            scored), and the totals.
        """
        records = list(self._records)
        routed = [r for r in records if r.decision.fallback != FORCED]
        finished = [r.outcome for r in records if r.outcome is not None]
        answered = [r for r in records if r.outcome is not None and r.outcome.status == "ok"]
        figures = {
            "reward": _mean(utility(r) for r in routed),
            "score": _mean(score(r) for r in routed),
            "regret": _mean(regret(r.decision) for r in routed),
            "fallback_rate": _mean(float(r.decision.fallback != "") for r in routed),
            "cost_usd": _mean(outcome.cost_usd for outcome in finished),
            "error_rate": _mean(float(outcome.status == "error") for outcome in finished),
            "feedback_coverage": _mean(float(bool(r.said())) for r in answered),
        }
        shares = Counter(r.decision.arm for r in routed)
        figures |= {
            f"share/{e.arm}": 0.0
            for r in routed[-1:]
            for e in r.decision.estimates
            if "does not do" not in e.removed_by
        }
        figures |= {f"share/{arm}": count / len(routed) for arm, count in shares.items()}
        first = defaultdict(list)
        for record in answered:
            if record.outcome is not None and record.outcome.ttft_s > 0:
                first[record.decision.arm].append(record.outcome.ttft_s)
        for arm, seconds in first.items():
            figures[f"ttft_p50_s/{arm}"], figures[f"ttft_p95_s/{arm}"] = np.quantile(seconds, (0.5, 0.95)).tolist()
        return {name: value for name, value in figures.items() if not np.isnan(value)} | self.totals


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
