"""Pictures of the simulated cluster: quality against p95, and utility, SLO and quality by load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.cluster.report import Figures, means
from benchmarks.cluster.routers import FIXED, OURS
from deployments.observability.colours import AUTO, STATIC, colours_of

GREY = ("static", "uniform")


def styles(routers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line styles: ours is thick and black, rules are grey and dashed, every other router has a colour."""
    others = [r for r in routers if not r.startswith(OURS) and r not in GREY]
    colour = colours_of(others)
    found: dict[str, dict[str, Any]] = {}
    for router in routers:
        if router == OURS:
            found[router] = {"color": AUTO, "linewidth": 2.8, "zorder": 5}
        elif router.startswith(OURS):
            found[router] = {"color": AUTO, "linewidth": 1.4, "linestyle": ":"}
        elif router in GREY:
            found[router] = {"color": STATIC, "linewidth": 1.0, "linestyle": "--"}
        else:
            line = ":" if router.startswith(FIXED) else "-"
            found[router] = {
                "color": colour[router],
                "linewidth": 1.3,
                "linestyle": line,
            }
    return found


def draw(rows: Sequence[Figures], path: Path) -> Path:
    """Four panels for one portfolio, one recording and one event; all lines are means over the seeds."""
    routers = list(dict.fromkeys(row.router for row in rows))
    style = styles(routers)
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    panels = (
        (axes[0][0], "utility", "mean utility"),
        (axes[0][1], "quality", "mean quality"),
        (axes[1][0], "within", "share within TTFT 500 ms and TPOT 30 ms"),
    )
    for router in routers:
        own = [row for row in rows if row.router == router]
        loads = sorted({row.load for row in own})
        by_load = [means([row for row in own if row.load == load]) for load in loads]
        for axis, name, _ in panels:
            axis.plot(
                loads, [mean[name] for mean in by_load], label=router, **style[router]
            )
        axes[1][1].plot(
            [mean["p95_s"] for mean in by_load],
            [mean["quality"] for mean in by_load],
            marker="o",
            markersize=3,
            **style[router],
        )
    for axis, _, title in panels:
        axis.set_xlabel("load, as a share of the cluster's capacity")
        axis.set_ylabel(title)
    axes[1][1].set_xlabel("p95 of the latency, s")
    axes[1][1].set_ylabel("mean quality")
    axes[1][1].set_xscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right center", fontsize=8, frameon=False
    )
    first = rows[0]
    event = f", {first.event} at noon" if first.event else ""
    figure.suptitle(f"{first.portfolio} on {first.trace}{event}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
