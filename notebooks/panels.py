"""Panels of figures: their size, empty panels that say why they are empty, and labels that do not overlap."""

import textwrap
from collections.abc import Iterable
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

WIDEST = 11.0  # inches; the report shows at most 1,100 pixels, so a letter of 7 points has at least 9 pixels
rcParams.update({"axes.titlesize": 10, "axes.labelsize": 9})
rcParams.update({"xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8})
MOST_ACROSS = 3  # panels beside each other
GREY = "0.6"
# where a label may be, in points from its point; the first free place is taken
OFFSETS = [
    (reach * x, reach * y)
    for reach in (9, 16, 24, 34, 46)
    for x, y in ((0.8, -1), (-0.8, 1), (0.8, 1), (-0.8, -1), (1.5, 0), (-1.5, 0))
]


def panels(
    count: int, title: str, height: float = 3.8, width: float = 3.7, across: int = 3
) -> tuple[Figure, list[Any]]:
    """A figure with `count` panels in rows of at most three.

    Args:
        count: number of panels.
        title: of the figure.
        height: of a row, in inches.
        width: of a panel, in inches; less if the figure would be wider than WIDEST.
        across: largest number of panels in a row.
    """
    columns = min(count, across, MOST_ACROSS)
    if count == 4:
        columns = min(columns, 2)
    rows = -(-count // columns)
    size = (max(6.0, min(WIDEST, width * columns)), height * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat)[:count]


def say_empty(axis: Any, why: str, title: str = "") -> None:
    """Write in words why a panel has nothing to show, in place of an empty axis."""
    axis.clear()
    axis.set_axis_off()
    axis.set_title(title)
    axis.text(
        0.5,
        0.5,
        textwrap.fill(f"Nothing to show: {why}.", 40),
        ha="center",
        va="center",
        transform=axis.transAxes,
        color="0.35",
        fontsize=10,
    )


def label_points(
    figure: Figure, axis: Any, labels: Iterable[tuple[float, float, str]]
) -> None:
    """Write a label beside each point, where it overlaps no other label; a line leads from a distant label.

    Args:
        figure: of the axis; it is laid out here, so that the places are final.
        axis: the panel.
        labels: x, y and text of each.
    """
    figure.draw_without_rendering()
    taken: list[Bbox] = []
    for x, y, text in labels:
        note = axis.annotate(
            text,
            (x, y),
            OFFSETS[0],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color="0.35",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6},
        )
        best: tuple[float, tuple[float, float]] | None = None
        for offset in OFFSETS:
            note.set_position(offset)
            box = _text_box(note)
            hidden = sum(_common_area(box, other) for other in taken)
            if best is None or hidden < best[0]:
                best = (hidden, offset)
            if not hidden:
                break
        assert best is not None
        note.set_position(best[1])
        taken.append(_text_box(note))


def _text_box(note: Annotation) -> Bbox:
    """The box of an annotation's text on the canvas, without the line to its point."""
    figure = note.get_figure()
    assert figure is not None
    renderer = figure._get_renderer()  # type: ignore[union-attr]
    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _common_area(one: Bbox, other: Bbox) -> float:
    """The area in which two boxes overlap."""
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else float(common.width * common.height)
