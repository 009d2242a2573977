"""The picture of the surge benchmark: where `auto` goes, how long it takes, and how many replicas there are."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WINDOW_S = 5.0


def draw(rows: pd.DataFrame, states: pd.DataFrame, saturated: str, path: Path) -> None:
    """Save it.

    Args:
        rows: one an answer, as benchmarks/surge.py records them.
        states: one a look at the router, the same.
        saturated: the size on which the surge was.
        path: of the picture.
    """
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(11, 9), sharex=True, layout="constrained")
    auto = rows[(rows.kind == "auto") & (rows.status == 200)].sort_values("at_s")
    names = sorted(auto.model.unique())
    window = (auto.at_s // WINDOW_S) * WINDOW_S
    shares = pd.crosstab(window, auto.model, normalize="index").reindex(columns=names)
    top.stackplot(shares.index, shares.T.values, labels=names, step="post")
    top.set(ylabel="share of auto", ylim=(0, 1))
    top.legend(loc="lower left")
    by_window = auto.groupby(window).latency_s
    middle.plot(by_window.quantile(0.95), drawstyle="steps-post", label="auto, p95")
    middle.plot(by_window.quantile(0.5), drawstyle="steps-post", label="auto, p50")
    forced = rows[(rows.kind == "forced") & (rows.status == 200) & (rows.phase == "surge")]
    at = (forced.at_s // WINDOW_S) * WINDOW_S
    middle.plot(forced.groupby(at).latency_s.quantile(0.95), drawstyle="steps-post", label=f"{saturated} by name, p95")
    middle.set(ylabel="latency, s", yscale="log")
    middle.legend(loc="upper left")
    for column in [c for c in states.columns if c.startswith("replicas/")]:
        bottom.plot(states.at_s, states[column], drawstyle="steps-post", label=column.removeprefix("replicas/"))
    bottom.set(ylabel="ready replicas", xlabel="seconds")
    bottom.yaxis.get_major_locator().set_params(integer=True)
    bottom.legend(loc="upper left")
    for phase, there in states.groupby("phase", sort=False):
        for axis in (top, middle, bottom):
            axis.axvline(there.at_s.iloc[0], color="0.6", linewidth=0.8)
        bottom.annotate(str(phase), (there.at_s.iloc[0], bottom.get_ylim()[1]), fontsize=9, va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
