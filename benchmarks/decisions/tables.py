"""Tables of the quality benchmark that show every strategy, not only the best ones."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from policies.types import Vector

# by portfolio and λ: mean utility [shuffles] of each reference
Cells = Mapping[tuple[str, float], Mapping[str, Vector]]


def interval(values: Vector) -> str:
    """Mean ± 95 % interval of the mean over the shuffles [N]; a single value has no interval."""
    if len(values) == 1:
        return f"{values.mean():.4f}"
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.4f} ± {half:.4f}"


def by_strategy(frame: pd.DataFrame, known: Cells) -> dict[str, pd.DataFrame]:
    """A table for each portfolio: strategies in rows, λ in columns, mean utility ± 95 % interval over the shuffles.

    A strategy with a grid has two columns for each λ: its documented defaults, and the best setting of its grid in
    this cell ("=" if the defaults are the best). The references follow: each fixed arm, the best of them in hindsight,
    the ridge and the oracle.

    Args:
        frame: a row for each run, with portfolio, cost_weight, strategy, variant, utility.
        known: bounds.by_shuffle of every cell.
    """
    tables = {}
    for portfolio in dict.fromkeys(name for name, _ in known):
        weights = [weight for name, weight in known if name == portfolio]
        runs = frame[frame.portfolio == portfolio]
        rows: dict[str, dict[str, str]] = {
            str(name): {} for name in runs.strategy.unique()
        }
        for (strategy, weight), cell in runs.groupby(
            ["strategy", "cost_weight"], sort=False
        ):
            variants = {
                int(v): g.utility.to_numpy() for v, g in cell.groupby("variant")
            }
            best = max(variants, key=lambda v: variants[v].mean())
            rows[strategy][f"λ {weight:g}"] = interval(variants[0])
            if len(variants) > 1:
                rows[strategy][f"λ {weight:g}, of its grid"] = (
                    "=" if best == 0 else interval(variants[best])
                )
        for weight in weights:
            for name, values in known[portfolio, weight].items():
                rows.setdefault(name, {})[f"λ {weight:g}"] = interval(values)
        columns = [
            f"λ {weight:g}{which}"
            for weight in weights
            for which in ("", ", of its grid")
        ]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=None).reindex(
            columns=columns
        )
        table = table.dropna(axis=1, how="all").fillna("")
        tables[portfolio] = table.rename_axis("utility").reset_index()
    return tables


def shortfall(
    frame: pd.DataFrame, known: Mapping[tuple[str, float], Mapping[str, float]]
) -> pd.DataFrame:
    """The shortfall of each strategy: mean and worst over the cells.

    The shortfall is the utility that is missing to the better of the best single arm and the offline ridge. A strategy
    has a row at its defaults and, if its grid has a better one, at its best single setting for all cells. "ours ahead
    in" counts the cells in which the strategy "ours" has more utility.

    Args:
        frame: as in `by_strategy`.
        known: mean utility of the references in every cell.
    """
    cells = frame.groupby(
        ["strategy", "variant", "portfolio", "cost_weight"]
    ).utility.mean()
    ours = cells["ours"][0] if "ours" in cells.index.get_level_values(0) else None
    rows = []
    for strategy in cells.index.get_level_values(0).unique():
        short = {}
        for variant in cells[strategy].index.get_level_values(0).unique():
            own = cells[strategy][variant]
            top = pd.Series(
                {
                    cell: max(known[cell]["best single"], known[cell]["offline ridge"])
                    for cell in own.index
                }
            )
            short[variant] = top - own
        for name, chosen in (
            ("defaults", 0),
            ("best of its grid", min(short, key=lambda v: short[v].mean())),
        ):
            if name == "defaults" or chosen != 0:
                row = {
                    "strategy": strategy,
                    "setting": name,
                    "mean": short[chosen].mean(),
                    "worst": short[chosen].max(),
                }
                if ours is not None and strategy != "ours":
                    row["ours ahead in"] = (
                        f"{(ours > cells[strategy][chosen]).sum()} of {len(ours)}"
                    )
                rows.append(row)
    return pd.DataFrame(rows).sort_values("mean").fillna("")
