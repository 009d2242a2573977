"""A policy version decides on a DataFrame through mlflow.pyfunc, without pickle, if the journal has signed it."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from deployments.journal.journal import Journal
from deployments.tracking import deciding_model
from deployments.tracking.model_registry import FILES
from policies.worth import rounded
from tests.deployments.tracking.test_mlflow_conventions import Tracked

EASY = "What is 3 plus 5?"


@pytest.fixture(scope="module")
def published(
    empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tracked]:
    """A gateway whose champion is registered; no test here teaches it more."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri).create_experiment("test", str(folder / "artefacts"))
    made = Tracked(folder, uri)
    with made.client:
        for n in range(8):
            decision_id = made.ask(model=("small", "large")[n % 2])
            score = {"decision_id": decision_id, "score": float(n % 2)}
            posted = made.client.post("/v1/feedback", json=score)
            assert posted.json()["status"] == "accepted", posted.text
        made.track()
        asyncio.run(made.tracker._promotions.publish())
        asyncio.run(made.tracker._promotions.sync_aliases())
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        yield made


@pytest.fixture(autouse=True)
def journal(published: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names the journal."""
    monkeypatch.setenv("JOURNAL", published.settings.journal)
    monkeypatch.delenv("UNSIGNED_VERSIONS", raising=False)


def load() -> Any:
    return mlflow.pyfunc.load_model("models:/router-policy@champion")


def test_the_champion_decides_on_a_data_frame(published: Tracked) -> None:
    """Prompts and chats; the objective of a row, or the router's; the same answer each time."""
    model = load()
    messages = json.dumps(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": EASY}]},
        ]
    )
    frame = pd.DataFrame(
        {
            "prompt": [EASY, EASY, None, EASY],
            "messages": [None, None, messages, None],
            "cost_weight": [0.0, 1e7, np.nan, 0.0],
            "max_cost_usd": [np.nan, np.nan, np.nan, 1e-12],
        }
    )
    decided = model.predict(frame)
    assert list(decided.columns) == list(deciding_model.OUTPUTS)
    # the scores say that `large` is right; a request that minds the cost goes to `small`
    assert decided.arm.tolist() == ["large", "small", "large", ""]
    assert decided.propensity[:3].between(0.5, 1.0).all()
    assert decided.expected_score[0] > decided.expected_score[1]
    assert decided.expected_cost_usd[0] > decided.expected_cost_usd[1] > 0
    assert decided.expected_latency_s[:3].gt(0).all()
    assert decided.iloc[3, 1:].isna().all()
    assert model.predict(frame).equals(decided)
    # columns may be left out
    assert model.predict(frame[["prompt"]][:1]).arm.tolist() == ["large"]
    assert len(model.predict(frame[:0])) == 0


def test_the_model_agrees_with_the_routers_own_estimates(published: Tracked) -> None:
    """Score and cost are those that the router expects of the same text, on the same idle system."""
    decision_id = published.ask()
    shown = published.client.get(f"/v1/router/decisions/{decision_id}").json()
    decided = load().predict(pd.DataFrame({"prompt": [EASY]}))
    (mine,) = [e for e in shown["models"] if e["arm"] == decided.arm[0]]
    assert round(decided.expected_score[0], 3) == mine["quality"]
    assert rounded(decided.expected_cost_usd[0]) == mine["cost_usd"]
    assert rounded(decided.expected_latency_s[0]) == mine["latency_s"]


def test_the_version_has_a_signature_an_example_and_no_pickle(
    published: Tracked, tmp_path: Path
) -> None:
    """The registry page shows the schema; the example can be decided; no file is a pickle."""
    model = load()
    assert model.metadata.signature.inputs.input_names() == list(deciding_model.INPUTS)
    assert model.metadata.signature.outputs.input_names() == list(
        deciding_model.OUTPUTS
    )
    assert len(model.predict(deciding_model.example())) == 2
    run = published.mlflow.get_model_version("router-policy", "1").run_id
    folder = Path(published.mlflow.download_artifacts(run, "policy", str(tmp_path)))
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"MLmodel", "input_example.json", f"{FILES}/policy.json"} <= files
    assert not any(name.endswith((".pkl", ".pickle", ".py")) for name in files)


def test_a_version_that_the_journal_has_not_signed_is_refused(
    published: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the router: without a journal, with another one, and with other files; the message says what to do."""
    monkeypatch.delenv("JOURNAL")
    with pytest.raises(ValueError, match="set JOURNAL to the URL"):
        load()
    nowhere = f"sqlite:///{tmp_path}/nowhere.db"
    monkeypatch.setenv("JOURNAL", nowhere)
    with pytest.raises(ValueError, match="there is no journal at"):
        load()
    assert not (tmp_path / "nowhere.db").exists()
    other = Journal(f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setenv("JOURNAL", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(ValueError, match="was not registered by this journal"):
        load()
    other.engine.dispose()
    (tmp_path / "empty.db").touch()
    monkeypatch.setenv("JOURNAL", f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(ValueError, match="is not a journal that can be read"):
        load()
    monkeypatch.setenv("UNSIGNED_VERSIONS", "load")
    assert load().predict(pd.DataFrame({"prompt": [EASY]})).arm.tolist() == ["large"]


def test_changed_files_are_refused_even_unsigned(
    published: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer of MLflow can change the prices in the version, but not its signature."""
    run = published.mlflow.get_model_version("router-policy", "1").run_id
    folder = Path(published.mlflow.download_artifacts(run, "policy", str(tmp_path)))
    head = folder / FILES / "policy.json"
    head.write_text(
        head.read_text().replace(
            '"output_price_usd_per_million": 10', '"output_price_usd_per_million": 0'
        )
    )
    for unsigned in ("refuse", "load"):
        monkeypatch.setenv("UNSIGNED_VERSIONS", unsigned)
        with pytest.raises(ValueError, match="not those that were registered"):
            mlflow.pyfunc.load_model(str(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"latency_weight": [0.1]}, "neither `prompt` nor `messages`"),
        ({"messages": ["no json"]}, "`messages` is no JSON"),
        ({"messages": ['[{"role": "user"}]']}, "no `content` that is text"),
    ],
)
def test_a_row_without_a_text_is_refused_with_the_reason(
    published: Tracked, row: dict[str, list[Any]], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        load().predict(pd.DataFrame(row))
