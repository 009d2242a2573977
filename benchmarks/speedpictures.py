"""The picture of the speed benchmark: throughput, added latency, and where the processor's time goes."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ORDER = ("routed", "explicit", "ray.serve.llm", "LiteLLM", "floor")


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Save it.

    Args:
        rows: one a phase, system and round, as benchmarks/speed.py makes them.
        path: of the picture.
    """
    targets = sorted(rows.target.unique(), key=ORDER.index)
    phase = [p for p in rows.phase.unique() if p != "stream"][-1]  # of those at a rate, the highest
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    _throughput(left, rows, targets)
    for shift, p in ((-0.25, 50), (0.0, 95), (0.25, 99)):
        at = rows[rows.phase == phase].groupby("target")[f"p{p}_ms"].median().reindex(targets)
        middle.bar([i + shift for i in range(len(targets))], at, 0.22, label=f"p{p}")
    middle.set_xticks(range(len(targets)), targets, rotation=20)
    middle.set_yscale("log")
    middle.set_ylabel("latency beyond the engine's, ms")
    middle.set_title(f"latency at {phase.replace('/s', ' requests a second')}")
    middle.legend()
    _processor(right, rows, targets)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _throughput(axis: plt.Axes, rows: pd.DataFrame, targets: list[str]) -> None:
    there = rows[rows.phase == "saturation"]
    for i, target in enumerate(targets):
        values = there[there.target == target].per_s
        axis.bar(i, values.median(), 0.6, color="#1f77b4" if target == "routed" else "0.7")
        axis.plot([i] * len(values), values, "k.", markersize=4)
    axis.set_xticks(range(len(targets)), targets, rotation=20)
    axis.set_ylabel("requests a second")
    axis.set_title("throughput, 32 clients (dots: rounds)")


def _processor(axis: plt.Axes, rows: pd.DataFrame, targets: list[str]) -> None:
    there = rows[rows.phase == "saturation"]
    table = pd.DataFrame(
        {t: pd.DataFrame(list(there[there.target == t].cpu_ms)).fillna(0.0).median() for t in targets}
    ).fillna(0.0)
    large = table[table.max(axis=1) >= 0.1]
    below = pd.Series(0.0, index=targets)
    for i, (name, row) in enumerate(large.iterrows()):
        axis.bar(range(len(targets)), row, 0.6, bottom=below, label=name, color=plt.get_cmap("tab20")(i % 20))
        below += row
    axis.set_xticks(range(len(targets)), targets, rotation=20)
    axis.set_ylabel("CPU, ms a request")
    axis.set_title("who works, at saturation")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
