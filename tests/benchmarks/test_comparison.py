"""The paired comparison of our policy with other strategies."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.decisions.comparison import (
    beside,
    chosen_on_other_half,
    distance_closed,
)

TOP = {("a", 0.0): 0.9, ("b", 0.0): 0.8}
# by strategy and setting, the utility of each shuffle in the cells a and b
PLAYED = {
    ("ours", 0): ([0.80, 0.84], [0.70, 0.70]),
    ("peer", 0): ([0.70, 0.80], [0.701, 0.701]),
    ("peer", 1): ([0.90, 0.70], [0.75, 0.69]),
}


def frame() -> pd.DataFrame:
    """A row for each run."""
    rows = []
    for (strategy, variant), cells in PLAYED.items():
        for portfolio, utilities in zip("ab", cells, strict=True):
            for shuffle, utility in enumerate(utilities):
                rows.append((portfolio, 0.0, strategy, variant, shuffle, utility))
    columns = ["portfolio", "cost_weight", "strategy", "variant", "shuffle", "utility"]
    return pd.DataFrame(rows, columns=columns)


def test_cells_ahead_level_and_behind_are_counted() -> None:
    """Ahead is a positive paired difference; a small negative one is level."""
    defaults = next(one for one in beside(frame(), TOP) if one.setting == "defaults")
    assert (defaults.ahead, defaults.level, defaults.cells) == (1, 1, 2)
    assert defaults.most_behind == pytest.approx(0.001)
    assert defaults.short == pytest.approx((0.9 - 0.75 + 0.8 - 0.701) / 2)


def test_the_setting_of_a_grid_is_chosen_on_the_other_half() -> None:
    """The setting that is best in one half is compared in the other one only."""
    played = np.array([PLAYED["peer", 0], PLAYED["peer", 1]])
    # setting 1 is the better one in shuffle 0, and setting 0 in shuffle 1
    assert chosen_on_other_half(played) == pytest.approx(
        np.array([[0.70, 0.70], [0.701, 0.69]])
    )
    grid = next(one for one in beside(frame(), TOP) if one.setting == "grid")
    assert grid.ahead == 2 and grid.most_behind == 0.0


def test_the_closed_distance_is_a_ratio_of_sums() -> None:
    """A cell whose best peer is far from the top counts more."""
    closed = distance_closed(frame(), TOP)
    assert closed == pytest.approx((0.82 - 0.75 + 0.70 - 0.701) / (0.15 + 0.099))
    alone = frame()
    assert distance_closed(alone[alone.strategy == "ours"], TOP) is None
