"""The figures of rules, their tables, and their utility at equal GPU-hours."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tabulate import tabulate

from benchmarks.autoscaling.rules import SERVE, WARM, Rule
from benchmarks.autoscaling.scaler import RuleScaler
from benchmarks.cluster.simulation import Run
from policies.types import Objective

UNKNOWN = "–"


@dataclass(frozen=True)
class Figures:
    """The figures of one rule in one run.

    quality: mean score, 0 for a refused request. utility: mean, see Run.utility. refused: share.
    p50_s, p95_s: of the answered requests; None if there were none.
    gpu_hours: [K] of each size, starts included. changes: starts and stops of replicas an hour.
    larger: share of the requests that a larger size answered.
    waits_s: see RuleScaler. unmet: needs that no replica met.
    """

    period: str
    portfolio: str
    seed: int
    rule: str
    knob: str
    quality: float
    utility: float
    refused: float
    p50_s: float | None
    p95_s: float | None
    gpu_hours: tuple[float, ...]
    changes: float
    larger: float
    waits_s: tuple[float, ...]
    unmet: int

    @property
    def hours(self) -> float:
        """GPU-hours of all sizes."""
        return sum(self.gpu_hours)


def figures(
    run: Run,
    objective: Objective,
    scaler: RuleScaler,
    rule: Rule,
    where: tuple[str, str, int],
    hours: float,
) -> Figures:
    """The figures of a run.

    Args:
        run: of the rule.
        objective: of its requests.
        scaler: that ran the rule.
        rule: the rule.
        where: period, portfolio, seed.
        hours: duration of the arrivals.
    """
    answered = run.latency_s[run.chosen >= 0]
    p50_s, p95_s = (None, None)
    if len(answered):
        p50_s, p95_s = (float(s) for s in np.percentile(answered, (50, 95)))
    return Figures(
        *where,
        rule.name,
        rule.knob,
        quality=float(run.score.mean()),
        utility=float(run.utility(objective).mean()),
        refused=float((run.chosen < 0).mean()),
        p50_s=p50_s,
        p95_s=p95_s,
        gpu_hours=tuple(float(part) for part in run.gpu_hours),
        changes=(run.starts + run.stops) / hours,
        larger=float((run.chosen > 0).mean()),
        waits_s=tuple(scaler.waits_s),
        unmet=scaler.unmet,
    )


@dataclass(frozen=True)
class Point:
    """The means of a rule with one setting over the seeds.

    wait_s: median over all needs that were met; None without any. met, unmet: their numbers in all runs.
    won: share of the lost utility that was won back: 0 for Serve's own rule at zero, 1 for a size that is kept warm.
    won_quality: the same of the quality. spent: the same of the GPU-hours. None where the two rules do not differ.
    """

    rule: str
    knob: str
    quality: float
    utility: float
    refused: float
    p50_s: float | None
    p95_s: float | None
    gpu_hours: tuple[float, ...]
    changes: float
    larger: float
    wait_s: float | None
    met: int
    unmet: int
    won: float | None = None
    won_quality: float | None = None
    spent: float | None = None

    @property
    def hours(self) -> float:
        """GPU-hours of all sizes."""
        return sum(self.gpu_hours)


def points(rows: Sequence[Figures]) -> list[Point]:
    """A point for each rule and setting, in the order of the rows; they must be of one period and portfolio."""
    grouped: dict[tuple[str, str], list[Figures]] = {}
    for row in rows:
        grouped.setdefault((row.rule, row.knob), []).append(row)
    means = {key: _mean(own) for key, own in grouped.items()}
    cold, warm = means.get((SERVE, "")), means.get((WARM, ""))
    if cold is None or warm is None:
        return list(means.values())
    return [
        Point(
            **{
                **point.__dict__,
                "won": _share(point.utility, cold.utility, warm.utility),
                "won_quality": _share(point.quality, cold.quality, warm.quality),
                "spent": _share(point.hours, cold.hours, warm.hours),
            }
        )
        for point in means.values()
    ]


def _mean(rows: Sequence[Figures]) -> Point:
    waits = [wait for row in rows for wait in row.waits_s]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return Point(
        rows[0].rule,
        rows[0].knob,
        float(np.mean([row.quality for row in rows])),
        float(np.mean([row.utility for row in rows])),
        float(np.mean([row.refused for row in rows])),
        mean([row.p50_s for row in rows]),
        mean([row.p95_s for row in rows]),
        tuple(np.mean([row.gpu_hours for row in rows], axis=0).tolist()),
        float(np.mean([row.changes for row in rows])),
        float(np.mean([row.larger for row in rows])),
        float(np.median(waits)) if waits else None,
        len(waits),
        sum(row.unmet for row in rows),
    )


def _share(value: float, low: float, high: float) -> float | None:
    return (value - low) / (high - low) if high != low else None


def at_hours(curve: Sequence[Point], hours: float, figure: str) -> float | None:
    """A figure of a rule at these GPU-hours, between its two nearest settings; None outside of its settings.

    Between Serve's own rule at zero and with one kept warm this is what a fixed timetable would give.
    """
    ordered = sorted(curve, key=lambda point: point.hours)
    if not ordered or not ordered[0].hours <= hours <= ordered[-1].hours:
        return None
    given = [getattr(point, figure) for point in ordered]
    return float(np.interp(hours, [point.hours for point in ordered], given))


def table(found: Sequence[Point]) -> str:
    """A row for each rule and setting."""
    timetable = [point for point in found if point.rule in (SERVE, WARM)]
    shown = []
    for point in found:
        fixed = at_hours(timetable, point.hours, "utility")
        gain = None if fixed is None else point.utility - fixed
        needs = point.met + point.unmet
        shown.append(
            (
                ", ".join(part for part in (point.rule, point.knob) if part),
                f"{point.quality:.3f}",
                f"{point.utility:.3f}",
                f"{point.refused:.1%}",
                f"{_text(point.p50_s, '.1f')}, {_text(point.p95_s, '.1f')}",
                " + ".join(f"{part:.2f}" for part in point.gpu_hours),
                f"{point.larger:.0%}",
                f"{point.changes:.2f}",
                f"{_text(point.wait_s, '.0f')} ({point.met} of {needs})",
                _text(point.won, ".0%"),
                _text(point.spent, ".0%"),
                _text(gain, "+.3f"),
            )
        )
    headers = (
        "rule",
        "quality",
        "utility",
        "refused",
        "p50, p95 s",
        "GPU-h by size",
        "larger",
        "changes/h",
        "need to warm, s",
        "won back",
        "hours",
        "utility − timetable's",
    )
    return str(tabulate(shown, headers, tablefmt="pipe", disable_numparse=True))


def _text(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def plain(rows: Sequence[Figures | Point]) -> list[dict[str, object]]:
    """The figures as plain data, for JSON."""
    return [asdict(row) for row in rows]
