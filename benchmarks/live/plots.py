"""A picture of a replay: utility and p95 of every contender by load."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.live.cells import AUTO as ROUTER
from benchmarks.live.figures import Figures, by_contender, groups
from deployments.observability.colours import AUTO, colours_of

PANELS = (
    ("utility", "utility, refused = 0"),
    ("right", "share of all requests that is right"),
    ("p95_s", "p95 of the latency, s"),
)


def draw(rows: Sequence[Figures], path: Path) -> Path:
    """A row of panels for each recording: lines are means over the rounds, points are rounds."""
    traces = list(dict.fromkeys(row.cell.trace for row in rows))
    names = list(dict.fromkeys(row.cell.contender for row in rows))
    fixed = [name for name in names if name != ROUTER]
    colours = {ROUTER: AUTO, **colours_of(fixed)}
    figure, axes = plt.subplots(
        len(traces),
        len(PANELS),
        figsize=(4.4 * len(PANELS), 3.6 * len(traces)),
        layout="constrained",
        squeeze=False,
    )
    for line, trace in zip(axes, traces, strict=True):
        own = [row for row in rows if row.cell.trace == trace]
        for axis, (figure_name, title) in zip(line, PANELS, strict=True):
            for name in names:
                _line(axis, own, name, figure_name, colours[name])
            axis.set(title=trace, xlabel="multiple of the first rate", ylabel=title)
            axis.set_xticks(sorted({row.cell.factor for row in own}))
        line[-1].set_yscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _line(
    axis: plt.Axes, rows: Sequence[Figures], contender: str, figure: str, colour: str
) -> None:
    factors: list[float] = []
    means: list[float] = []
    for group in groups(rows):
        own = by_contender(group).get(contender, [])
        known = [value for row in own if (value := getattr(row, figure)) is not None]
        if known:
            factors.append(group[0].cell.factor)
            means.append(float(np.mean(known)))
            axis.plot(
                [group[0].cell.factor] * len(known),
                known,
                ".",
                color=colour,
                alpha=0.4,
            )
    order = np.argsort(factors)
    axis.plot(
        np.array(factors)[order],
        np.array(means)[order],
        label=contender,
        color=colour,
        linewidth=2.6 if contender == ROUTER else 1.3,
    )
