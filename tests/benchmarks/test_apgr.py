"""Tests of RouteLLM's measures of two-model routing and of the tables of the quality benchmark."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.decisions import apgr, tables
from benchmarks.decisions.streams import ROOT, SOURCES, data_folder
from benchmarks.router import decision_latency
from policies.profiling.features import D
from tests.support.streams import Streams


def test_a_random_router_has_an_apgr_of_one_half() -> None:
    """A router without a preference has APGR 0.5, CPT(50 %) 50 % and CPT(80 %) 80 %."""
    curve = apgr.recovered(np.zeros(300), np.zeros(300), np.repeat([1.0, 0.0], 150))
    assert apgr.apgr(curve) == pytest.approx(0.5)
    assert (apgr.cpt(curve, 0.5), apgr.cpt(curve, 0.8)) == pytest.approx((0.5, 0.8))


def test_apgr_of_the_best_and_of_the_worst_order() -> None:
    """If 100 of 200 prompts need the strong model, APGR is 0.75 in the best order and 0.25 in the worst."""
    weak = np.repeat([0.0, 1.0], 100)
    strong = np.ones(200)
    best, worst = (
        apgr.recovered(sign * (strong - weak), weak, strong) for sign in (1, -1)
    )
    assert apgr.apgr(best) == pytest.approx(0.75) and apgr.apgr(worst) == pytest.approx(
        0.25
    )
    assert apgr.cpt(best, 0.5) == pytest.approx(0.25) and apgr.cpt(
        worst, 0.8
    ) == pytest.approx(0.9)


def test_prompts_that_the_strong_model_gets_wrong_lift_the_gap_above_one() -> None:
    """PGR exceeds 1 if the weak model gets the prompts that only the strong model answers wrongly."""
    weak = np.repeat([0.0, 1.0], [200, 100])
    strong = np.repeat([1.0, 0.0], [200, 100])
    curve = apgr.recovered(strong - weak, weak, strong)
    assert curve.max() > 1 and curve[-1] == pytest.approx(1) and curve[0] == 0


def test_a_prompt_that_counts_twice_is_two_prompts() -> None:
    """A prompt with the weight 2 counts like two equal prompts."""
    rng = np.random.default_rng(0)
    preference = rng.random(50)
    weak = rng.integers(0, 2, 50) * 0.5
    strong = rng.random(50) + 0.3
    times = rng.integers(0, 3, 50)
    repeated = apgr.recovered(
        *(np.repeat(values, times) for values in (preference, weak, strong))
    )
    assert apgr.recovered(
        preference, weak, strong, times.astype(float)
    ) == pytest.approx(repeated)


def test_a_strong_model_that_is_worse_is_an_error() -> None:
    """PGR is undefined if the strong model is worse than the weak one."""
    with pytest.raises(ValueError, match=r"not better than the weak one: by -0\.5"):
        apgr.recovered(np.zeros(2), np.array([1.0, 1.0]), np.array([1.0, 0.0]))


def test_the_error_for_missing_streams_names_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error and the documentation name the source of each stream; a folder with one stream is accepted."""
    monkeypatch.setenv("ROUTER_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="ROUTER_DATA") as refused:
        data_folder()
    page = (ROOT / "docs/benchmarks/decisions.md").read_text()
    for folder, source in SOURCES.items():
        assert f"{folder}/train.parquet" in str(refused.value) and source in str(
            refused.value
        )
        assert folder in page and source in page
    for column in ("prompt_id", "cost_usd", "prompt_tokens", "output_tokens", "split"):
        assert column in page
    (tmp_path / "pareto_k4").mkdir()
    (tmp_path / "pareto_k4/train.parquet").touch()
    assert data_folder() == tmp_path


def test_the_learned_policy_ranks_held_out_prompts(streams: Streams) -> None:
    """After some hundred requests our policy and the ridge rank unseen prompts better than chance.

    The recorded stream is the MMLU of the paper. On the made stream, a router that does not recognise the kinds of
    prompts has APGR 0.5.
    """
    requests, least, least_of_ridge = (
        (1500, 0.5, 0.58) if streams.recorded else (600, 0.65, 0.85)
    )
    trials = apgr.trials(
        ["routellm_mmlu"], "thompson", (0.1,), 6, requests, streams.folder
    )
    frame = pd.DataFrame([row for trial in trials for row in apgr.measure(trial)])
    mean = frame.groupby("router").APGR.mean()
    assert mean["ours"] > least and mean["offline ridge, all"] > least_of_ridge
    assert mean["random"] == pytest.approx(0.5)
    assert mean["oracle"] > mean.drop("oracle").max()
    shown = apgr.summarise(frame)
    assert sum(shown.router.str.startswith("RouteLLM")) == 8 and "ours, λ = 0.1" in set(
        shown.router
    )


def test_the_table_shows_every_strategy_with_its_interval() -> None:
    """The table has the defaults of each strategy, the best setting of its grid, and the references."""
    runs = [
        ("ours", 0, 0.5),
        ("ours", 0, 0.7),
        ("peer", 0, 0.4),
        ("peer", 0, 0.4),
        ("peer", 1, 0.6),
        ("peer", 1, 0.6),
    ]
    frame = pd.DataFrame(
        [{"strategy": s, "variant": v, "utility": u} for s, v, u in runs]
    )
    frame[["portfolio", "cost_weight"]] = "world", 0.1
    (table,) = tables.by_strategy(
        frame, {("world", 0.1): {"oracle": np.array([0.9, 0.9])}}
    ).values()
    shown = table.set_index("utility").to_dict("index")
    assert shown["ours"] == {"λ 0.1": "0.6000 ± 0.1960", "λ 0.1, of its grid": ""}
    assert shown["peer"] == {
        "λ 0.1": "0.4000 ± 0.0000",
        "λ 0.1, of its grid": "0.6000 ± 0.0000",
    }
    assert shown["oracle"]["λ 0.1"] == "0.9000 ± 0.0000"


def test_the_shortfall_of_every_strategy() -> None:
    """The shortfall is measured against the better reference, at the defaults and at the best setting."""
    runs = [
        ("ours", 0, 0.6, 0.5),
        ("peer", 0, 0.4, 0.6),
        ("peer", 1, 0.6, 0.45),
    ]  # utilities at λ 0 and 0.1
    frame = pd.DataFrame(
        [
            {
                "strategy": s,
                "variant": v,
                "portfolio": "world",
                "cost_weight": w,
                "utility": u,
            }
            for s, v, *both in runs
            for w, u in zip((0.0, 0.1), both, strict=True)
        ]
    )
    references = {"best single": 0.7, "offline ridge": 0.65}
    table = tables.shortfall(
        frame, {("world", 0.0): references, ("world", 0.1): references}
    )
    assert [tuple(row) for row in table.round(3).to_numpy()] == [
        ("ours", "defaults", 0.15, 0.2, ""),
        ("peer", "best of its grid", 0.175, 0.25, "1 of 2"),
        ("peer", "defaults", 0.2, 0.3, "1 of 2"),
    ]


def test_every_contender_is_timed_alone_and_in_batches() -> None:
    """Each contender has a median between its quartiles, alone and in batches."""
    x, y = decision_latency.world(4, D, 2)
    contenders = {
        "ours": decision_latency.ours("thompson", x, y),
        "LinUCB": decision_latency.theirs("LinUCB", x, y),
    }
    rows = decision_latency.timed(contenders, 2)
    assert [(row["who"], row["asked"]) for row in rows] == [
        (name, asked)
        for name in contenders
        for asked in ("alone", f"batches of {decision_latency.BATCH}")
    ]
    assert all(
        0 < row["low"] <= row["median"] <= row["high"] and row["wall"] > 0
        for row in rows
    )
    assert "LinUCB" in decision_latency.shown(rows)
