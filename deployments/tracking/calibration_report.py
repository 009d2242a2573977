"""Shows the report of a calibration: as a table, as a picture, and as metrics of an MLflow run."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from deployments.calibration.records import RunView
from deployments.observability.colours import colours_of
from deployments.tracking.model_registry import PolicyRegistry
from policies.evaluation.size_comparison import (
    ALL,
    UNCLEAR,
    WORTH,
    Estimate,
    SizeReport,
    compare_sizes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAG = "calibration"  # names the calibration that a run reports on
MOST_KINDS = 8  # in the picture
COLUMNS = (
    "kind",
    "model",
    "n",
    "failed",
    "score",
    "latency, s",
    "p95, s",
    "tokens in",
    "tokens out",
    "USD per 1,000",
    "utility",
)

WORTH_COLUMNS = (
    "kind",
    "model",
    "beside",
    "n",
    "score more",
    "s more",
    "USD per 1,000 more",
    "utility more",
    "up to cost_weight",
    "verdict",
)


def interval(estimate: Estimate, digits: int = 3, factor: float = 1.0) -> str:
    """A mean with its interval, in words of a table."""
    if estimate.mean is None:
        return "unknown"
    mean = f"{factor * estimate.mean:.{digits}f}"
    if estimate.lower is None or estimate.upper is None:
        return mean
    return f"{mean} [{factor * estimate.lower:.{digits}f}, {factor * estimate.upper:.{digits}f}]"


def tables(report: SizeReport) -> str:
    """The report as two Markdown tables: the figures of each size, and where each size is worth its price."""
    rows: list[tuple[str, ...]] = []
    for figures in report.figures:
        best = report.best.get(figures.kind) == figures.arm
        p95_s = figures.latency_p95_s
        rows.append(
            (
                figures.kind,
                f"**{figures.arm}**" if best else figures.arm,
                str(figures.score.n),
                str(figures.failed),
                interval(figures.score, 2),
                interval(figures.latency_s),
                "unknown" if p95_s is None else f"{p95_s:.3f}",
                interval(figures.prompt_tokens, 0),
                interval(figures.output_tokens, 0),
                interval(figures.cost_usd, 4, 1000.0),
                interval(figures.utility),
            )
        )
    text = (
        f"Means with {report.level:.0%} intervals; n: answers with a grade. Bold: the best size for this kind under "
        f"latency_weight {report.latency_weight:g} and cost_weight {report.cost_weight:g}.\n\n"
    )
    text += str(tabulate(rows, COLUMNS, "github", disable_numparse=True))
    if report.comparisons:
        text += "\n\nWhere each size is worth its price, on the prompts that both sizes answered:\n\n"
        text += _worth(report)
    return text


def _worth(report: SizeReport) -> str:
    rows: list[tuple[str, ...]] = []
    for found in report.comparisons:
        up_to = "none" if found.worth_up_to is None else f"{found.worth_up_to:,.0f}"
        rows.append(
            (
                found.kind,
                found.arm,
                found.cheaper,
                str(found.score.n),
                interval(found.score, 2),
                f"{found.latency_s:+.3f}",
                f"{1000 * found.cost_usd:+.4f}",
                interval(found.utility),
                up_to if found.cost_usd > 0 else "any",
                found.verdict,
            )
        )
    return str(tabulate(rows, WORTH_COLUMNS, "github", disable_numparse=True))


def draw(report: SizeReport, path: Path) -> None:
    """Draw score, latency and cost of each size by kind, and the utility that each size has more than a cheaper one."""
    from matplotlib.figure import Figure

    kinds = report.kinds[:MOST_KINDS]
    if len(kinds) == 2:  # one kind is the same as all
        kinds = kinds[1:]
    figure = Figure(figsize=(4.2 + 1.6 * len(kinds), 7.6), layout="constrained")
    axes = figure.subplots(2, 2)
    _bars(axes[0, 0], report, kinds, "score", 1.0, "score (1 is right)")
    _bars(axes[0, 1], report, kinds, "latency_s", 1.0, "latency, s")
    _bars(axes[1, 0], report, kinds, "cost_usd", 1000.0, "USD per 1,000 answers")
    _gains(axes[1, 1], report, kinds)
    axes[0, 0].set_ylim(0, 1.05)
    if report.arms:
        axes[0, 0].legend(fontsize=8, loc="lower left")
    figure.suptitle(
        f"Calibration: means with {report.level:.0%} intervals; latency_weight {report.latency_weight:g}, "
        f"cost_weight {report.cost_weight:g}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _bars(
    axis: "Axes",
    report: SizeReport,
    kinds: tuple[str, ...],
    field: str,
    factor: float,
    label: str,
) -> None:
    """A group of bars for each kind, one for each size, with intervals."""
    width = 0.8 / max(1, len(report.arms))
    for i, arm in enumerate(report.arms):
        label_of_arm: str | None = arm  # of its first bar only
        for place, kind in enumerate(kinds):
            figures = report.figures_of(arm, kind)
            estimate: Estimate | None = getattr(figures, field) if figures else None
            if estimate is None or estimate.mean is None:
                continue
            mean = factor * estimate.mean
            x = place + (i - (len(report.arms) - 1) / 2) * width
            axis.bar(
                x,
                mean,
                width,
                color=colours_of(report.arms)[arm],
                label=label_of_arm,
            )
            label_of_arm = None
            _whisker(axis, x, estimate, factor)
    _label(axis, kinds, label)


def _whisker(axis: "Axes", x: float, estimate: Estimate, factor: float) -> None:
    if estimate.lower is not None and estimate.upper is not None:
        bounds = (factor * estimate.lower, factor * estimate.upper)
        axis.plot((x, x), bounds, color="black", linewidth=1)


def _label(axis: "Axes", kinds: tuple[str, ...], label: str) -> None:
    axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_title(label, fontsize=10)
    axis.grid(axis="y", alpha=0.3)


def _gains(axis: "Axes", report: SizeReport, kinds: tuple[str, ...]) -> None:
    """A point for each kind and each size but the cheapest: the utility that it has more than a cheaper size."""
    colors = colours_of(report.arms)
    shown = [found for found in report.comparisons if found.kind in kinds]
    width = 0.8 / max(1, len(report.arms) - 1)
    for found in shown:
        if found.utility.mean is None:
            continue
        order = report.arms.index(found.arm) - 1
        x = kinds.index(found.kind) + (order - (len(report.arms) - 2) / 2) * width
        marker = {WORTH: "^", UNCLEAR: "o"}.get(found.verdict, "v")
        axis.plot(x, found.utility.mean, marker, color=colors[found.arm])
        _whisker(axis, x, found.utility, 1.0)
        axis.annotate(
            f" {found.arm} − {found.cheaper}",
            (x, found.utility.mean),
            xytext=(7, 0),
            textcoords="offset points",
            fontsize=7,
            rotation=90,
            va="center",
        )
    axis.set_xlim(-0.6, len(kinds) - 0.3)
    axis.axhline(0.0, color="grey", linewidth=1)
    _label(axis, kinds, "utility more than the best cheaper size")


def metrics(report: SizeReport) -> dict[str, float]:
    """The report's figures as metrics of an MLflow run; unknown ones are left out."""
    found: dict[str, float] = {}

    def add(name: str, estimate: Estimate) -> None:
        if estimate.mean is not None:
            found[name] = estimate.mean
            found[f"{name}.n"] = float(estimate.n)
        if estimate.lower is not None and estimate.upper is not None:
            found[f"{name}.lower"] = estimate.lower
            found[f"{name}.upper"] = estimate.upper

    for figures in report.figures:
        where = "" if figures.kind == ALL else f"/{figures.kind}"
        for field in ("score", "latency_s", "output_tokens", "cost_usd", "utility"):
            add(f"{field}/{figures.arm}{where}", getattr(figures, field))
        found[f"failed/{figures.arm}{where}"] = float(figures.failed)
    for comparison in report.comparisons:
        where = "" if comparison.kind == ALL else f"/{comparison.kind}"
        add(f"utility_gain/{comparison.arm}{where}", comparison.utility)
    return found


def log_report(registry: PolicyRegistry, view: RunView) -> str:
    """Log the report of a calibration as an MLflow run, unless there is one already; returns its id. Blocking."""
    status = view.status
    client: Any = registry.client
    known = client.search_runs(
        [registry.experiment_id], f"tags.{TAG} = '{status.run_id}'", max_results=1
    )
    if known:
        return str(known[0].info.run_id)
    report = compare_sizes(view.answers, view.objective)
    run = registry.start_run(
        f"calibration {status.run_id}", {"kind": "calibration", "state": status.state}
    )
    registry.log(run, metrics(report), 0)
    client.log_dict(run, {**status.plain(), "report": report.plain()}, "report.json")
    client.log_text(run, tables(report), "report.md")
    with tempfile.TemporaryDirectory() as name:
        picture = Path(name) / "calibration.png"
        draw(report, picture)
        client.log_artifact(run, str(picture))
    client.log_param(run, "models", json.dumps(list(status.models)))
    # last, so that a run that is incomplete is made again
    client.set_tag(run, TAG, status.run_id)
    client.set_terminated(run)
    return run
