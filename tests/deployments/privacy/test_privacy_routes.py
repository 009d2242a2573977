"""Erasure and export over HTTP, with API keys and a real MLflow store, and while MLflow is away."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from deployments.access.api_keys import add
from deployments.journal.ids import trace_id
from deployments.tracking import mlflow_runs
from deployments.tracking.tracker import Tracker
from tests.deployments.access.test_api_keys import ALL, Locked
from tests.support.fakes import Remote
from tests.support.gateway import Gateway, eventually

ZOE = "zoe-1987@example.org"


class Traced(Locked):
    """A gateway with keys that stores texts, with a tracker that traces every request."""

    def __init__(self, folder: Path, uri: str):
        self.folder = folder
        file = folder / "keys.json"
        self.keys = {
            name: add(file, name, scopes)
            for name, scopes in (("ann", ALL[:2]), ("ben", ALL[:2]), ("op", ALL))
        }
        Gateway.__init__(
            self,
            folder,
            keys={"file": str(file)},
            mlflow_uri=uri,
            experiment="test",
            publish_interval_s=1e6,
            trace_sample_rate=1.0,
            store_text=True,
        )
        self.tracker = Remote(Tracker(self.settings, self.router, 0.0))
        self.mlflow = MlflowClient(uri, uri)

    def talk(self, name: str, text: str, user: str = "", **more: Any) -> str:
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": text}],
            **({"user": user} if user else {}),
            **more,
        }
        answer = self.call(name, "POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        decision_id = str(answer.headers["x-router-decision-id"])
        assert self.score(name, decision_id, 0.5).status_code in (200, 202)
        return decision_id

    def track(self) -> None:
        outcomes = self.ingress.router_client.outcomes
        eventually(lambda: not outcomes.unsent)
        assert self.client.portal is not None
        self.client.portal.call(self.tracker.thing._track)

    def traces(self) -> set[str]:
        experiment = self.mlflow.get_experiment_by_name("test").experiment_id
        found = self.mlflow.search_traces([experiment], max_results=500)
        return {trace.info.trace_id for trace in found}

    def files(self) -> bytes:
        """Every byte of every file of the instance: the journal's, MLflow's, and the artefacts."""
        return b"\0".join(
            path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
        )


@pytest.fixture
def traced(tmp_path: Path, mlflow_uri: str) -> Iterator[Traced]:
    made = Traced(tmp_path, mlflow_uri)
    with made.client:
        yield made


def test_texts_and_traces_of_a_user_are_gone_and_those_of_others_are_there(
    traced: Traced,
) -> None:
    """A user is found by either field; the traces are deleted, and no file has the texts or the ids any more."""
    mine = [traced.talk("ann", f"the secret of Zoe {i}", ZOE) for i in range(3)]
    mine.append(traced.talk("ann", "the secret of Zoe 4", safety_identifier=ZOE))
    others = [traced.talk("ann", f"the plan of Max {i}", "max") for i in range(3)]
    traced.track()
    assert {trace_id(d) for d in mine + others} <= traced.traces()
    content = traced.files()
    assert b"the secret of Zoe" in content and ZOE.encode() not in content

    answer = traced.call("op", "POST", "/v1/router/erasures", json={"user": ZOE})
    assert answer.status_code == 202 and answer.json()["decisions"] == 4
    assert answer.json()["state"] == "waiting for MLflow"
    traced.track()
    path = f"/v1/router/erasures/{answer.json()['id']}"
    status = traced.call("op", "GET", path).json()
    assert status["state"] == "done" and status["traces"] == 0
    assert ZOE not in json.dumps(status)
    content = traced.files()
    assert b"secret of Zoe" not in content and b"plan of Max" in content
    for decision in mine:
        assert decision.encode() not in content
        assert trace_id(decision).encode() not in content
    shown = traced.call("op", "GET", f"/v1/router/decisions/{mine[0]}")
    assert shown.status_code in (404, 503)
    assert {trace_id(d) for d in others} == traced.traces()
    assert traced.call("op", "GET", f"/v1/router/decisions/{others[0]}").is_success


def test_a_key_is_erased_although_mlflow_is_away(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is erased at once; the traces when MLflow answers again, and until then the status says so."""
    mine = [traced.talk("ann", f"the secret of Zoe {i}") for i in range(3)]
    others = [traced.talk("ben", "the plan of Max")]
    traced.track()

    def away(*_: Any) -> None:
        raise ConnectionError("MLflow is away")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_runs.MlflowRuns, "erase_traces", away)
        answer = traced.call("op", "POST", "/v1/router/erasures", json={"key": "ann"})
        assert answer.json()["traces"] == 3
        with pytest.raises(ConnectionError):
            traced.track()
        (status,) = traced.call("op", "GET", "/v1/router/erasures").json()["erasures"]
        assert status["state"] == "waiting for MLflow" and status["traces"] == 3
    assert b"secret of Zoe" not in traced.files()
    traced.track()
    (status,) = traced.call("op", "GET", "/v1/router/erasures").json()["erasures"]
    assert status["state"] == "done"
    assert traced.traces() == {trace_id(others[0])}
    content = traced.files()
    assert not any(trace_id(d).encode() in content for d in mine)


def test_an_export_streams_a_line_for_each_decision(traced: Traced) -> None:
    """With text, outcome and scores, and of the asked person only."""
    mine = [traced.talk("ann", f"the secret of Zoe {i}", ZOE) for i in range(3)]
    traced.talk("ann", "the plan of Max", "max")
    eventually(lambda: not traced.ingress.router_client.outcomes.unsent)
    answer = traced.call("op", "POST", "/v1/router/exports", json={"user": ZOE})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert {line["decision"]["id"] for line in lines} == set(mine)
    for line in lines:
        assert "the secret of Zoe" in line["decision"]["prompt"]
        assert line["outcome"]["answer"] and line["scores"][0]["score"] == 0.5
    whole = traced.call("op", "POST", "/v1/router/exports", json={"key": "ann"}).text
    assert len(whole.splitlines()) == 4


@pytest.mark.parametrize(
    "body", [{}, {"key": "ann", "user": ZOE}, {"key": "a b"}, {"user": ""}]
)
def test_a_request_without_one_person_is_refused(
    traced: Traced, body: dict[str, str]
) -> None:
    """400 in OpenAI's shape, and nothing is erased; an unknown person is no error."""
    for path in ("/v1/router/erasures", "/v1/router/exports"):
        answer = traced.call("op", "POST", path, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    answer = traced.call("op", "POST", "/v1/router/erasures", json={"user": "nemo"})
    assert answer.status_code == 200 and answer.json()["decisions"] == 0
    unknown = traced.call("op", "GET", "/v1/router/erasures/0123")
    assert unknown.status_code == 404
    for name in ("ann", ""):
        path = "/v1/router/erasures"
        refused = traced.call(name, "POST", path, json={"key": "ann"})
        assert refused.status_code in (401, 403)
