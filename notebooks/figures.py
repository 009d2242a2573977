"""Draws the figures, one function each. Each arm, `auto` and the static rules have the same colour in all figures."""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deployments.observability.colours import AUTO, STATIC, colours_of
from notebooks import analysis
from notebooks.decision_log import DecisionLog
from notebooks.intervals import z_of
from notebooks.panels import GREY, label_points, panels, say_empty
from policies.evaluation.kind_figures import interval
from policies.evaluation.overlap import FLOOR, MIN_ESS, TRIES

GREEN = "#1a9641"
CHALLENGER = "#5b2c83"
# decisions over which a share is computed, and the least for which it is drawn
WINDOW = 50
LEAST = 10
SPREAD = 0.7  # of the room of a kind, over which its arms are placed
MOST_FEATURES = 12
MANY = 30  # numbers under a panel, from which they are written upright
SHIFTED = "#5b2c83"
UNSCORED = "no answer of this log has a score"


def colours(log: DecisionLog) -> dict[str, str]:
    """Colours of the arms, of `auto` and of the static rules."""
    arms = colours_of(log.names, log.prices)
    chosen = {f"{arm}{analysis.CHOSEN}": colour for arm, colour in arms.items()}
    return arms | chosen | {"auto": AUTO, "static rules": STATIC}


def _places(count: int, k: int, arms: int) -> Any:
    """Where the points of arm k are, for `count` kinds."""
    return np.arange(count) + SPREAD * ((k + 0.5) / arms - 0.5)


def _write_counts(
    axis: Any, at: Any, counts: Any, y: float, colour: str, arms: int
) -> None:
    """Write a number below each place; upright where there are many, of all arms together."""
    for x, count in zip(at, counts, strict=True):
        axis.annotate(
            f"{count:.0f}",
            (x, y),
            ha="center",
            va="center",
            fontsize=7,
            rotation=90 if len(at) * arms > MANY else 0,
            color=colour,
        )


def shares(log: DecisionLog) -> Figure:
    """Share of each arm over the decisions, for all and for the most frequent kinds."""
    frame = analysis.decisions(log)
    colour = colours(log)
    kinds = frame.kind.value_counts().index[:3].tolist()
    figure, axes = panels(
        1 + len(kinds), f"Where requests went: share of the last {WINDOW}"
    )
    for axis, kind in zip(axes, ["all", *kinds], strict=True):
        part = frame if kind == "all" else frame[frame.kind == kind]
        title = "all kinds" if kind == "all" else f"kind '{kind}'"
        title = f"{title} ({len(part)} requests)"
        if len(part) < LEAST:
            say_empty(axis, f"a share is drawn from {LEAST} requests on", title)
            continue
        for arm in log.names:
            share = (
                (part.arm == arm)
                .astype(float)
                .rolling(WINDOW, min_periods=LEAST)
                .mean()
            )
            axis.plot(part.n, share, color=colour[arm], label=arm, linewidth=2)
        axis.set(
            title=title,
            xlabel="decision",
            ylim=(-0.02, 1.02),
        )
    axes[0].set_ylabel("share of requests")
    if axes[0].get_legend_handles_labels()[0]:
        _legend_below(figure, axes[0])
    return figure


def _legend_below(figure: Figure, axis: Any) -> None:
    """A legend for all panels, under them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        frameon=False,
        loc="outside lower center",
        ncols=min(6, len(labels)),
        fontsize=9,
    )


def regret(log: DecisionLog) -> Figure:
    """Cumulative regret: as the policy estimated it, and as measured against each task's best arm."""
    frame = analysis.decisions(log)
    colour = colours(log)
    measured = analysis.measured_regret(log)
    figure, axes = panels(
        1 if measured is None else 2, "Regret: utility given up", width=6.4
    )
    title = "estimated at each decision"
    if frame.expected.notna().any():
        axes[0].plot(frame.n, frame.regret.cumsum(), color=AUTO, linewidth=2)
        axes[0].set(
            title=title,
            xlabel="decision",
            ylabel="cumulative regret (score points)",
        )
    else:
        say_empty(axes[0], "a rule decided, which makes no estimates", title)
    if measured is not None:
        for name in measured.columns:
            line = {
                "linewidth": 2.5 if name == "auto" else 1.5,
                "linestyle": "--" if name == "static rules" else "-",
            }
            axes[1].plot(
                measured.index, measured[name], color=colour[name], label=name, **line
            )
        axes[1].set(
            title="measured, against each task's best arm",
            xlabel="task",
            ylabel="cumulative (score points)",
        )
        axes[1].legend(frameon=False, fontsize=9)
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
    figure, (axis,) = panels(
        1,
        "What was learned: expected score by kind of request",
        height=4.4,
        width=4.0 + 2.2 * len(kinds),
    )
    z = z_of(len(frame))
    for k, arm in enumerate(log.names):
        part = frame[frame.arm == arm].set_index("kind").loc[kinds]
        at = _places(len(kinds), k, len(log.names))
        axis.errorbar(
            at,
            part["mean"],
            yerr=z * part.sd,
            fmt="o",
            markersize=5,
            color=colour[arm],
            capsize=3,
            label=arm,
        )
        axis.scatter(at + 0.02, part.seen, marker="x", s=40, color=colour[arm])
        _write_counts(axis, at, part.answers, -0.25, colour[arm], len(log.names))
    axis.scatter([], [], marker="x", color=GREY, label="mean of the scores seen")
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(
        ylabel="score",
        ylim=(-0.36, 1.3),
        xlabel="kind (numbers: scored answers of each arm)",
    )
    axis.set_xticks(range(len(kinds)), [f"{kind}" for kind in kinds])
    axis.set_xlim(-0.5, len(kinds) - 0.5)
    if not frame.answers.sum():
        axis.set_title("no answer has a score yet: the dots are the prior", fontsize=10)
    _legend_below(figure, axis)
    return figure


def kinds(log: DecisionLog) -> Figure:
    """What each arm's latest answers show, by kind: mean score with interval, availability, and latency."""
    frame = analysis.kinds(log)
    colour = colours(log)
    order = frame.groupby("kind").decisions.sum().sort_values(ascending=False)
    names = order.index.tolist()
    figure, axes = panels(
        3,
        "Which size does a kind well: the latest answers of each",
        height=3.0,
        width=4.0 + 1.6 * len(names),
        across=1,
    )
    for k, arm in enumerate(log.names):
        part = frame[frame.arm == arm].set_index("kind").reindex(names)
        at = _places(len(names), k, len(log.names))
        style = {
            "fmt": "o",
            "markersize": 5,
            "color": colour[arm],
            "capsize": 3,
            "label": arm,
        }
        error = [part.score - part.together_low, part.together_high - part.score]
        axes[0].errorbar(at, part.score, yerr=error, **style)
        axes[1].scatter(at, part.availability, color=colour[arm], s=25)
        above = [np.zeros(len(names)), part.latency_p95_s - part.latency_p50_s]
        axes[2].errorbar(at, part.latency_p50_s, yerr=above, **style)
        for axis, counts in ((axes[0], part.votes), (axes[1], part.answers)):
            _write_counts(
                axis, at, counts.fillna(0.0), -0.2, colour[arm], len(log.names)
            )
    labels = (
        (
            "mean score of unflawed answers; all intervals together 95 % (numbers: scored)",
            "score",
        ),
        ("answers without a visible flaw (numbers: answers)", "share"),
        ("latency, median to 95th percentile", "seconds"),
    )
    for axis, (title, label) in zip(axes, labels, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(label)
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.5, len(names) - 0.5)
    for axis in axes[:2]:
        axis.set_ylim(-0.35, 1.08)
        axis.axhline(0, color=GREY, linewidth=0.8)
    axes[2].set_ylim(bottom=0)
    for axis, column, why in (
        (axes[0], "score", UNSCORED),
        (axes[1], "availability", "no answer has ended yet"),
        (axes[2], "latency_p50_s", "no answer has arrived yet"),
    ):
        if frame[column].isna().all():
            say_empty(axis, why, axis.get_title())
    handles = [axis for axis in axes if axis.get_legend_handles_labels()[0]]
    if handles:
        _legend_below(figure, handles[-1])
    return figure


def frontier(log: DecisionLog) -> Figure:
    """Quality against cost and against latency, one point for each strategy, and the utility of each."""
    frame = analysis.strategies(log)
    colour = colours(log)
    title = "Quality, cost, latency: what each strategy gives for what it takes"
    if not frame.comparable.all():
        title += "\nhollow: only the requests for which auto chose this size; NOT comparable with auto or each other"
    figure, axes = panels(3, title, height=4.8)
    for axis, column, label in (
        (axes[0], "cost_usd", "mean cost of a request (millionths of a US dollar)"),
        (axes[1], "latency_s", "mean latency (s)"),
    ):
        known = frame.dropna(subset=["quality", column])
        if known.empty:
            why = "no answer has arrived yet" if frame.scored.any() else UNSCORED
            say_empty(axis, why, label)
            continue
        for row in known.itertuples():
            factor = 1e6 if column == "cost_usd" else 1.0
            x = factor * getattr(row, column)
            _strategy(axis, row, x, colour[row.strategy])
        axis.set(xlabel=label, ylabel="mean score, all intervals together 95 %")
        axis.margins(x=0.2, y=0.15)
    _utilities(axes[2], frame, colour)
    for axis in axes[:2]:
        if axis.get_legend_handles_labels()[0]:
            _legend_below(figure, axis)
            break
    return figure


def _strategy(axis: Any, row: Any, x: float, colour: str) -> None:
    """Draw the point of a strategy with the interval of its score."""
    error = None
    if not np.isnan(row.quality_low):
        error = [[row.quality - row.quality_low], [row.quality_high - row.quality]]
    axis.errorbar(
        x,
        row.quality,
        yerr=error,
        fmt="*" if row.strategy == "auto" else "o",
        markersize=13 if row.strategy == "auto" else 8,
        color=colour,
        markerfacecolor=colour if row.comparable else "white",
        capsize=3,
        label=f"{row.strategy} (n = {row.scored})",
    )


def _utilities(axis: Any, frame: pd.DataFrame, colour: dict[str, str]) -> None:
    """A bar for the mean utility of each strategy, with its interval and n."""
    ordered = frame.dropna(subset=["utility"]).sort_values("utility")
    if ordered.empty:
        say_empty(axis, UNSCORED, "mean utility")
        return
    for n, row in enumerate(ordered.itertuples()):
        error = None
        if not np.isnan(row.utility_low):
            error = [[row.utility - row.utility_low], [row.utility_high - row.utility]]
        axis.barh(
            n,
            row.utility,
            xerr=error,
            color=colour[row.strategy] if row.comparable else "white",
            edgecolor=colour[row.strategy],
            linewidth=1.5,
            ecolor=GREY,
            capsize=3,
        )
    names = [
        f"{row.strategy.replace(analysis.CHOSEN, ' (where chosen)')}\n{row.utility:.3f}, n = {row.scored}"
        for row in ordered.itertuples()
    ]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("mean utility (score points)")
    axis.use_sticky_edges = False
    axis.margins(x=0.15)
    axis.axvline(0, color=GREY, linewidth=0.8)


def propensities(log: DecisionLog) -> Figure:
    """Probability with which each arm was chosen, over time, and how much the log says about other policies."""
    colour = colours(log)
    found = analysis.evaluations(log)
    figure, axes = panels(2, "Propensities and overlap", width=6.7, height=4.6)
    for arm in log.names:
        values = [record.decision.estimate(arm).propensity for record in log.records]
        axes[0].scatter(
            range(len(values)),
            np.clip(values, 1e-4, 1),
            s=4,
            alpha=0.35,
            color=colour[arm],
        )
        smooth = pd.Series(values).rolling(WINDOW, min_periods=LEAST).mean().clip(1e-4)
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
    if len(log.records) < LEAST:
        why = f"the log has {len(log.records)} decisions; {LEAST} needed"
        say_empty(axes[0], why, "propensity")
    else:
        _legend_below(figure, axes[0])
    if not found.ess.any():
        say_empty(axes[1], found.refused.iloc[0], "effective sample size")
        return figure
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
    axes[1].axvline(MIN_ESS, color=GREY, linestyle="--", linewidth=1)
    for n, row in enumerate(found.itertuples()):
        text = f" worth {row.ess:.0f} of {row.decisions}"
        text += (
            f"; {row.unsupported:.0%} never tried" if row.unsupported > 0.005 else ""
        )
        axes[1].annotate(text, (max(row.ess, 12), n), va="center", fontsize=8)
    axes[1].set(xlabel=f"decisions (dashed: {MIN_ESS:g}, the least that is answered)")
    return figure


def evaluation(log: DecisionLog) -> Figure:
    """Utility that each target policy would have earned, by three estimators, and the measured utility."""
    found = {"from the log itself": analysis.evaluations(log)}
    if log.truth is not None:
        found["from the same tasks, had chance decided"] = analysis.evaluations(
            log, explored=True
        )
    figure, axes = panels(
        len(found),
        "Off-policy evaluation: the utility that each policy would have earned",
        1.6 + 0.55 * len(found["from the log itself"]),
        6.7 if len(found) > 1 else 9.0,
    )
    for axis, (title, table) in zip(axes, found.items(), strict=True):
        if axis is not axes[0]:
            axis.sharex(axes[0])  # the panels are compared
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
        if (table.refused != "").all() and table.measured.isna().all():
            axis.set_xticks([])
            axis.set_xlabel("every target is refused: this log cannot say")
    for marker, text in (("v", "IPS"), ("^", "SNIPS"), ("o", "DR (coloured)")):
        axes[0].errorbar(
            [], [], xerr=[], fmt=marker, color=GREY, label=f"{text}, together 95 %"
        )
    axes[0].plot(
        [],
        [],
        color="0.88",
        linewidth=9,
        label="confidence sequence, together 95 % at all times",
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
            textwrap.fill(f"refused: {reason}", 76),
            (0.02, n - 0.1),
            xycoords=left,
            va="center",
            fontsize=7.5,
            color="0.35",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
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
    figure, axes = panels(
        2, "Calibration: said before, seen afterwards", 4.6, width=6.0
    )
    missing = {
        "expected score (router)": "no scored decision has an expectation",
        "chance to suffice (profiler)": "the profiler had not learned from scores yet",
    }
    for axis, (name, why) in zip(axes, missing.items(), strict=True):
        held = found.get(name)
        if held is None:
            say_empty(axis, why, name)
            continue
        table = held.table[held.table[:, 2] > 0]
        bounds = [interval(seen, count, z_of(len(table))) for _, seen, count in table]
        error = [
            [seen - low for (_, seen, _), (low, _) in zip(table, bounds, strict=True)],
            [
                high - seen
                for (_, seen, _), (_, high) in zip(table, bounds, strict=True)
            ],
        ]
        axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axis.errorbar(
            table[:, 0], table[:, 1], yerr=error, fmt="none", ecolor=AUTO, alpha=0.4
        )
        axis.scatter(
            table[:, 0],
            table[:, 1],
            s=15 + 1.5 * np.sqrt(table[:, 2]),
            color=AUTO,
            alpha=0.7,
        )
        axis.set(
            title=f"{name}\nECE {held.ece:.3f}, Brier score {held.brier:.3f}, n = {held.count}",
            xlabel="said before the answer",
            ylabel="mean score seen",
            xlim=(-0.1, 1.1),
            ylim=(-0.2, 1.2),
        )
        label_points(figure, axis, [(x, y, f"{count:.0f}") for x, y, count in table])
    return figure


def drift(log: DecisionLog) -> Figure:
    """Drift of the models (residuals over time) and of the requests (shift of the features)."""
    frame = analysis.drift(log)
    figure, axes = panels(3, "Drift: is the world still as it was learned?", 4.6)
    labels = {
        "score": "score seen less expected",
        "latency": "ln(latency seen / expected)",
    }
    for axis, (name, label) in zip(axes, labels.items(), strict=False):
        if frame[name].notna().sum() < 2:
            what = "scores" if name == "score" else "latencies"
            why = f"fewer than {analysis.DRIFT_LEAST} of 100 decisions in a row have {what} and an expectation"
            say_empty(axis, why, label)
            continue
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
    _features(axes[2], analysis.feature_drift(log))
    return figure


def _features(axis: Any, shift: pd.Series) -> None:
    """Bars for the features that moved most, with the bounds that all features together stay within by chance."""
    title = "features: last third less first"
    if shift.empty:
        say_empty(axis, "a third of the log has fewer than ten decisions", title)
        return
    edge = z_of(len(shift))
    shown = shift[shift.abs().sort_values().index][-MOST_FEATURES:]
    outside = shown.abs() > edge
    axis.barh(shown.index, shown, color=np.where(outside, SHIFTED, GREY))
    for side in (-edge, edge):
        axis.axvline(side, color=GREY, linestyle="--", linewidth=1)
    axis.tick_params(axis="y", labelsize=8)
    axis.set(
        title=f"{title}:\nthe {len(shown)} of {len(shift)} that moved most",
        xlabel="shift (standard errors; dashed: all by chance)",
    )


def coverage(log: DecisionLog) -> Figure:
    """Share of the answers that have a score, over time and by arm. The policy learns no quality from the others."""
    frame = analysis.decisions(log)
    colour = colours(log)
    figure, axes = panels(
        2, "Feedback coverage: share of the answers that have a score", width=6.0
    )
    if len(frame) < LEAST:
        why = f"the log has {len(frame)} decisions; {LEAST} needed"
        say_empty(axes[0], why, "over time")
    else:
        rolling = frame.scored.astype(float).rolling(WINDOW, min_periods=LEAST).mean()
        axes[0].plot(frame.n, rolling, color=AUTO, linewidth=2)
        axes[0].set(
            xlabel="decision", ylabel=f"share of the last {WINDOW}", ylim=(-0.02, 1.05)
        )
    rows = []
    for n, arm in enumerate(log.names):
        part = frame[frame.arm == arm]
        axes[1].barh(n, part.scored.mean() if len(part) else 0.0, color=colour[arm])
        rows.append(f"{arm} ({part.scored.sum()} of {len(part)})")
    axes[1].set_yticks(range(len(rows)), rows, fontsize=9)
    axes[1].invert_yaxis()
    axes[1].set(xlabel="share scored", xlim=(0, 1.05))
    return figure


def _of(target: str, colour: dict[str, str]) -> str:
    return colour.get(target, CHALLENGER if target.startswith("challenger") else AUTO)


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
