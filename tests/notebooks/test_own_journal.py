"""The report of an own journal speaks of that journal; empty panels say why, and labels are legible."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from msgspec import structs

from deployments.journal.journal import Journal
from deployments.observability.colours import AUTO, colours_of
from notebooks import analysis, figures, headline, panels, report
from notebooks.decision_log import DecisionLog, journal_name, load, log_of
from notebooks.intervals import LEVEL, level_of, mean_interval, z_of
from policies.evaluation.kind_figures import Z, interval
from policies.events import FORCED, ArmEstimate, Decision, Event, Feedback, Outcome
from policies.profiling.features import KINDS, NAMES
from policies.types import Arm, Objective
from tests.support.requests import make_profile

START_S = 1_790_000_000.0  # 2026-09-21 13:33:20 UTC


def events_of(
    arms: int, count: int, scored: float = 1.0, rule: str = ""
) -> list[Event]:
    """Decisions of a policy that explores, with outcomes and scores; the later arms are better and dearer."""
    rng = np.random.default_rng(arms * 1000 + count)
    names = [f"size-{n}" for n in range(arms)]
    found: list[Event] = []
    for n in range(count):
        kind = KINDS[n % len(KINDS)]
        chosen = names[rng.integers(arms)]
        estimates = tuple(
            ArmEstimate(
                name,
                quality=0.5 + 0.05 * k,
                latency_s=0.1 + 0.1 * k,
                utility=0.4,
                sampled_utility=0.4,
                propensity=1 / arms,
            )
            for k, name in enumerate(names)
        )
        if rule:
            estimates = tuple(ArmEstimate(name) for name in names)
        profile = replace(
            make_profile(), kind=kind, features=rng.random(len(NAMES)) * 0.5
        )
        decision = Decision(
            f"d{n}",
            chosen,
            n,
            rule or "thompson-v1",
            profile,
            Objective(0.1, 100.0),
            estimates,
            time_s=START_S + 60 * n,
        )
        place = names.index(chosen)
        outcome = Outcome(f"d{n}", "ok", 0.1, 0.1 + 0.1 * place, 20, 9, 1e-6 * place)
        found += [decision, outcome]
        if rng.random() < scored:
            right = float(rng.random() < 0.5 + 0.05 * place)
            found.append(Feedback(f"d{n}", right))
    return found


def log_with(arms: int, count: int, scored: float = 1.0, rule: str = "") -> DecisionLog:
    made = tuple(Arm(f"size-{n}", output_price_usd=1e-7 * (n + 1)) for n in range(arms))
    return log_of(events_of(arms, count, scored, rule), made, name="own.db (SQLite)")


LOGS = {
    "no scores": log_with(3, 120, 0.0),
    "one arm": log_with(1, 120),
    "three decisions": log_with(2, 3),
    "nine arms": log_with(9, 360),
    "a rule": log_with(2, 60, rule="static-v0"),
    "one decision": log_with(1, 1, 0.0),
}


def visible(figure: Figure) -> list[Text]:
    """All texts of a figure that are shown."""
    figure.draw_without_rendering()
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip()
    ]


@pytest.mark.parametrize("draw", figures.ALL)
@pytest.mark.parametrize("name", LOGS)
def test_every_figure_can_be_drawn_of_every_log(name: str, draw: object) -> None:
    """No panel is an empty axis: it has marks, or it says in words why it has none."""
    figure = draw(LOGS[name])  # type: ignore[operator]
    width, _ = figure.get_size_inches()
    assert width <= panels.WIDEST
    rows = [round(axis.get_position().y0, 1) for axis in figure.axes]
    figure.draw_without_rendering()
    assert figure.axes and max(map(rows.count, rows)) <= panels.MOST_ACROSS
    for axis in figure.axes:
        words = [text.get_text() for text in axis.texts]
        marks = [
            mark
            for mark in (*axis.lines, *axis.collections, *axis.patches)
            if _has_data(mark)
        ]
        said = any("Nothing to show:" in text for text in words)
        refused = any(text.startswith("refused:") for text in words)
        assert bool(marks) or said or refused, (name, axis.get_title())
        assert not (said and axis.axison)


def _has_data(mark: object) -> bool:
    """Whether a mark has a point with finite coordinates."""
    if hasattr(mark, "get_xydata"):
        values = np.ma.filled(mark.get_xydata().astype(float), np.nan)
    elif hasattr(mark, "get_offsets"):
        values = np.asarray(mark.get_offsets(), float)
        if not len(values) or hasattr(mark, "get_segments"):
            values = np.concatenate([p.vertices for p in mark.get_paths()] or [[]])
    else:
        values = np.array([[mark.get_width(), mark.get_height()]])  # type: ignore[attr-defined]
    return bool(np.isfinite(values).all(axis=-1).any()) if np.size(values) else False


@pytest.mark.parametrize("draw", figures.ALL)
@pytest.mark.parametrize("name", ["nine arms", "no scores", "three decisions"])
def test_labels_do_not_overlap(name: str, draw: object) -> None:
    """Tick labels of one axis, annotations of one panel, titles of neighbours; and none is cut off at the edge."""
    figure = draw(LOGS[name])  # type: ignore[operator]
    figure.draw_without_rendering()
    edge = figure.bbox
    groups = [[axis.title for axis in figure.axes]]
    for axis in figure.axes:
        if axis.axison:
            groups += [ticks(axis.xaxis), ticks(axis.yaxis)]
        groups.append(list(axis.texts))
    for group in groups:
        boxes = [
            Text.get_window_extent(text) for text in group if text.get_text().strip()
        ]
        for one, other in itertools.combinations(boxes, 2):
            common = Bbox.intersection(one, other)
            # a pixel at the edge of a letter's box is white
            small = common is None or min(common.width, common.height) <= 1.5
            assert small, [text.get_text() for text in group]
        for box in boxes:
            assert box.x0 >= edge.x0 - 1 and box.x1 <= edge.x1 + 1


def ticks(axis: Axis) -> list[Text]:
    """The labels of the ticks that are in view."""
    low, high = sorted(axis.get_view_interval())
    return [
        tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
    ]


def test_letters_are_legible() -> None:
    """At least seven points, which the report shows with nine pixels or more."""
    for draw in figures.ALL:
        for text in visible(draw(LOGS["nine arms"])):
            assert text.get_fontsize() >= 7, text.get_text()


def test_the_headline_says_which_log_it_is() -> None:
    """Name, period, numbers and means with n; of an empty mean there is no number."""
    table = headline.headline(LOGS["nine arms"])["this log"]
    assert table["journal"] == "own.db (SQLite)"
    assert table["period"] == "2026-09-21 14:13 to 2026-09-21 20:12 UTC"
    assert table["decisions"].startswith("360, of which 360 routed and 0 for a client")
    assert table["routed to"].startswith("size-0 ")
    assert table["scored"] == "360 of 360 routed decisions"
    assert re.fullmatch(r"0\.\d+ \[0\.\d+, 0\.\d+\] \(n = 360\)", table["score"])
    none = headline.headline(LOGS["no scores"])["this log"]
    assert none["score"] == "none yet (n = 0)"
    assert none["scored"] == "0 of 120 routed decisions"
    one = headline.headline(LOGS["one decision"])["this log"]
    assert one["latency"] == "0.1 s (n = 1)"
    events = events_of(2, 20)
    forced = [
        structs.replace(event, fallback=FORCED)
        if isinstance(event, Decision) and event.sequence % 2
        else event
        for event in events
    ]
    log = log_of(forced, LOGS["three decisions"].arms)
    told = headline.headline(log)["this log"]["decisions"]
    assert told.startswith("20, of which 10 routed and 10 for a client")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite:////home/ann/var/journal.db", "journal.db (SQLite)"),
        ("sqlite:///var/journal.db", "journal.db (SQLite)"),
        ("postgresql+psycopg://ann@db.local/router", "router on db.local (PostgreSQL)"),
        ("postgresql+psycopg:///router", "router on this machine (PostgreSQL)"),
    ],
)
def test_the_name_of_a_journal_has_no_folder_and_no_user(url: str, name: str) -> None:
    assert journal_name(url) == name


def test_findings_speak_of_the_given_log_alone() -> None:
    """Each share with its interval and n; of a small log nothing is said."""
    assert "nothing is said" in headline.findings(LOGS["three decisions"])[0]
    events = [
        structs.replace(
            event, arm="size-1", profile=replace(event.profile, kind="code")
        )
        if isinstance(event, Decision) and event.sequence >= 200
        else event
        for event in events_of(2, 300)
    ]
    (sentence,) = headline.findings(log_of(events, LOGS["a rule"].arms))
    assert sentence == "'code': size-1 got 100% [96%, 100%] of the last 100."


async def test_the_report_says_nothing_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name of its models, no claim about it, no panel that is not there; the first line is whole."""
    url = f"sqlite:///{tmp_path}/mine.db"
    journal = Journal(url)
    for event in events_of(2, 150):
        journal.put(event)
    await journal.flush()
    monkeypatch.setenv("JOURNAL", url)
    page = report.to_html(report.execute())
    text = re.sub(r"<[^>]+>|base64,[^\"]+", " ", page)
    assert "mine.db (SQLite)" in text and str(tmp_path) not in text
    assert "150 of 150 routed decisions" in text
    for claim in (
        *("nano", "large`", "arithmetic,", "two thirds", "In the demo"),
        *("on the right", "right figure", "left figure", "Right:", "Left:", "seed 1"),
    ):
        assert claim not in text, claim
    assert "overflow-x" not in page and "Traceback" not in page
    assert page.count("data:image/png;base64,") == len(figures.ALL)


def test_chosen_requests_are_no_strategy_beside_auto() -> None:
    """Without measurements only `auto` is comparable; the other points are hollow, and the title warns."""
    log = LOGS["nine arms"]
    table = analysis.strategies(log).set_index("strategy")
    assert table.comparable.sum() == 1 and table.comparable["auto"]
    counts = table.drop("auto").scored
    assert counts.sum() == table.scored["auto"] == 360
    assert (table.quality_low < table.quality).all()
    assert (table.utility < table.utility_high).all()
    figure = figures.frontier(log)
    assert "NOT comparable" in figure.get_suptitle()
    faces = {
        container.get_label(): container.lines[0].get_markerfacecolor()
        for container in figure.axes[0].containers
    }
    assert faces.pop("auto (n = 360)") == AUTO
    assert set(faces.values()) == {"white"} and len(faces) == 9
    assert "NOT" not in figures.frontier(load()).get_suptitle()
    assert analysis.strategies(load()).comparable.all()


def test_intervals_of_several_rows_hold_together() -> None:
    """Each has the level 1 - 0.05/m, so the interval of the best of many equal means misses in at most 5 % of logs."""
    assert level_of(1) == LEVEL and level_of(10) == pytest.approx(0.995)
    assert z_of(1) == pytest.approx(Z, abs=1e-5)
    table = analysis.evaluations(LOGS["nine arms"])
    assert len(table) == 12
    rng = np.random.default_rng(5)
    missed = {1: 0, 8: 0}
    runs = 400
    for _ in range(runs):
        arms = [pd.Series(rng.random(60)) for _ in range(8)]
        best = max(arms, key=lambda values: values.mean())
        for m in missed:
            _, low, _ = mean_interval(best, m)
            missed[m] += low > 0.5
    assert missed[8] / runs < 0.05 < missed[1] / runs
    mean, low, high = mean_interval(pd.Series([1.0] * 20), 1)
    assert (mean, low, high) == pytest.approx((1.0, *interval(1.0, 20)), abs=1e-6)
    assert np.isnan(mean_interval(pd.Series([0.5]), 1)[1])
    assert np.isnan(mean_interval(pd.Series([], dtype=float), 1)[0])


def test_the_intervals_by_kind_are_wider_than_the_states() -> None:
    """Because there are many cells; the means are the same."""
    table = analysis.kinds(LOGS["nine arms"]).query("votes > 0")
    assert (table.together_low <= table.score_low).all()
    assert (table.together_high >= table.score_high).all()
    widths = table.together_high - table.together_low
    assert (widths > table.score_high - table.score_low).all()


def test_a_short_log_is_refused_with_the_number_that_is_needed() -> None:
    table = analysis.evaluations(LOGS["three decisions"])
    assert table.refused.str.contains("100 needed").all() and table.dr.isna().all()


def test_features_have_their_names() -> None:
    """The figure shows those that moved most; a short log has none."""
    shift = analysis.feature_drift(LOGS["nine arms"])
    assert list(shift.index) == list(NAMES)
    names = [
        label.get_text()
        for label in figures.drift(LOGS["nine arms"]).axes[2].get_yticklabels()
    ]
    assert len(names) == figures.MOST_FEATURES and set(names) <= set(NAMES)
    assert analysis.feature_drift(LOGS["three decisions"]).empty


def test_colours_are_those_of_all_pictures() -> None:
    """In the order of the prices."""
    log = LOGS["nine arms"]
    found = figures.colours(log)
    wanted = colours_of(log.names, {arm.name: arm.output_price_usd for arm in log.arms})
    assert {name: found[name] for name in log.names} == wanted
    assert len({*wanted.values(), found["auto"], found["static rules"]}) == 11
