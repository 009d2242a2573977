"""RouteLLM's measures of two-model routing, and the other figures of the quality benchmark."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import apgr, micro, tables
from benchmarks.portfolios import ROOT, SOURCES, data_folder
from policies.features import D
from tests.streams import Streams


def test_a_router_that_knows_nothing_recovers_as_much_as_it_calls() -> None:
    """Without a preference: APGR 0.5, CPT(50 %) 50 %, CPT(80 %) 80 %."""
    curve = apgr.recovered(np.zeros(300), np.zeros(300), np.repeat([1.0, 0.0], 150))
    assert apgr.apgr(curve) == pytest.approx(0.5)
    assert (apgr.cpt(curve, 0.5), apgr.cpt(curve, 0.8)) == pytest.approx((0.5, 0.8))


def test_the_best_and_the_worst_order() -> None:
    """100 of 200 prompts need the strong model: half of the calls recover all, first or last."""
    weak, strong = np.repeat([0.0, 1.0], 100), np.ones(200)
    best, worst = (apgr.recovered(sign * (strong - weak), weak, strong) for sign in (1, -1))
    assert apgr.apgr(best) == pytest.approx(0.75) and apgr.apgr(worst) == pytest.approx(0.25)
    assert apgr.cpt(best, 0.5) == pytest.approx(0.25) and apgr.cpt(worst, 0.8) == pytest.approx(0.9)


def test_prompts_that_the_strong_model_gets_wrong_lift_the_gap_above_one() -> None:
    """Leaving these to the weak model recovers more than all strong calls do, and is no reason to stop at 100 %."""
    weak, strong = np.repeat([0.0, 1.0], [200, 100]), np.repeat([1.0, 0.0], [200, 100])
    curve = apgr.recovered(strong - weak, weak, strong)
    assert curve.max() > 1 and curve[-1] == pytest.approx(1) and curve[0] == 0


def test_a_prompt_that_counts_twice_is_two_prompts() -> None:
    """Weights of the resampling are repetitions."""
    rng = np.random.default_rng(0)
    preference, weak, strong = rng.random(50), rng.integers(0, 2, 50) * 0.5, rng.random(50) + 0.3
    times = rng.integers(0, 3, 50)
    repeated = apgr.recovered(*(np.repeat(values, times) for values in (preference, weak, strong)))
    assert apgr.recovered(preference, weak, strong, times.astype(float)) == pytest.approx(repeated)


def test_no_gap_is_an_error() -> None:
    """Where the strong model is worse there is nothing to recover."""
    with pytest.raises(ValueError, match=r"not better than the weak one: by -0\.5"):
        apgr.recovered(np.zeros(2), np.array([1.0, 1.0]), np.array([1.0, 0.0]))


def test_missing_streams_are_named_with_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the error and by the README, with the columns that are read; a folder that has one is taken as it is."""
    monkeypatch.setenv("ROUTER_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="ROUTER_DATA") as refused:
        data_folder()
    readme = (ROOT / "README.md").read_text()
    for folder, source in SOURCES.items():
        assert f"{folder}/train.parquet" in str(refused.value) and source in str(refused.value)
        assert folder in readme and source in readme
    for column in ("prompt_id", "cost_usd", "prompt_tokens", "output_tokens", "split"):
        assert column in readme
    (tmp_path / "pareto_k4").mkdir()
    (tmp_path / "pareto_k4/train.parquet").touch()
    assert data_folder() == tmp_path


def test_what_was_learned_ranks_held_out_prompts(streams: Streams) -> None:
    """One score each of some hundred requests put it above chance, and ridge with both scores, too.

    Recorded: the paper's MMLU. Made: the kind decides, and who cannot tell kinds apart has 0.5.
    """
    requests, least, least_of_ridge = (1500, 0.52, 0.58) if streams.recorded else (600, 0.65, 0.85)
    trials = apgr.trials(["routellm_mmlu"], "thompson", (0.1,), 6, requests, streams.folder)
    frame = pd.DataFrame([row for trial in trials for row in apgr.measure(trial)])
    mean = frame.groupby("router").APGR.mean()
    assert mean["ours"] > least and mean["offline ridge, all"] > least_of_ridge
    assert mean["random"] == pytest.approx(0.5)
    assert mean["oracle"] > mean.drop("oracle").max()
    shown = apgr.summarise(frame)
    assert sum(shown.router.str.startswith("RouteLLM")) == 8 and "ours, λ = 0.1" in set(shown.router)


def test_every_strategy_is_shown_with_its_interval() -> None:
    """The documented defaults, the best of the grid beside them, and what is possible below."""
    runs = [("ours", 0, 0.5), ("ours", 0, 0.7), ("peer", 0, 0.4), ("peer", 0, 0.4), ("peer", 1, 0.6), ("peer", 1, 0.6)]
    frame = pd.DataFrame([{"strategy": s, "variant": v, "utility": u} for s, v, u in runs])
    frame[["portfolio", "cost_weight"]] = "world", 0.1
    (table,) = tables.by_strategy(frame, {("world", 0.1): {"oracle": np.array([0.9, 0.9])}}).values()
    shown = table.set_index("utility").to_dict("index")
    assert shown["ours"] == {"λ 0.1": "0.6000 ± 0.1960", "λ 0.1, of its grid": ""}
    assert shown["peer"] == {"λ 0.1": "0.4000 ± 0.0000", "λ 0.1, of its grid": "0.6000 ± 0.0000"}
    assert shown["oracle"]["λ 0.1"] == "0.9000 ± 0.0000"


def test_how_far_everybody_is_short() -> None:
    """Of the better reference, on the mean over the cells and in the worst; a grid's best single setting beside."""
    runs = [("ours", 0, 0.6, 0.5), ("peer", 0, 0.4, 0.6), ("peer", 1, 0.6, 0.45)]  # utilities at λ 0 and 0.1
    frame = pd.DataFrame(
        [
            {"strategy": s, "variant": v, "portfolio": "world", "cost_weight": w, "utility": u}
            for s, v, *both in runs
            for w, u in zip((0.0, 0.1), both, strict=True)
        ]
    )
    references = {"best single": 0.7, "offline ridge": 0.65}
    table = tables.shortfall(frame, {("world", 0.0): references, ("world", 0.1): references})
    assert [tuple(row) for row in table.round(3).to_numpy()] == [
        ("ours", "defaults", 0.15, 0.2, ""),
        ("peer", "best of its grid", 0.175, 0.25, "1 of 2"),
        ("peer", "defaults", 0.2, 0.3, "1 of 2"),
    ]


def test_everybody_is_timed_alone_and_in_batches() -> None:
    """Median between the quartiles, in both ways of asking."""
    x, y = micro.world(4, D, 2)
    contenders = {"ours": micro.ours("thompson", x, y), "LinUCB": micro.theirs("LinUCB", x, y)}
    rows = micro.timed(contenders, 2)
    assert [(row["who"], row["asked"]) for row in rows] == [
        (name, asked) for name in contenders for asked in ("alone", f"batches of {micro.BATCH}")
    ]
    assert all(0 < row["low"] <= row["median"] <= row["high"] and row["wall"] > 0 for row in rows)
    assert "LinUCB" in micro.shown(rows)
