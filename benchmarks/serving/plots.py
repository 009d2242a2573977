"""Pictures of the serving benchmarks: gateways beside each other, and one model that is saturated."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deployments.observability.colours import AUTO, colours_of

ORDER = ("routed", "explicit", "ray.serve.llm", "LiteLLM", "floor")
LATENCY_BARS = ((-0.25, 50), (0.0, 95), (0.25, 99))  # shift of a bar, percentile
WINDOW_S = 5.0  # seconds over which shares and latencies under saturation are drawn


def draw_gateways(rows: pd.DataFrame, path: Path) -> None:
    """Draw throughput, added latency and CPU time of each system.

    Args:
        rows: one for each phase, system and round, from benchmarks/serving/gateways.py.
        path: file of the picture.
    """
    targets = sorted(rows.target.unique(), key=ORDER.index)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(16, 4.5), layout="constrained"
    )
    _throughput(left, rows, targets)
    _latency(middle, rows, targets)
    _processor(right, rows, targets)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _throughput(axis: plt.Axes, rows: pd.DataFrame, targets: list[str]) -> None:
    saturated = rows[rows.phase == "saturation"]
    for i, target in enumerate(targets):
        values = saturated[saturated.target == target].per_s
        color = AUTO if target == "routed" else "0.7"
        axis.bar(i, values.median(), 0.6, color=color)
        axis.plot([i] * len(values), values, "k.", markersize=4)
    axis.set_xticks(range(len(targets)), targets, rotation=20)
    axis.set_ylabel("requests per second")
    axis.set_title("throughput, 32 clients (dots: rounds)")


def _latency(axis: plt.Axes, rows: pd.DataFrame, targets: list[str]) -> None:
    """Percentiles at the last phase with a fixed rate, which is the highest one."""
    phase = [name for name in rows.phase.unique() if name != "stream"][-1]
    by_target = rows[rows.phase == phase].groupby("target")
    for shift, p in LATENCY_BARS:
        heights = by_target[f"p{p}_ms"].median().reindex(targets)
        places = [i + shift for i in range(len(targets))]
        axis.bar(places, heights, 0.22, label=f"p{p}")
    axis.set_xticks(range(len(targets)), targets, rotation=20)
    axis.set_yscale("log")
    axis.set_ylabel("latency beyond the engine's, ms")
    axis.set_title(f"latency at {phase.replace('/s', ' requests per second')}")
    axis.legend()


def _processor(axis: plt.Axes, rows: pd.DataFrame, targets: list[str]) -> None:
    saturated = rows[rows.phase == "saturation"]
    medians = {}
    for target in targets:
        by_round = pd.DataFrame(list(saturated[saturated.target == target].cpu_ms))
        medians[target] = by_round.fillna(0.0).median()
    table = pd.DataFrame(medians).fillna(0.0)
    large = table[table.max(axis=1) >= 0.1]
    below = pd.Series(0.0, index=targets)
    colors = plt.get_cmap("tab20")
    for i, (name, row) in enumerate(large.iterrows()):
        color = colors(i % 20)
        axis.bar(range(len(targets)), row, 0.6, bottom=below, label=name, color=color)
        below += row
    axis.set_xticks(range(len(targets)), targets, rotation=20)
    axis.set_ylabel("CPU, ms per request")
    axis.set_title("CPU by process, at saturation")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def draw_saturation(
    rows: pd.DataFrame, states: pd.DataFrame, saturated: str, path: Path
) -> None:
    """Draw the shares of `auto`, its latency and the replicas of each model over time.

    Args:
        rows: one for each answer, from benchmarks/serving/saturation.py.
        states: one for each sample of the router's state, from the same.
        saturated: name of the saturated model.
        path: file of the picture.
    """
    figure, axes = plt.subplots(
        3, 1, figsize=(11, 9), sharex=True, layout="constrained"
    )
    top, middle, bottom = axes
    _shares(top, rows)
    _saturated_latency(middle, rows, saturated)
    _replicas(bottom, states)
    for phase, samples in states.groupby("phase", sort=False):
        start_s = samples.at_s.iloc[0]
        for axis in axes:
            axis.axvline(start_s, color="0.6", linewidth=0.8)
        place = (start_s, bottom.get_ylim()[1])
        bottom.annotate(str(phase), place, fontsize=9, va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _answered(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Successful answers of one kind of request, in the order of their requests."""
    good = rows[(rows.kind == kind) & (rows.status == 200)]
    return good.sort_values("at_s")


def _window(answers: pd.DataFrame) -> pd.Series:
    """Start of the window that each answer belongs to, in seconds."""
    return (answers.at_s // WINDOW_S) * WINDOW_S


def _shares(axis: plt.Axes, rows: pd.DataFrame) -> None:
    auto = _answered(rows, "auto")
    names = sorted(auto.model.unique())
    shares = pd.crosstab(_window(auto), auto.model, normalize="index")
    shares = shares.reindex(columns=names)
    colours = list(colours_of(names).values())
    axis.stackplot(
        shares.index, shares.T.values, labels=names, colors=colours, step="post"
    )
    axis.set(ylabel="share of auto", ylim=(0, 1))
    axis.legend(loc="lower left")


def _saturated_latency(axis: plt.Axes, rows: pd.DataFrame, saturated: str) -> None:
    auto = _answered(rows, "auto")
    forced = _answered(rows, "forced")
    forced = forced[forced.phase == "surge"]
    lines = (
        (auto, 0.95, "auto, p95", AUTO, "-"),
        (auto, 0.5, "auto, p50", AUTO, ":"),
        (
            forced,
            0.95,
            f"{saturated} by name, p95",
            colours_of([saturated])[saturated],
            "-",
        ),
    )
    for answers, q, label, colour, style in lines:
        latency = answers.groupby(_window(answers)).latency_s.quantile(q)
        axis.plot(
            latency,
            drawstyle="steps-post",
            label=label,
            color=colour,
            linestyle=style,
        )
    axis.set(ylabel="latency, s", yscale="log")
    axis.legend(loc="upper left")


def _replicas(axis: plt.Axes, states: pd.DataFrame) -> None:
    columns = [name for name in states.columns if name.startswith("replicas/")]
    names = [column.removeprefix("replicas/") for column in columns]
    colours = colours_of(names)
    for column, name in zip(columns, names, strict=True):
        axis.plot(
            states.at_s,
            states[column],
            drawstyle="steps-post",
            label=name,
            color=colours[name],
        )
    axis.set(ylabel="ready replicas", xlabel="seconds")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="upper left")
