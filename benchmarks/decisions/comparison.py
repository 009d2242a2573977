"""Paired comparison of our policy with each other strategy, cell by cell.

Every strategy plays the same shuffles, so the difference of a cell is the mean of the paired differences. The setting
of a peer's grid is the best one over all cells. It is chosen on one half of the shuffles and compared on the other
half, both ways, so that the choice does not see the figures that it is compared by.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from policies.types import Vector

LEVEL = 0.002  # utility a request; a smaller difference either way counts as level
OURS = "ours"


@dataclass(frozen=True)
class Comparison:
    """Our policy beside one strategy.

    setting: "defaults" or "grid".
    short: what the strategy's mean utility over the cells is below the top's.
    ahead, level: numbers of cells.
    most_behind: largest difference of a cell by which ours is behind; 0 if it is behind in none.
    """

    strategy: str
    setting: str
    short: float
    cells: int
    ahead: int
    level: int
    most_behind: float

    def row(self) -> dict[str, str]:
        """The row of a table."""
        return {
            "strategy": self.strategy,
            "setting": self.setting,
            "short of the top": f"{self.short:.4f}",
            "ours ahead": f"{self.ahead} of {self.cells}",
            "ahead or level": f"{self.ahead + self.level} of {self.cells}",
            "most behind": f"{self.most_behind:.4f}",
        }


def beside(
    frame: pd.DataFrame, top: Mapping[tuple[str, float], float]
) -> list[Comparison]:
    """Our policy beside every other strategy, at its defaults and at the best setting of its grid.

    Args:
        frame: a row for each run, with portfolio, cost_weight, strategy, variant, shuffle, utility.
        top: by portfolio and λ, the better of the best single arm and the offline ridge.
    """
    wide = frame.pivot_table(
        index=["portfolio", "cost_weight"],
        columns=["strategy", "variant", "shuffle"],
        values="utility",
    )
    height = pd.Series(top)
    height = height[[cell in wide.index for cell in height.index]]
    wide = wide.loc[height.index]
    if OURS not in wide.columns.get_level_values(0):
        return []
    ours = wide[OURS][0].to_numpy()  # [cells, shuffles]
    found = []
    for strategy in dict.fromkeys(wide.columns.get_level_values(0)):
        if strategy == OURS:
            continue
        variants = wide[strategy].columns.get_level_values(0).unique()
        played = np.stack([wide[strategy][v].to_numpy() for v in variants])
        found.append(_compared(strategy, "defaults", ours, played[0], height))
        if len(played) > 1 and ours.shape[1] > 1:
            fair = chosen_on_other_half(played)
            found.append(_compared(strategy, "grid", ours, fair, height))
    return sorted(found, key=lambda one: one.short)


def chosen_on_other_half(played: Vector) -> Vector:
    """Utilities [cells, shuffles] of the setting that was the best one in the other half of the shuffles.

    Args:
        played: [settings, cells, shuffles] utilities.
    """
    even = np.arange(played.shape[2]) % 2 == 0
    fair = np.empty(played.shape[1:])
    for half in (even, ~even):
        best = played[:, :, ~half].mean(axis=(1, 2)).argmax()
        fair[:, half] = played[best][:, half]
    return fair


def _compared(
    strategy: str, setting: str, ours: Vector, theirs: Vector, height: pd.Series
) -> Comparison:
    difference = (ours - theirs).mean(axis=1)
    ahead = difference > 0
    level = ~ahead & (difference > -LEVEL)
    return Comparison(
        strategy,
        setting,
        float((height.to_numpy() - theirs.mean(axis=1)).mean()),
        len(difference),
        int(ahead.sum()),
        int(level.sum()),
        float(max(0.0, -difference.min())),
    )


def distance_closed(
    frame: pd.DataFrame, top: Mapping[tuple[str, float], float]
) -> float | None:
    """Share of the summed distance from the best peer at its defaults to the top that ours closes.

    The best peer is picked in each cell afterwards. None without peers, or if the peers are at the top already.
    """
    at_defaults = frame[frame.variant == 0]
    means = at_defaults.groupby(["portfolio", "cost_weight", "strategy"]).utility.mean()
    gained = 0.0
    distance = 0.0
    for cell, height in top.items():
        here = means[cell]
        peers = here.drop(labels=[OURS, "random"], errors="ignore")
        if OURS not in here or not len(peers):
            return None
        gained += here[OURS] - peers.max()
        distance += height - peers.max()
    return gained / distance if distance > 0 else None
