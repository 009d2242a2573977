"""Tests of what `router demo` compares, and of what it leaves in MLflow and as a picture."""

from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from assets import talk
from assets.tasks import HARD
from deployments.demonstration.run import (
    Options,
    Span,
    draw,
    log_to_mlflow,
    make_stream,
    static_rule,
    summarise,
)


def frame(model: str, right: float) -> pd.DataFrame:
    count = 9
    return pd.DataFrame(
        {
            "right": [right] * count,
            "latency_s": [0.5] * count,
            "cost_usd": [1e-5] * count,
            "utility": [right - 0.1] * count,
            "third": [1 + 3 * i // count for i in range(count)],
            "model": [model] * count,
        }
    )


def test_the_demos_runs_last_as_long_as_the_demo(
    tmp_path: Path, mlflow_uri: str
) -> None:
    """One run of the whole demo and one below it for each strategy, with the real times and the parameters."""
    options = Options(
        mlflow=mlflow_uri, seed=5, requests=9, scored=0.5, concurrency=1, threshold=0.5
    )
    frames = {"auto": frame("large", 1.0), "small": frame("small", 0.0)}
    figures = {name: summarise(part, ["small"]) for name, part in frames.items()}
    spans = {"auto": Span(1000.0, 1300.0), "small": Span(1300.0, 1540.0)}
    picture = tmp_path / "demo.png"
    picture.write_bytes(b"a picture")
    log_to_mlflow(options, figures, frames, picture, spans)
    client = MlflowClient(mlflow_uri, mlflow_uri)
    experiment = client.get_experiment_by_name("adaptive-router").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    times = {
        name: (run.info.start_time, run.info.end_time, run.info.status)
        for name, run in runs.items()
    }
    assert times == {
        "demo seed 5": (1_000_000, 1_540_000, "FINISHED"),
        "demo auto seed 5": (1_000_000, 1_300_000, "FINISHED"),
        "demo small seed 5": (1_300_000, 1_540_000, "FINISHED"),
    }
    parent = runs["demo seed 5"]
    for run in runs.values():
        params = run.data.params
        assert (params["seed"], params["requests"], params["scored"]) == (
            "5",
            "9",
            "0.5",
        )
        assert "utility" in run.data.tags["mlflow.note.content"]
    for name in ("auto", "small"):
        run = runs[f"demo {name} seed 5"]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["strategy"] == name
        assert run.data.metrics["accuracy"] == figures[name]["accuracy"]


@pytest.mark.parametrize("levels", [("easy", "hard"), ("easy", "hard", "talk")])
def test_the_picture_has_a_panel_for_each_level_that_was_asked(
    tmp_path: Path, levels: tuple[str, ...]
) -> None:
    """With and without questions for a language model."""
    frames = {name: frame("large", 0.5) for name in ("auto", "large", "static rules")}
    for part in frames.values():
        part["i"] = range(len(part))
        part["level"] = [levels[i % len(levels)] for i in range(len(part))]
    draw(frames, ["large"], tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_static_rules_send_talk_to_the_language_model_and_hard_sums_to_the_last() -> (
    None
):
    """A team's rule knows that much; without a language model it is the rule of complexity alone."""
    names = ["nano", "small", talk.MODEL, "large"]
    rule = static_rule(names, 0.5)
    chosen = {task.kind: rule(task) for task in make_stream(1, 300, with_talk=True)}
    assert {chosen[kind] for kind in talk.KINDS} == {talk.MODEL}
    assert {chosen[kind] for kind in chosen if kind not in talk.KINDS} == {
        "nano",
        "large",
    }
    assert chosen[HARD[-1]] == "large"
    alone = static_rule([talk.MODEL], 0.5)
    assert {alone(task) for task in make_stream(1, 20)} == {talk.MODEL}
