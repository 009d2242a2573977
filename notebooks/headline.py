"""Says in words what a log is, how much it holds, and where the router sends which requests."""

from datetime import UTC, datetime

import numpy as np
import pandas as pd

from notebooks import analysis
from notebooks.decision_log import DecisionLog
from notebooks.intervals import mean_interval, z_of
from policies.evaluation.kind_figures import interval
from policies.events import FORCED, Decision

ENOUGH = 30  # decisions of a kind, below which nothing is said about it


def headline(log: DecisionLog) -> pd.DataFrame:
    """What the log is and how much it holds, in words; each mean has its n and a 95 % interval."""
    frame = analysis.decisions(log)
    counted = [event for event in log.events if isinstance(event, Decision)]
    forced = sum(decision.fallback == FORCED for decision in counted)
    first, last = (
        datetime.fromtimestamp(value, UTC)
        for value in (frame.time_s.min(), frame.time_s.max())
    )
    versions = list(dict.fromkeys(r.decision.policy_version for r in log.records))
    shown = versions if len(versions) <= 4 else [versions[0], "…", versions[-1]]
    rows = {
        "journal": log.name,
        "period": f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC",
        "decisions": f"{max(len(counted), len(frame)):,}, of which {len(frame):,} routed and {forced:,} for a client "
        "that named the model",
        "routed to": ", ".join(
            f"{arm} {count:,}" for arm, count in _counts(frame, log.names).items()
        ),
        "scored": f"{frame.scored.sum():,} of {len(frame):,} routed decisions",
        "policy": ", ".join(shown),
        "score": _mean(frame.score, within=(0.0, 1.0)),
        "latency": _mean(frame.latency_s, " s"),
        "cost": _mean(1e6 * frame.cost_usd, " millionths of a US dollar a request"),
    }
    if log.truth is not None:
        rows["also"] = (
            "the demo asked every fixed size and the static rules the same questions"
        )
    return pd.DataFrame({"": list(rows), "this log": list(rows.values())}).set_index("")


def _counts(frame: pd.DataFrame, names: list[str]) -> dict[str, int]:
    """Number of decisions by arm, in the order of the names."""
    return {arm: int((frame.arm == arm).sum()) for arm in names}


def _mean(
    values: pd.Series,
    unit: str = "",
    within: tuple[float, float] = (-np.inf, np.inf),
) -> str:
    """A mean with its 95 % interval and n, in words."""
    known = values.dropna()
    if known.empty:
        return "none yet (n = 0)"
    if len(known) < 2:
        return f"{known.iloc[0]:.3g}{unit} (n = 1)"
    mean, low, high = mean_interval(known, 1)
    low, high = max(low, within[0]), min(high, within[1])
    return f"{mean:.3g}{unit} [{low:.3g}, {high:.3g}] (n = {len(known):,})"


def findings(log: DecisionLog) -> list[str]:
    """Where the router sends each of the most frequent kinds by now, as sentences about this log.

    They speak of the last third of the decisions. The intervals of all sentences hold together.
    """
    frame = analysis.decisions(log)
    last = frame.iloc[2 * len(frame) // 3 :]
    counts = last.kind.value_counts()
    kinds = counts[counts >= ENOUGH].index[:4].tolist()
    if not kinds:
        return [
            f"No kind of request has {ENOUGH} decisions in the last third of this log; nothing is said about where the "
            "router sends which."
        ]
    sentences = []
    for kind in kinds:
        arms = last[last.kind == kind].arm
        favourite = arms.value_counts().index[0]
        share = (arms == favourite).mean()
        low, high = interval(share, len(arms), z_of(len(kinds)))
        sentences.append(
            f"'{kind}': {favourite} got {share:.0%} [{low:.0%}, {high:.0%}] of the last {len(arms)}."
        )
    return sentences
