"""The figures of the cells of a replay, and their tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from assets.tasks import Task
from benchmarks.live.cells import AUTO, Cell, is_right
from benchmarks.live.plan import Seen
from benchmarks.live.system import Running
from policies.evaluation.size_comparison import Estimate, mean_interval

LEVEL = 0.95
UNKNOWN = "–"


@dataclass(frozen=True)
class Figures:
    """The figures of one cell; None is unknown.

    requests: their number.
    utility: mean over all requests by the running objective; 0 for one that was refused or failed.
    right: share of all requests. refused: share that was refused or failed.
    p50_s, p95_s, ttft_p95_s: of the answers, from the intended time of sending.
    client_s, recorded_s: mean latency of the answers that were looked up, from the real time of sending as the client
        saw it, and as the router recorded it.
    lag_p95_s: how late the client itself was.
    replicas: ready ones of all models at the end.
    shares: by model, share of the answers.
    """

    cell: Cell
    requests: int
    utility: float
    right: float
    refused: float
    p50_s: float | None
    p95_s: float | None
    ttft_p95_s: float | None
    client_s: float | None
    recorded_s: float | None
    lag_p95_s: float
    replicas: int
    shares: Mapping[str, float]

    @property
    def ratio(self) -> float | None:
        """The recorded share of what the client saw of the latency."""
        if self.client_s is None or self.recorded_s is None:
            return None
        return self.recorded_s / self.client_s


def figures(
    cell: Cell,
    tasks: Sequence[Task],
    seen: Sequence[Seen],
    before: Running,
    recorded_s: Mapping[str, float],
    replicas: int,
) -> Figures:
    """The figures of a cell.

    Args:
        cell: what was played.
        tasks: one for each request.
        seen: what the client saw of each.
        before: the running system, with its objective and its prices.
        recorded_s: by decision, the latency that the router recorded.
        replicas: at the end.
    """
    answers = [one for one in seen if one.answered]
    right = [is_right(task, one) for task, one in zip(tasks, seen, strict=True)]
    utility = [
        before.objective.utility(float(good), one.latency_s, _cost_usd(before, one))
        if one.answered
        else 0.0
        for good, one in zip(right, seen, strict=True)
    ]
    looked_up = [one for one in answers if one.decision_id in recorded_s]
    models = [one.model for one in answers]
    return Figures(
        cell,
        len(seen),
        float(np.mean(utility)),
        float(np.mean(right)),
        1.0 - len(answers) / len(seen),
        _percentile([one.latency_s for one in answers], 50),
        _percentile([one.latency_s for one in answers], 95),
        _percentile([one.ttft_s for one in answers], 95),
        _mean([one.served_s for one in looked_up]),
        _mean([recorded_s[one.decision_id] for one in looked_up]),
        float(np.percentile([one.lag_s for one in seen], 95)),
        replicas,
        {name: models.count(name) / len(models) for name in sorted(set(models))},
    )


def _cost_usd(before: Running, one: Seen) -> float:
    return before.prices[one.model].cost_usd(one.prompt_tokens, one.output_tokens)


def _percentile(values: Sequence[float], share: float) -> float | None:
    return float(np.percentile(values, share)) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


@dataclass(frozen=True)
class Comparison:
    """The router beside the fixed size that has the highest mean utility in the same cells.

    trace, factor: of the cells.
    difference: utility of the router less that of this size, paired by round, with its 95 % interval over the rounds.
    """

    trace: str
    factor: float
    best: str
    difference: Estimate


def groups(rows: Sequence[Figures]) -> list[list[Figures]]:
    """The rows of each recording and factor, in the order of their first rows."""
    found: dict[tuple[str, float], list[Figures]] = {}
    for row in rows:
        found.setdefault((row.cell.trace, row.cell.factor), []).append(row)
    return list(found.values())


def by_contender(group: Sequence[Figures]) -> dict[str, list[Figures]]:
    """The rows of each contender in the order of the rounds, by name; the router comes first."""
    found: dict[str, list[Figures]] = {}
    for row in sorted(group, key=lambda row: row.cell.contender != AUTO):
        found.setdefault(row.cell.contender, []).append(row)
    return {
        name: sorted(own, key=lambda row: row.cell.round) for name, own in found.items()
    }


def compare(group: Sequence[Figures]) -> Comparison | None:
    """The router beside the best fixed size in the rows of one recording and factor; None if one of them is missing.

    Only rounds that both have are compared.
    """
    contenders = by_contender(group)
    ours = {row.cell.round: row.utility for row in contenders.pop(AUTO, ())}
    if not ours or not contenders:
        return None
    best = max(contenders, key=lambda name: _utility(contenders[name]))
    pairs = [
        ours[row.cell.round] - row.utility
        for row in contenders[best]
        if row.cell.round in ours
    ]
    cell = group[0].cell
    difference = mean_interval(np.array(pairs), LEVEL)
    return Comparison(cell.trace, cell.factor, best, difference)


def _utility(rows: Sequence[Figures]) -> float:
    return float(np.mean([row.utility for row in rows]))


def table(group: Sequence[Figures]) -> str:
    """A row for each contender: the means over the rounds. Below it, the router beside the best fixed size."""
    shown = []
    for name, own in by_contender(group).items():
        client, recorded = _over(own, "client_s"), _over(own, "recorded_s")
        ratio = None if client is None or recorded is None else recorded / client
        shown.append(
            (
                name,
                f"{_utility(own):.4f}",
                f"{np.mean([row.right for row in own]):.3f}",
                _number(_over(own, "p50_s")),
                _number(_over(own, "p95_s")),
                _number(_over(own, "ttft_p95_s")),
                f"{np.mean([row.refused for row in own]):.1%}",
                _number(client),
                _number(recorded),
                _number(ratio),
                f"{1e3 * np.mean([row.lag_p95_s for row in own]):.1f}",
                "/".join(str(row.replicas) for row in own),
                _shares(own),
            )
        )
    headers = (
        "asked for",
        "utility",
        "right",
        "p50 s",
        "p95 s",
        "TTFT p95 s",
        "refused",
        "client s",
        "recorded s",
        "ratio",
        "lag p95 ms",
        "replicas",
        "answered by",
    )
    text = str(tabulate(shown, headers, tablefmt="pipe", disable_numparse=True))
    compared = compare(group)
    return text if compared is None else f"{text}\n\n{sentence(compared)}"


def sentence(compared: Comparison) -> str:
    """The comparison in words."""
    found = compared.difference
    text = f"auto − {compared.best}, the best fixed size: {found.mean:+.4f}"
    if found.lower is None or found.upper is None:
        return f"{text} (one round, so no interval)"
    half = (found.upper - found.lower) / 2
    return f"{text} ± {half:.4f} ({found.n} rounds)"


def _over(rows: Sequence[Figures], name: str) -> float | None:
    """The mean of a figure over the rounds that know it."""
    known = [value for row in rows if (value := getattr(row, name)) is not None]
    return _mean(known)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _shares(rows: Sequence[Figures]) -> str:
    names = sorted({name for row in rows for name in row.shares})
    mean = {
        name: np.mean([row.shares.get(name, 0.0) for row in rows]) for name in names
    }
    return " ".join(f"{name} {share:.2f}" for name, share in mean.items())
