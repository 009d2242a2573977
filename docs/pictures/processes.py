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
    Box(1.1, 5.2, 1.8, 1.2, "Clients", "any client of\nOpenAI's API", OUTSIDE),
    Box(
        4.0,
        5.2,
        2.4,
        1.2,
        "HAProxy",
        "load balancer; Serve's\nproxy and its standby",
        OUTSIDE,
    ),
    Box(
        7.7,
        5.2,
        3.0,
        1.7,
        "Ingress, 2 replicas",
        "access, parameters, decision\non a snapshot, queues,\nfailover, answer checks",
        SERVE,
    ),
    Box(
        12.1,
        5.2,
        3.0,
        1.9,
        "Models",
        "one Serve application each:\nnano, small, large, general\n(vLLM), minilm (embeddings);\n0 to n replicas",
        SERVE,
    ),
    Box(
        7.7,
        7.75,
        3.0,
        1.1,
        "Profiler",
        "features, kind, forecasts;\nlong texts only",
        SERVE,
    ),
    Box(
        7.7,
        2.4,
        3.0,
        1.4,
        "Router",
        "owns all that is learned,\nroles, budget, records",
        ACTOR,
    ),
    Box(
        3.1,
        2.4,
        3.2,
        1.3,
        "Journal",
        "decisions, outcomes, scores,\nsnapshots (SQLite, PostgreSQL)",
        STORE,
    ),
    Box(
        12.1,
        2.4,
        3.0,
        1.3,
        "Tracker",
        "exports, registers versions,\nevaluates, promotes",
        ACTOR,
    ),
    Box(12.1, -0.1, 3.0, 0.95, "MLflow", "runs, model registry", STORE),
    Box(
        7.7,
        -0.1,
        3.0,
        0.95,
        "Prometheus, Grafana",
        "metrics, alerts, dashboard",
        OUTSIDE,
    ),
)
# start, end, colour, text, position of the text, and whether the arrow has two heads
ARROWS = (
    ((2.02, 5.2), (2.78, 5.2), REQUEST, "request", (2.4, 5.45), True),
    ((5.22, 5.2), (6.18, 5.2), REQUEST, "", (0, 0), True),
    ((9.22, 5.2), (10.58, 5.2), REQUEST, "dispatch,\nstream", (9.9, 5.6), True),
    ((7.7, 6.08), (7.7, 7.18), REQUEST, "profile", (8.15, 6.62), True),
    (
        (8.3, 4.33),
        (8.3, 3.12),
        LEARNING,
        "decision + outcome,\nscore",
        (9.45, 3.72),
        False,
    ),
    (
        (7.1, 3.12),
        (7.1, 4.33),
        LEARNING,
        "snapshot,\nevery second",
        (6.25, 3.72),
        False,
    ),
    ((6.18, 2.4), (4.72, 2.4), LEARNING, "rows; restore", (5.45, 2.65), True),
    ((9.22, 2.4), (10.58, 2.4), REPORT, "roles,\nversions", (9.9, 2.0), True),
    ((9.22, 3.0), (11.2, 4.23), REPORT, "demand for\nreplicas", (11.35, 3.62), False),
    ((12.6, 1.73), (12.6, 0.4), REPORT, "", (0, 0), True),
    ((7.7, 1.68), (7.7, 0.4), REPORT, "metrics", (8.2, 0.75), False),
)
# the tracker reads the journal; the line passes below the router
DETOUR = ((3.1, 1.73), (3.1, 1.2), (11.6, 1.2), (11.6, 1.73))


def draw() -> None:
    """Write docs/pictures/processes.png."""
    figure, axes = plt.subplots(figsize=(12, 7.6), dpi=100)
    axes.set_xlim(0, 13.8)
    axes.set_ylim(-0.8, 8.6)
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
    corners, end = DETOUR[:-1], DETOUR[-1]
    axes.plot(*zip(*corners), color=REPORT, linewidth=1.6, solid_capstyle="butt")
    arrow = {"arrowstyle": "-|>", "color": REPORT, "linewidth": 1.6}
    axes.annotate("", xy=end, xytext=corners[-1], arrowprops=arrow)
    axes.text(
        5.3,
        0.98,
        "rows, read in the background",
        ha="center",
        va="center",
        fontsize=8.5,
        color=REPORT,
    )
    legend = (
        (REQUEST, "the way of a request"),
        (LEARNING, "what is learned"),
        (REPORT, "off the request's path"),
        ("#57606a", "boxes: Serve deployments (blue),"),
        ("#57606a", "detached actors (green), durable stores (yellow)"),
    )
    for row, (colour, text) in enumerate(legend):
        axes.text(0.25, 8.35 - 0.3 * row, text, color=colour, fontsize=9, va="center")
    figure.savefig(HERE / "processes.png", bbox_inches="tight", facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw()
