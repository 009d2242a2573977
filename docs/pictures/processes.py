"""Draws the picture of the processes in docs/architecture.md: `python -m docs.pictures.processes`."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
REQUEST = "#1f6feb"  # the way of a request
LEARNING = "#1a7f37"  # outcomes, scores and what is learned
REPORT = "#8250df"  # off the request's path


@dataclass(frozen=True)
class Box:
    """One process or store: its centre, its size, and its text."""

    x: float
    y: float
    width: float
    height: float
    title: str
    text: str
    colour: str

    def draw(self, axes: Axes) -> None:
        """Draw the box."""
        left, bottom = self.x - self.width / 2, self.y - self.height / 2
        shape = FancyBboxPatch(
            (left, bottom),
            self.width,
            self.height,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor=self.colour,
            edgecolor="#57606a",
            linewidth=1.1,
        )
        axes.add_patch(shape)
        axes.text(
            self.x,
            self.y + self.height / 2 - 0.27,
            self.title,
            ha="center",
            va="center",
            fontsize=11,
            weight="bold",
        )
        axes.text(
            self.x,
            self.y - 0.16,
            self.text,
            ha="center",
            va="center",
            fontsize=8.5,
            linespacing=1.35,
        )


SERVE, ACTOR, STORE, OUTSIDE = "#ddf4ff", "#dafbe1", "#fff8c5", "#f6f8fa"
BOXES = (
    Box(1.2, 5.2, 1.8, 1.2, "Clients", "any client of\nOpenAI's API", OUTSIDE),
    Box(4.0, 5.2, 2.0, 1.2, "HAProxy", "load balancer; Serve's\nproxy and its standby", OUTSIDE),
    Box(7.5, 5.2, 2.8, 1.7, "Ingress, 2 replicas", "access, schemas, decision\non a snapshot, queues,\nfailover, answer checks", SERVE),
    Box(11.6, 5.2, 2.5, 1.9, "Models", "one Serve application each:\nnano, small, large (vLLM),\nminilm (embeddings);\n1 to n replicas", SERVE),
    Box(7.5, 7.75, 2.8, 1.1, "Profiler", "features, kind, forecasts;\nlong texts only", SERVE),
    Box(7.5, 2.4, 2.8, 1.4, "Router", "owns all that is learned,\nroles, budget, records", ACTOR),
    Box(3.4, 2.4, 2.6, 1.3, "Journal", "decisions, outcomes, scores,\nsnapshots (SQLite, PostgreSQL)", STORE),
    Box(11.6, 2.4, 2.5, 1.3, "Tracker", "exports, registers versions,\nevaluates, promotes", ACTOR),
    Box(11.6, 0.35, 2.5, 0.95, "MLflow", "runs, model registry", STORE),
    Box(3.4, 0.35, 2.6, 0.95, "Prometheus, Grafana", "metrics, alerts, dashboard", OUTSIDE),
)
# start, end, colour, text, position of the text, and whether the arrow has two heads
ARROWS = (
    ((2.12, 5.2), (2.98, 5.2), REQUEST, "request", (2.55, 5.42), True),
    ((5.02, 5.2), (6.08, 5.2), REQUEST, "", (5.5, 5.4), True),
    ((8.92, 5.2), (10.32, 5.2), REQUEST, "dispatch,\nstream", (9.62, 5.6), True),
    ((7.5, 6.08), (7.5, 7.18), REQUEST, "profile", (8.0, 6.62), True),
    ((8.1, 4.33), (8.1, 3.12), LEARNING, "decision + outcome,\nscore", (9.2, 3.72), False),
    ((6.9, 3.12), (6.9, 4.33), LEARNING, "snapshot,\nevery second", (6.05, 3.72), False),
    ((6.08, 2.4), (4.72, 2.4), LEARNING, "rows; restore", (5.4, 2.62), True),
    ((8.92, 2.4), (10.32, 2.4), REPORT, "roles,\nversions", (9.62, 2.78), True),
    ((11.6, 1.73), (11.6, 0.85), REPORT, "", (0, 0), True),
    ((4.5, 1.72), (10.3, 1.95), REPORT, "rows, read in the background", (6.7, 1.45), False),
    ((6.4, 1.68), (4.72, 0.55), REPORT, "metrics", (5.35, 0.72), False),
)


def draw() -> None:
    """Write docs/pictures/processes.png."""
    figure, axes = plt.subplots(figsize=(11, 7.2), dpi=110)
    axes.set_xlim(0, 13.1)
    axes.set_ylim(-0.6, 8.6)
    axes.axis("off")
    for box in BOXES:
        box.draw(axes)
    for start, end, colour, text, place, both in ARROWS:
        axes.annotate(
            "",
            xy=end,
            xytext=start,
            arrowprops={
                "arrowstyle": "<|-|>" if both else "-|>",
                "color": colour,
                "linewidth": 1.6,
            },
        )
        axes.text(*place, text, ha="center", va="center", fontsize=8.5, color=colour)
    legend = (
        (REQUEST, "the way of a request"),
        (LEARNING, "what is learned"),
        (REPORT, "off the request's path"),
        ("#57606a", "blue: Serve deployments, green: detached actors, yellow: durable stores"),
    )
    for row, (colour, text) in enumerate(legend):
        axes.text(0.25, 8.35 - 0.3 * row, text, color=colour, fontsize=9, va="center")
    figure.savefig(HERE / "processes.png", bbox_inches="tight", facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw()
