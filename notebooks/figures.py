"""Draws the figures, one function each. Each arm, `auto` and the static rules have the same colour in all figures."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from notebooks import analysis
from notebooks.decision_log import DecisionLog
from policies.evaluation.overlap import FLOOR, TRIES

# colours of the arms, smallest first
SIZES = ("#4c96d7", "#e8a33d", "#c0392b", "#6b4fa0", "#2e8b57", "#8c564b")
AUTO = "#111111"
STATIC = "#7f7f7f"
GREY = "0.6"
GREEN = "#1a9641"
# decisions over which a share is computed
WINDOW = 50


def colours(log: DecisionLog) -> dict[str, str]:
    """Colours of the arms, of `auto` and of the static rules."""
    arms = {arm: SIZES[k % len(SIZES)] for k, arm in enumerate(log.names)}
    return (
        arms
        | {f"{arm}, where chosen": colour for arm, colour in arms.items()}
        | {
            "auto": AUTO,
            "static rules": STATIC,
        }
    )


def _axes(
    columns: int, title: str, height: float = 3.8, width: float = 4.6
) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, list(axes.flat)


def shares(log: DecisionLog) -> Figure:
    """Share of each arm over the decisions, for all and for the most frequent kinds."""
    frame = analysis.decisions(log)
    colour = colours(log)
    kinds = frame.kind.value_counts().index[:3].tolist()
    figure, axes = _axes(
        1 + len(kinds), f"Where requests went: share of the last {WINDOW}"
    )
    for axis, kind in zip(axes, ["all", *kinds], strict=True):
        part = frame if kind == "all" else frame[frame.kind == kind]
        for arm in log.names:
            share = (
                (part.arm == arm).astype(float).rolling(WINDOW, min_periods=10).mean()
            )
            axis.plot(part.n, share, color=colour[arm], label=arm, linewidth=2)
        title = "all kinds" if kind == "all" else f"kind '{kind}'"
        axis.set(
            title=f"{title} ({len(part)} requests)",
            xlabel="decision",
            ylim=(-0.02, 1.02),
        )
    axes[0].set_ylabel("share of requests")
    axes[0].legend(frameon=False)
    return figure


def regret(log: DecisionLog) -> Figure:
    """Cumulative regret: as the policy estimated it, and as measured against each task's best arm."""
    frame = analysis.decisions(log)
    colour = colours(log)
    measured = analysis.measured_regret(log)
    figure, axes = _axes(1 if measured is None else 2, "Regret: utility given up")
    axes[0].plot(frame.n, frame.regret.cumsum(), color=AUTO, linewidth=2)
    axes[0].set(
        title="estimated at each decision",
        xlabel="decision",
        ylabel="cumulative regret (score points)",
    )
    if measured is not None:
        for name in measured.columns:
            line = {
                "linewidth": 2.5 if name == "auto" else 1.5,
                "linestyle": "--" if name == "static rules" else "-",
            }
            axes[1].plot(measured.index, measured[name], color=colour[name], **line)
            axes[1].annotate(
                f" {name}",
                (measured.index[-1], measured[name].iloc[-1]),
                color=colour[name],
                va="center",
            )
        axes[1].set(
            title="measured, against each task's best arm",
            xlabel="task",
            ylabel="cumulative (score points)",
        )
        axes[1].set_xlim(right=1.25 * measured.index[-1])
    return figure


def posterior(log: DecisionLog) -> Figure:
    """Expected score of each arm on each kind: posterior mean, 95 % interval, and mean of the observed scores."""
    frame = analysis.posterior(log)
    colour = colours(log)
    kinds = (
        frame.groupby("kind")
        .requests.first()
        .sort_values(ascending=False)
        .index.tolist()
    )
    figure, (axis,) = _axes(
        1,
        "What was learned: expected score by kind of request",
        width=3.0 + 2.2 * len(kinds),
    )
    for k, arm in enumerate(log.names):
        part = frame[frame.arm == arm].set_index("kind").loc[kinds]
        at = np.arange(len(kinds)) + 0.22 * (k - (len(log.names) - 1) / 2)
        axis.errorbar(
            at,
            part["mean"],
            yerr=1.96 * part.sd,
            fmt="o",
            color=colour[arm],
            capsize=4,
            label=arm,
        )
        axis.scatter(at + 0.06, part.seen, marker="x", s=45, color=colour[arm])
        for x, answers in zip(at, part.answers, strict=True):
            axis.annotate(
                f"{answers}", (x, -0.18), ha="center", fontsize=8, color=colour[arm]
            )
    axis.scatter([], [], marker="x", color=GREY, label="mean of the scores seen")
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(
        ylabel="score",
        ylim=(-0.22, 1.5),
        xlabel="kind (below: scored answers of each arm)",
    )
    axis.set_xticks(range(len(kinds)), [f"{kind}" for kind in kinds])
    axis.legend(frameon=False, ncols=4, loc="upper left")
    return figure


def kinds(log: DecisionLog) -> Figure:
    """What each arm's latest answers show, by kind: mean score with interval, availability, and latency."""
    frame = analysis.kinds(log)
    colour = colours(log)
    order = frame.groupby("kind").decisions.sum().sort_values(ascending=False)
    names = order.index.tolist()
    figure, axes = _axes(
        3,
        "Which size does a kind well: the latest answers of each",
        height=4.4,
        width=3.0 + 0.9 * len(names),
    )
    for k, arm in enumerate(log.names):
        part = frame[frame.arm == arm].set_index("kind").reindex(names)
        at = np.arange(len(names)) + 0.22 * (k - (len(log.names) - 1) / 2)
        style = {"fmt": "o", "color": colour[arm], "capsize": 3, "label": arm}
        error = [part.score - part.score_low, part.score_high - part.score]
        axes[0].errorbar(at, part.score, yerr=error, **style)
        axes[1].scatter(at, part.availability, color=colour[arm])
        above = [np.zeros(len(names)), part.latency_p95_s - part.latency_p50_s]
        axes[2].errorbar(at, part.latency_p50_s, yerr=above, **style)
        for axis, counts in ((axes[0], part.votes), (axes[1], part.answers)):
            for x, count in zip(at, counts.fillna(0.0), strict=True):
                axis.annotate(
                    f"{count:.0f}",
                    (x, -0.13),
                    ha="center",
                    fontsize=8,
                    color=colour[arm],
                )
    labels = (
        ("mean score of unflawed answers, 95 % (below: scored)", "score"),
        ("answers without a visible flaw (below: answers)", "share"),
        ("latency, median to 95th percentile", "seconds"),
    )
    for axis, (title, label) in zip(axes, labels, strict=True):
        axis.set(title=title, ylabel=label)
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set_xlim(-0.5, len(names) - 0.5)
    for axis in axes[:2]:
        axis.set_ylim(-0.18, 1.08)
        axis.axhline(0, color=GREY, linewidth=0.8)
    axes[2].set_ylim(bottom=0)
    axes[2].legend(frameon=False, loc="upper left")
    return figure


def frontier(log: DecisionLog) -> Figure:
    """Quality against cost and against latency, one point for each strategy, and the utility of each."""
    frame = analysis.strategies(log)
    colour = colours(log)
    figure, axes = _axes(
        3, "Quality, cost, latency: what each strategy gives for what it takes"
    )
    for axis, column, label in (
        (axes[0], "cost_usd", "mean cost of a request (millionths of a US dollar)"),
        (axes[1], "latency_s", "mean latency (s)"),
    ):
        for row in frame.itertuples():
            x = getattr(row, column) * (1e6 if column == "cost_usd" else 1)
            axis.scatter(
                x,
                row.quality,
                s=90,
                color=colour[row.strategy],
                marker="*" if row.strategy == "auto" else "o",
            )
            axis.annotate(
                row.strategy,
                (x, row.quality),
                (0, 8),
                textcoords="offset points",
                ha="center",
                color=colour[row.strategy],
            )
        axis.set(
            xlabel=label,
            ylabel="mean score",
            ylim=(min(0.5, frame.quality.min() - 0.05), 1.05),
        )
        axis.margins(x=0.2)
    ordered = frame.sort_values("utility")
    axes[2].barh(
        ordered.strategy,
        ordered.utility,
        color=[colour[name] for name in ordered.strategy],
    )
    for n, value in enumerate(ordered.utility):
        axes[2].annotate(
            f" {value:.3f} ",
            (value, n),
            va="center",
            ha="right" if value < 0 else "left",
        )
    axes[2].set(xlabel="mean utility (score points)")
    axes[2].use_sticky_edges = False  # makes room for the numbers
    axes[2].margins(x=0.2)
    return figure


def propensities(log: DecisionLog) -> Figure:
    """Probability with which each arm was chosen, over time, and how much the log says about other policies."""
    colour = colours(log)
    found = analysis.evaluations(log)
    figure, axes = _axes(2, "Propensities and overlap", width=6.2)
    for arm in log.names:
        values = [record.decision.estimate(arm).propensity for record in log.records]
        axes[0].scatter(
            range(len(values)),
            np.clip(values, 1e-4, 1),
            s=4,
            alpha=0.35,
            color=colour[arm],
        )
        smooth = pd.Series(values).rolling(WINDOW, min_periods=10).mean().clip(1e-4)
        axes[0].plot(smooth, color=colour[arm], linewidth=2, label=arm)
    floor = max(FLOOR, TRIES / len(log.records))
    axes[0].axhline(floor, color="0.3", linestyle="--", linewidth=1)
    axes[0].annotate(
        "below: counts as never tried",
        (0, 0.9 * floor),
        fontsize=8,
        va="top",
        color="0.2",
    )
    axes[0].set(
        yscale="log", xlabel="decision", ylabel="propensity", ylim=(0.8e-4, 1.3)
    )
    axes[0].legend(framealpha=0.9, edgecolor="white", loc="lower left")
    found = found.iloc[::-1]
    axes[1].barh(
        found.target, found.decisions, color="0.88", label="decisions in the log"
    )
    axes[1].barh(
        found.target,
        found.ess,
        color=[_of(name, colour) for name in found.target],
        label="effective sample size",
    )
    axes[1].axvline(50, color=GREY, linestyle="--", linewidth=1)
    for n, row in enumerate(found.itertuples()):
        text = f" worth {row.ess:.0f} of {row.decisions}"
        text += (
            f"; {row.unsupported:.0%} never tried" if row.unsupported > 0.005 else ""
        )
        axes[1].annotate(text, (max(row.ess, 12), n), va="center", fontsize=8)
    axes[1].set(xlabel="decisions (dashed: 50, the least that is answered)")
    return figure


def evaluation(log: DecisionLog) -> Figure:
    """Utility that each target policy would have earned, by three estimators, and the measured utility."""
    found = {"from the log itself": analysis.evaluations(log)}
    if log.truth is not None:
        found["from the same tasks, had chance decided"] = analysis.evaluations(
            log, explored=True
        )
    figure, axes = _axes(
        len(found),
        "Off-policy evaluation: the utility that each policy would have earned",
        5.2,
        6.6,
    )
    for axis, (title, table) in zip(axes, found.items(), strict=True):
        if axis is not axes[0]:
            axis.sharex(axes[0])
        axis.axvline(0, color=GREY, linewidth=0.8)
        table = table.iloc[::-1].reset_index(drop=True)
        for n, row in enumerate(table.to_dict("records")):
            _target(axis, n, row, _of(row["target"], colours(log)))
        axis.set_yticks(
            range(len(table)), table.target if axis is axes[0] else [""] * len(table)
        )
        axis.set(
            title=title,
            xlabel="mean utility (score points)",
            ylim=(-0.6, len(table) - 0.4),
        )
    for marker, text in (("v", "IPS"), ("^", "SNIPS"), ("o", "DR (coloured)")):
        axes[0].errorbar(
            [], [], xerr=[], fmt=marker, color=GREY, label=f"{text}, 95 % interval"
        )
    axes[0].plot(
        [],
        [],
        color="0.88",
        linewidth=9,
        label="confidence sequence, 95 % at all times",
    )
    axes[0].plot([], [], color=GREEN, linewidth=2.5, label="measured on the same tasks")
    figure.legend(frameon=False, loc="outside lower center", ncols=5, fontsize=9)
    return figure


def _target(axis: Any, n: int, row: dict[str, Any], colour: str) -> None:
    """Draw the row of one target in the figure `evaluation`."""
    if row["refused"]:
        reason = row["refused"].split("; let")[0].replace("the log is one that ", "")
        left = axis.get_yaxis_transform()  # x in fractions of the axis
        axis.annotate(
            f"refused: {reason}",
            (0.02, n - 0.32),
            xycoords=left,
            va="center",
            fontsize=8.5,
            color="0.35",
        )
    else:
        axis.plot(
            [row["sequence_low"], row["sequence_high"]],
            [n, n],
            color="0.88",
            linewidth=9,
            zorder=1,
        )
        for k, (name, marker) in enumerate((("ips", "v"), ("snips", "^"), ("dr", "o"))):
            strong = name == "dr"
            error = [
                [row[name] - row[f"{name}_low"]],
                [row[f"{name}_high"] - row[name]],
            ]
            style = {
                "color": colour if strong else GREY,
                "linewidth": 2 if strong else 1,
            }
            axis.errorbar(
                row[name], n + 0.2 * (1 - k), xerr=error, fmt=marker, capsize=3, **style
            )
    if not np.isnan(row["measured"]):
        begin = n - (0.12 if row["refused"] else 0.38)
        axis.plot(
            [row["measured"]] * 2,
            [begin, n + 0.38],
            color=GREEN,
            linewidth=2.5,
            zorder=4,
        )


def calibration(log: DecisionLog) -> Figure:
    """Predictions made before an answer against the scores that followed; the diagonal is perfect calibration."""
    found = analysis.calibrations(log)
    figure, axes = _axes(len(found), "Calibration: said before, seen afterwards", 4.4)
    for axis, (name, held) in zip(axes, found.items(), strict=True):
        table = held.table[held.table[:, 2] > 0]
        error = 1.96 * np.sqrt(
            np.maximum(table[:, 1] * (1 - table[:, 1]), 0.02) / table[:, 2]
        )
        axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axis.errorbar(
            table[:, 0], table[:, 1], yerr=error, fmt="none", ecolor=AUTO, alpha=0.4
        )
        axis.scatter(
            table[:, 0], table[:, 1], s=15 + 2 * np.sqrt(table[:, 2]) ** 1.5, color=AUTO
        )
        for predicted, seen, count in table:
            axis.annotate(
                f"{count:.0f}",
                (predicted, seen),
                (7, -10),
                textcoords="offset points",
                fontsize=8,
                color="0.4",
            )
        title = (
            f"{name}\nECE {held.ece:.3f}, Brier score {held.brier:.3f}"
            if held.count
            else f"{name}\nnot fitted yet"
        )
        axis.set(
            title=title,
            xlabel="said before the answer",
            ylabel="mean score seen",
            ylim=(-0.12, 1.12),
        )
    return figure


def drift(log: DecisionLog) -> Figure:
    """Drift of the models (residuals over time) and of the requests (shift of the features)."""
    frame = analysis.drift(log)
    shift = analysis.feature_drift(log)
    figure, axes = _axes(3, "Drift: is the world still as it was learned?")
    labels = {
        "score": "score seen less expected",
        "latency": "ln(latency seen / expected)",
    }
    for axis, (name, label) in zip(axes, labels.items(), strict=False):
        axis.axhline(0, color=GREY, linewidth=1)
        axis.plot(frame.n, frame[name], color=AUTO, linewidth=2)
        band = 2 * frame[f"{name}_se"]
        axis.fill_between(
            frame.n, frame[name] - band, frame[name] + band, color=AUTO, alpha=0.15
        )
        axis.set(
            title=label,
            xlabel="decision",
            ylabel="mean of the last 100, ± 2 standard errors",
        )
    outside = np.abs(shift) > 3
    axes[2].bar(range(len(shift)), shift, color=np.where(outside, SIZES[2], GREY))
    for edge in (-3, 3):
        axes[2].axhline(edge, color=GREY, linestyle="--", linewidth=1)
    axes[2].set(
        title="features: last third less first",
        xlabel="feature (column)",
        ylabel="shift (standard errors)",
    )
    return figure


def coverage(log: DecisionLog) -> Figure:
    """Share of the answers that have a score, over time and by arm. The policy learns no quality from the others."""
    frame = analysis.decisions(log)
    colour = colours(log)
    figure, axes = _axes(
        2, "Feedback coverage: share of the answers that have a score", width=5.4
    )
    rolling = frame.scored.astype(float).rolling(WINDOW, min_periods=10).mean()
    axes[0].plot(frame.n, rolling, color=AUTO, linewidth=2)
    axes[0].set(
        xlabel="decision", ylabel=f"share of the last {WINDOW}", ylim=(-0.02, 1.05)
    )
    for n, arm in enumerate(log.names):
        part = frame[frame.arm == arm]
        axes[1].bar(n, part.scored.mean() if len(part) else 0.0, color=colour[arm])
        axes[1].annotate(
            f"{part.scored.sum()} of {len(part)}",
            (n, 0.03),
            ha="center",
            color="white",
            fontsize=9,
        )
    axes[1].set_xticks(range(len(log.names)), log.names)
    axes[1].set(ylabel="share scored", ylim=(0, 1.05))
    return figure


def _of(target: str, colour: dict[str, str]) -> str:
    return colour.get(target, "#5b2c83" if target.startswith("challenger") else AUTO)


ALL = (
    shares,
    regret,
    posterior,
    kinds,
    frontier,
    propensities,
    evaluation,
    calibration,
    drift,
    coverage,
)
