"""Tests of the scenarios in which the world changes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from benchmarks.decisions import budget
from benchmarks.decisions import run as decisions
from benchmarks.decisions.scenarios import (
    Job,
    measure,
    reordered,
    run,
    until_moved,
    world,
)
from benchmarks.decisions.streams import load
from policies.types import Objective
from tests.support.requests import make_request
from tests.support.streams import Streams

PORTFOLIO = "routellm_gsm8k"
REQUESTS = 400


def test_a_sudden_change_of_a_share_takes_four_fifths_of_a_window() -> None:
    """A share that falls from 1 to 0 at once counts as moved after four fifths of a window."""
    falling = np.array([1.0] * 600 + [0.0] * 600)
    assert until_moved(falling, 600) == 40 == until_moved(1 - falling, 600)
    assert until_moved(np.roll(falling, 100), 600) == 140
    assert np.isnan(until_moved(np.ones(1200), 600))


def test_drift_halves_the_score_of_the_best_arm(streams: Streams) -> None:
    """From the middle of the stream the scores of the best arm halve, and those of other arms do not change."""
    portfolio = load(PORTFOLIO, data=streams.folder)
    stream, change, best = world("drift", portfolio, 0, REQUESTS)
    true = portfolio.scores[
        np.random.default_rng(1000).permutation(len(portfolio.profiles))[:REQUESTS]
    ]
    assert (stream.scores[:change] == true[:change]).all()
    ratio = stream.scores[change:, best].mean() / true[change:, best].mean()
    assert 0.35 < ratio < 0.65
    assert (np.delete(stream.scores, best, 1) == np.delete(true, best, 1)).all()


def test_a_stream_longer_than_the_recording_repeats_it(streams: Streams) -> None:
    """A stream that is longer than the recording repeats it in another order."""
    portfolio = load(PORTFOLIO, data=streams.folder)
    stream, change, dearest = world("price", portfolio, 0, 2 * len(portfolio.profiles))
    assert len(stream.profiles) == 2 * len(portfolio.profiles) and change == len(
        portfolio.profiles
    )
    first = stream.scores[:change]
    second = stream.scores[change:]
    assert (
        first.mean(axis=0) == pytest.approx(second.mean(axis=0))
        and (first != second).any()
    )
    assert (
        stream.costs[change - 1, dearest] == 1 and stream.costs[change, dearest] == 0.1
    )


def test_a_price_drop_takes_effect_at_once(streams: Streams) -> None:
    """After a price drop the share of the arm reaches its final value within the next 50 requests."""
    # On made streams the share is 0.35 before and 0.75 after; in one run of ten it is 0.75 before, too.
    shuffles, least = (3, 0.7) if streams.recorded else (7, 0.6)
    jobs = [
        Job("price", PORTFOLIO, n, "thompson", 1000, streams.folder)
        for n in range(shuffles)
    ]
    rows = [row for job in jobs for row in measure(job)]
    before, soon, last = (
        np.median([row[name] for row in rows])
        for name in ("share before", "share of the next 50", "share at the end")
    )
    assert before < 0.5 and soon > 0.8 * last > 0.8 * least


def test_a_new_arm_is_chosen_only_after_its_appearance(streams: Streams) -> None:
    """In the scenario new-arm the best arm is never chosen before the middle of the stream."""
    portfolio = reordered(load(PORTFOLIO, data=streams.folder), best_last=True)
    utility = (portfolio.scores - 0.1 * portfolio.cost).mean(axis=0)
    assert list(utility) == sorted(utility)
    chosen = run(
        Job("new-arm", PORTFOLIO, 0, "thompson", REQUESTS, streams.folder)
    ).chosen
    assert (
        not (chosen[: REQUESTS // 2] == 1).any()
        and (chosen[REQUESTS // 2 :] == 1).any()
    )


def test_the_pacer_keeps_a_stream_at_its_ceiling(streams: Streams) -> None:
    """With our pacer the mean cost is close to the ceiling; without it the same router spends much more."""
    stream, *_ = world("budget", load(PORTFOLIO, data=streams.folder), 0, 1500)
    rows = {row["strategy"]: row for row in budget.measure(stream, "thompson", 0, [])}
    assert rows["thompson without"]["cost over ceiling, %"] > 20
    paced = rows["thompson with pacer"]
    assert paced["off by, %"] < (0.5 if streams.recorded else 2) and paced["binds"]
    assert paced["score"] > stream.scores[:, stream.costs[0].argmin()].mean() + 0.03


def test_the_peer_with_its_own_pacer_spends_about_the_ceiling(streams: Streams) -> None:
    """ParetoBandit with its own pacer is close enough to the ceiling to be compared with ours."""
    stream, *_ = world("budget", load(PORTFOLIO, data=streams.folder), 0, 1500)
    rows = {
        row["strategy"]: row
        for row in budget.measure(stream, "thompson", 0, ["paretobandit"])
    }
    assert rows["paretobandit"]["off by, %"] < (20 if streams.recorded else 60)


def test_the_best_fixed_mix_spends_the_ceiling() -> None:
    """The best fixed mix uses two arms at the ceiling, or one arm if that is both better and cheaper."""
    scores = np.array([0.2, 0.8])
    costs = np.array([0.0, 1.0])
    assert budget.mix(scores, costs, 0.5) == pytest.approx(0.5)
    assert budget.mix(scores[::-1], costs, 0.5) == pytest.approx(0.8)


def test_the_pacer_of_the_peer_excludes_dear_arms() -> None:
    """ParetoBandit's price limit falls once it has spent too much, and then excludes the dear arm."""
    from policies.types import Arm

    arms = (Arm("cheap", output_price_usd=0.1), Arm("dear", output_price_usd=1.0))
    request = make_request(objective=Objective())
    peer = budget.PacedParetoBandit(
        arms, 0.0, len(request.profile.features), 0, ceiling=0.3
    )
    rng = np.random.default_rng(0)
    for _ in range(20):
        (decision,) = peer.decide([request], {}, rng, 0)
        peer.score(structs.replace(decision, arm="dear"), 1.0)
    assert {peer.decide([request], {}, rng, 0)[0].arm for _ in range(5)} == {"cheap"}


def test_the_quality_benchmark_runs_scenarios(
    streams: Streams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With --scenario the command prints a table, writes the figures and saves a picture."""
    where = [
        "--out",
        str(tmp_path),
        "--json",
        str(tmp_path / "figures.json"),
        "--jobs",
        "1",
        "--data",
        streams.folder,
    ]
    what = [
        "--scenario",
        "drift",
        "delay",
        "--portfolio",
        PORTFOLIO,
        "--shuffles",
        "1",
        "--requests",
        "600",
    ]
    monkeypatch.setattr(
        sys, "argv", ["quality", *what, "--strategy", "thompson", *where]
    )
    decisions.main()
    assert (
        "drift, λ = 0.1" in capsys.readouterr().out
        and (tmp_path / "scenarios.png").stat().st_size > 1000
    )
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [row["scenario"] for row in rows] == ["drift", "delay"]
    assert (
        rows[0]["utility after"] < rows[0]["utility before"]
        and rows[1]["utility"] != rows[1]["utility without it"]
    )
