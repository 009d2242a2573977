"""Pictures of the quality benchmark: one panel for each portfolio, and a legend in a panel of its own."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Known = dict[tuple[str, float], dict[str, float]]
BASELINES = {"random": "0.55", "static": "0.25"}  # grey: policies that do not learn
ROUTERS = (
    ("offline ridge", "#e6550d", "-"),
    ("offline ridge, all", "#fdae6b", "-"),
    ("random", "0.55", "--"),
)
COLOURS = ["#d62728", *plt.get_cmap("Dark2").colors]


def _grid(count: int, title: str) -> tuple[Any, list[Any], Any]:
    """A figure with `count` panels, and one more panel for the legend."""
    columns = min(4, count + 1)
    rows = -(-(count + 1) // columns)
    size = (4.0 * columns, 3.6 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.axis("off")
    figure.suptitle(title)
    return figure, flat[:count], flat[count]


def _styles(strategies: list[str]) -> dict[str, dict[str, Any]]:
    """Line styles: ours is thick and blue, baselines are grey and dashed, each peer has a colour."""
    peers = [name for name in strategies if name != "ours" and name not in BASELINES]
    styles: dict[str, dict[str, Any]] = {
        "ours": {"linewidth": 2.8, "zorder": 5, "color": "#1f77b4"}
    }
    styles |= {
        name: {"linewidth": 1.2, "linestyle": "--", "color": grey}
        for name, grey in BASELINES.items()
    }
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(peers)}
    return styles | {name: {"linewidth": 1.2, "color": colour[name]} for name in peers}


def _legend(axes: list[Any], place: Any) -> None:
    """Draw one legend for all panels, with each label once."""
    labelled: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    place.legend(
        list(labelled.values()), list(labelled), loc="center", fontsize=9, frameon=False
    )


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def regret(
    frame: pd.DataFrame, known: Known, folder: Path, cost_weight: float = 0.1
) -> Path:
    """Draw the cumulative regret against the best single arm, for the strategies at their defaults."""
    names = list(dict.fromkeys(p for p, _ in known))
    title = (
        f"Regret against the best single arm in hindsight, λ = {cost_weight:g}; "
        "below 0 is better than any fixed arm"
    )
    figure, axes, place = _grid(len(names), title)
    styles = _styles(list(frame.strategy.unique()))
    for axis, name in zip(axes, names, strict=True):
        cell = frame[
            (frame.portfolio == name)
            & (frame.cost_weight == cost_weight)
            & (frame.variant == 0)
        ]
        best = known[name, cost_weight]["best single"]
        ends = {}
        for strategy, runs in cell.groupby("strategy", sort=False):
            at = np.array(runs["at"].iloc[0])
            lost = best * at - np.mean(runs["curve"].tolist(), axis=0)
            axis.plot(at, lost, label=strategy, **styles[strategy])
            if strategy not in BASELINES:
                ends[strategy] = (lost.min(), lost.max())
        axis.set_title(name, fontsize=11)
        axis.set(xlabel="requests", ylabel="regret, score points")
        axis.axhline(0, color="black", linewidth=0.8)
        low = min(low for low, _ in ends.values())
        high = max(high for _, high in ends.values())
        margin = 0.06 * (high - low)
        axis.set_ylim(min(0.0, low) - margin, high + margin)  # baselines may exceed it
    _legend(axes, place)
    return _save(figure, folder / "quality-regret.png")


def frontier(frame: pd.DataFrame, known: Known, folder: Path) -> Path:
    """Draw score against cost: each strategy over all λ, and each fixed arm."""
    names = list(dict.fromkeys(p for p, _ in known))
    weights = sorted({weight for _, weight in known})
    title = f"Quality and cost of each strategy at λ = {', '.join(f'{w:g}' for w in weights)} (dots; right to left)"
    figure, axes, place = _grid(len(names), title)
    styles = _styles(list(frame.strategy.unique()))
    for axis, name in zip(axes, names, strict=True):
        cell = frame[(frame.portfolio == name) & (frame.variant == 0)]
        for strategy, runs in cell.groupby("strategy", sort=False):
            points = runs.groupby("cost_weight")[["cost", "score"]].mean()
            style = dict(styles[strategy])
            if strategy in BASELINES:
                style["linestyle"] = ""
            axis.plot(
                points.cost,
                points.score,
                marker="o",
                markersize=4,
                label=strategy,
                **style,
            )
        # the utilities at two λ give the score and the cost of an arm
        free = known[name, weights[0]]
        dear = known[name, weights[-1]]
        for i, key in enumerate(key for key in free if key.startswith("always")):
            cost = (free[key] - dear[key]) / (weights[-1] - weights[0])
            score = free[key] + weights[0] * cost
            axis.plot(
                cost,
                score,
                "kx",
                markersize=7,
                label="a fixed arm" if i == 0 else "_",
                zorder=6,
            )
        axis.set_title(name, fontsize=11)
        axis.set(xlabel="mean cost, share of the dearest arm's", ylabel="mean score")
    _legend(axes, place)
    return _save(figure, folder / "quality-frontier.png")


def performance(ranked: pd.DataFrame, folder: Path) -> Path:
    """Draw RouteLLM's call-performance graph of the two-model sets, from the rows of apgr.measure."""
    names = list(ranked.portfolio.unique())
    weights = sorted(ranked["λ"].unique())
    shades = plt.get_cmap("Blues")(np.linspace(0.4, 0.95, len(weights)))
    figure, axes, place = _grid(
        len(names),
        "Two models: gap between weak and strong recovered, by share of strong calls",
    )
    for axis, name in zip(axes, names, strict=True):
        runs = ranked[ranked.portfolio == name]
        lines = [
            (
                f"ours, learned at λ = {weight:g}",
                runs[(runs.router == "ours") & (runs["λ"] == weight)],
                colour,
                "-",
            )
            for weight, colour in zip(weights, shades, strict=True)
        ]
        for router, colour, dash in ROUTERS:
            lines.append((router, runs[runs.router == router], colour, dash))
        for label, trials, colour, dash in lines:
            curve = 100 * np.mean(trials.curve.tolist(), axis=0)
            width = 2.2 if label.startswith("ours") else 1.4
            axis.plot(
                np.linspace(0, 100, len(curve)),
                curve,
                dash,
                label=label,
                color=colour,
                linewidth=width,
            )
        axis.set_title(name, fontsize=11)
        axis.set(
            xlabel="strong calls, %",
            ylabel="performance gap recovered, %",
            xlim=(0, 100),
            ylim=(0, 110),
        )
        axis.axhline(100, color="black", linewidth=0.6)
    _legend(axes, place)
    return _save(figure, folder / "quality-apgr.png")


def changes(frame: pd.DataFrame, folder: Path, window: int = 50) -> Path | None:
    """Draw the scenarios: the share of the arm around the change, and the mean cost against its ceiling."""
    drawn = frame[[bool(curve) for curve in frame.curve]]
    cells = list(drawn.groupby(["scenario", "portfolio"], sort=False))
    if not cells:
        return None
    figure, axes, place = _grid(len(cells), "Worlds that change")
    for axis, ((scenario, name), cell) in zip(axes, cells, strict=True):
        for strategy, runs in cell.groupby("strategy", sort=False):
            # a median, since one shuffle in which the ceiling does not bind would dominate the mean
            middle = np.median if scenario == "budget" else np.mean
            mean = middle(runs.curve.tolist(), axis=0)
            style = {
                "linewidth": 1.1 if strategy.startswith("pareto") else 2.2,
                "label": strategy,
            }
            if scenario == "budget":
                axis.plot(np.arange(len(mean)), 100 * mean, **style)
            else:
                # each share is drawn at the end of its window
                share = np.convolve(mean, np.ones(window) / window, mode="valid")
                requests = np.arange(window - 1, len(mean)) - len(mean) // 2
                axis.plot(requests, share, **style)
        axis.set(title=f"{scenario}, {name}", xlabel="request")
        if scenario == "budget":
            axis.set(ylabel="mean cost over the ceiling, %", ylim=(-20, 20))
            axis.axhspan(-0.5, 0.5, color="grey", alpha=0.3)
        else:
            axis.set(
                ylabel=f"share of the arm, last {window}",
                xlabel="request after the change",
                ylim=(-0.02, 1.02),
            )
            axis.axvline(0, color="grey", linewidth=0.8)
    _legend(axes, place)
    return _save(figure, folder / "scenarios.png")
