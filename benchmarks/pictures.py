"""The pictures of the quality benchmark."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Known = dict[tuple[str, float], dict[str, float]]


def _grid(count: int) -> tuple[Any, list[Any]]:
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.axis("off")
    return figure, flat[:count]


def _emphasis(strategy: str) -> dict[str, Any]:
    return {"linewidth": 2.6, "zorder": 5} if strategy == "ours" else {"linewidth": 1.1}


def regret(frame: pd.DataFrame, known: Known, folder: Path, cost_weight: float = 0.1) -> Path:
    """Cumulative regret against the best single arm, over requests; at the strategies' defaults."""
    names = list(dict.fromkeys(p for p, _ in known))
    figure, axes = _grid(len(names))
    for axis, name in zip(axes, names, strict=True):
        cell = frame[(frame.portfolio == name) & (frame.cost_weight == cost_weight) & (frame.variant == 0)]
        best = known[name, cost_weight]["best single"]
        for strategy, runs in cell.groupby("strategy", sort=False):
            at = np.array(runs["at"].iloc[0])
            axis.plot(at, best * at - np.mean(runs["curve"].tolist(), axis=0), label=strategy, **_emphasis(strategy))
        axis.set(title=f"{name}, λ = {cost_weight}", xlabel="request", ylabel="regret against the best single arm")
        axis.axhline(0, color="grey", linewidth=0.8)
        top = [line.get_ydata()[-1] for line in axis.lines if line.get_label() not in ("random", "static")]
        axis.set_ylim(min(0, *top) * 1.1 - 1, max(top) * 1.15 + 1)
    axes[0].legend(fontsize=7)
    path = folder / "quality-regret.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def frontier(frame: pd.DataFrame, known: Known, folder: Path) -> Path:
    """Score against cost: each strategy over the λ, and each fixed arm."""
    names = list(dict.fromkeys(p for p, _ in known))
    figure, axes = _grid(len(names))
    for axis, name in zip(axes, names, strict=True):
        cell = frame[(frame.portfolio == name) & (frame.variant == 0)]
        for strategy, runs in cell.groupby("strategy", sort=False):
            points = runs.groupby("cost_weight")[["cost", "score"]].mean()
            axis.plot(points.cost, points.score, marker="o", markersize=3, label=strategy, **_emphasis(strategy))
        axis.set(title=name, xlabel="cost, share of the dearest arm's", ylabel="score")
    axes[0].legend(fontsize=7)
    path = folder / "quality-frontier.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def changes(frame: pd.DataFrame, folder: Path, window: int = 50) -> Path | None:
    """Worlds that change: the share of the arm around the change, and the mean cost against its ceiling, over time."""
    drawn = frame[[bool(curve) for curve in frame.curve]]
    cells = list(drawn.groupby(["scenario", "portfolio"], sort=False))
    if not cells:
        return None
    figure, axes = _grid(len(cells))
    for axis, ((scenario, name), cell) in zip(axes, cells, strict=True):
        for strategy, runs in cell.groupby("strategy", sort=False):
            # where a ceiling does not bind in one shuffle, that shuffle alone would make the mean
            middle = np.median if scenario == "budget" else np.mean
            mean = middle(runs.curve.tolist(), axis=0)
            style = {"linewidth": 1.1 if strategy.startswith("pareto") else 2.2, "label": strategy}
            if scenario == "budget":
                axis.plot(np.arange(len(mean)), 100 * mean, **style)
            else:
                share = np.convolve(
                    mean, np.ones(window) / window, mode="valid"
                )  # of the window's requests, at its end
                axis.plot(np.arange(window - 1, len(mean)) - len(mean) // 2, share, **style)
        axis.set(title=f"{scenario}, {name}", xlabel="request")
        if scenario == "budget":
            axis.set(ylabel="mean cost over the ceiling, %", ylim=(-20, 20))
            axis.axhspan(-0.5, 0.5, color="grey", alpha=0.3)
        else:
            axis.set(ylabel=f"share of the arm, last {window}", xlabel="request after the change", ylim=(-0.02, 1.02))
            axis.axvline(0, color="grey", linewidth=0.8)
        axis.legend(fontsize=6)
    path = folder / "scenarios.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
