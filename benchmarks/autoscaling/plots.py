"""A picture of the rules: utility and time to the first replica by GPU-hours."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.autoscaling.report import Point
from benchmarks.autoscaling.rules import DEMAND, SERVE, WARM
from deployments.observability.colours import AUTO, STATIC, colours_of

TIMETABLE = "serve, by a fixed timetable"


def draw(found: Sequence[Point], title: str, path: Path) -> Path:
    """Utility and quality by GPU-hours, one line a rule and one mark a setting."""
    curves: dict[str, list[Point]] = {}
    for point in sorted(found, key=lambda one: one.hours):
        name = TIMETABLE if point.rule in (SERVE, WARM) else point.rule
        curves.setdefault(name, []).append(point)
    colour = colours_of([name for name in curves if name not in (TIMETABLE, DEMAND)])
    colour |= {TIMETABLE: STATIC, DEMAND: AUTO}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, what in zip(axes, ("utility", "quality"), strict=True):
        for name, curve in curves.items():
            axis.plot(
                [point.hours for point in curve],
                [getattr(point, what) for point in curve],
                color=colour[name],
                linestyle="--" if name == TIMETABLE else "-",
                marker="o",
                label=name,
            )
        axis.set_xlabel("GPU-hours of all replicas")
        axis.set_ylabel(f"mean {what}")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
