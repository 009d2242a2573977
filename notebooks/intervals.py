"""Intervals of means that hold for several comparisons together.

The best of many sizes or policies looks better than it is. So where m intervals are compared, each has the level
1 - 0.05/m (Bonferroni; Dunn, JASA 1961): all of them together cover the truth with at least 95 %, whatever their
dependence.
"""

from statistics import NormalDist

import numpy as np
import pandas as pd

from policies.evaluation.kind_figures import interval

LEVEL = 0.95


def level_of(intervals: int) -> float:
    """The level of each of several intervals that hold together at LEVEL."""
    return 1 - (1 - LEVEL) / max(1, intervals)


def z_of(intervals: int) -> float:
    """The factor of the standard error in each of several normal intervals that hold together at LEVEL."""
    return NormalDist().inv_cdf(0.5 + level_of(intervals) / 2)


def mean_interval(values: pd.Series, intervals: int) -> tuple[float, float, float]:
    """Mean, and the bounds of one of several intervals that hold together; NaN where there are fewer than two values.

    Means of scores, all of them 0 or all of them 1, get Wilson's interval: a standard error would be 0.
    """
    known = values.dropna()
    n = len(known)
    mean = known.mean() if n else np.nan
    if n < 2:
        return mean, np.nan, np.nan
    z = z_of(intervals)
    if known.isin((0.0, 1.0)).all():
        return mean, *interval(mean, n, z)
    half = z * known.std() / np.sqrt(n)
    return mean, mean - half, mean + half
