"""Figures of a replay: `auto` beside each size and beside the best size of each kind, by seed and third.

The best size of a kind is the one with the highest mean over all recorded answers of all seeds: a third of one seed has
about twenty answers of a kind, too few to say which size is best. Beside it stands the size that is best in the same
third of the same seed, picked in hindsight, which chance favours.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from benchmarks.replay.player import AUTO
from policies.evaluation.size_comparison import mean_interval

MEASURES = ("score", "utility")
LEAD = 0.05  # from which a size leads on a kind
LAST = 3  # third


def interval(values: "pd.Series[float]") -> str:
    """The mean of one value per seed, with its 95 % interval and the number of seeds."""
    found = mean_interval(values.to_numpy(float), 0.95)
    if found.lower is None or found.upper is None:
        return f"{found.mean:.4f} (n = {found.n})"
    half = (found.upper - found.lower) / 2
    return f"{found.mean:.4f} ± {half:.4f} (n = {found.n})"


def by_kind(frame: pd.DataFrame, models: Sequence[str], measure: str) -> pd.DataFrame:
    """[kinds, models] mean of each model over all of its answers."""
    sizes = frame[frame.strategy.isin(models)]
    table = sizes.pivot_table(index="kind", columns="strategy", values=measure)
    return table[list(models)]


def leaders(frame: pd.DataFrame, models: Sequence[str], measure: str) -> dict[str, str]:
    """By kind, the model that leads by at least LEAD; a kind without one is left out."""
    found = {}
    for kind, row in by_kind(frame, models, measure).iterrows():
        ranked = row.sort_values(ascending=False)
        if len(ranked) > 1 and ranked.iloc[0] - ranked.iloc[1] >= LEAD:
            found[str(kind)] = str(ranked.index[0])
    return found


def thirds(frame: pd.DataFrame, models: Sequence[str], measure: str) -> pd.DataFrame:
    """A row for each seed and third: the means of `auto`, of the best size, and of the best size of each kind."""
    best = by_kind(frame, models, measure).idxmax(axis=1)
    sizes = frame[frame.strategy.isin(models)]
    rows: list[dict[str, Any]] = []
    for (seed, third), part in sizes.groupby(["seed", "third"]):
        mean = part.groupby("strategy")[measure].mean()
        of_kind = part[part.strategy == part.kind.map(best)]
        cells = part.pivot_table(index="kind", columns="strategy", values=measure)
        hindsight = part[part.strategy == part.kind.map(cells.idxmax(axis=1))]
        own = frame[
            (frame.strategy == AUTO) & (frame.seed == seed) & (frame.third == third)
        ]
        auto = own[measure].mean()
        rows.append(
            {
                "seed": seed,
                "third": third,
                "n": len(own),
                "auto": auto,
                "best size": str(mean.idxmax()),
                "of best size": mean.max(),
                "best by kind": of_kind[measure].mean(),
                "ratio": auto / of_kind[measure].mean(),
                "by kind, hindsight": hindsight[measure].mean(),
                "ratio, hindsight": auto / hindsight[measure].mean(),
            }
        )
    return pd.DataFrame(rows)


def shares(frame: pd.DataFrame, models: Sequence[str], measure: str) -> pd.DataFrame:
    """A row for each kind that has a leader, and each seed: the leader's share of `auto` in the last third."""
    last = frame[(frame.strategy == AUTO) & (frame.third == LAST)]
    table = by_kind(frame, models, measure)
    rows = []
    for kind, leader in leaders(frame, models, measure).items():
        ranked = table.loc[kind].sort_values(ascending=False)
        for seed, part in last[last.kind == kind].groupby("seed"):
            rows.append(
                {
                    "kind": kind,
                    "leader": leader,
                    "lead": ranked.iloc[0] - ranked.iloc[1],
                    "seed": seed,
                    "n": len(part),
                    "share": (part.model == leader).mean(),
                }
            )
    columns = ["kind", "leader", "lead", "seed", "n", "share"]
    return pd.DataFrame(rows, columns=columns)


def report(frame: pd.DataFrame, models: Sequence[str]) -> str:
    """All tables and the summary as Markdown."""
    parts = []
    for measure in MEASURES:
        rows = thirds(frame, models, measure)
        parts.append(f"## {measure}\n\n{rows.round(4).to_markdown(index=False)}")
        table = by_kind(frame, models, measure)
        parts.append(
            f"Mean {measure} of each size, all seeds:\n\n{table.round(4).to_markdown()}"
        )
        led = shares(frame, models, measure)
        if len(led):
            wide = led.pivot(
                index=["kind", "leader", "lead"], columns="seed", values="share"
            )
            parts.append(
                f"Share of the size that leads by at least {LEAD} in {measure}, last third, by seed:\n\n"
                + wide.reset_index().round(2).to_markdown(index=False)
            )
        parts.append(_summary(rows, led, measure))
    return "\n\n".join(parts)


def _summary(rows: pd.DataFrame, led: pd.DataFrame, measure: str) -> str:
    last = rows[rows.third == LAST]
    lines = [f"Summary of the last third, {measure}:"]
    for name, column in (
        ("auto", "auto"),
        ("best single size", "of best size"),
        ("best size per kind", "best by kind"),
        ("auto / best size per kind", "ratio"),
        ("best size per kind, in hindsight of the same third", "by kind, hindsight"),
        ("auto / the same in hindsight", "ratio, hindsight"),
    ):
        lines.append(f"- {name}: {interval(last[column])}")
    ahead = int((last.auto > last["of best size"]).sum())
    lines.append(
        f"- auto is ahead of the best single size in {ahead} of {len(last)} seeds"
    )
    if len(led):
        by_leader = led.groupby("kind").share.mean()
        below = led[led.share < 0.3]
        lines.append(
            f"- share of the leading size: {interval(led.groupby('seed').share.mean())}; lowest mean of a kind "
            f"{by_leader.min():.2f} ({by_leader.idxmin()}); lowest of a kind in one seed {led.share.min():.2f}; "
            f"below 0.3 in {len(below)} of {len(led)}"
        )
        for row in below.itertuples():
            lines.append(
                f"  - seed {row.seed}: {row.leader} has {row.share:.2f} of {row.n} '{row.kind}'"
            )
    return "\n".join(lines)
