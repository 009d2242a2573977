"""Tests of what the state and the explanations say of each arm and kind, and of what a restart keeps."""

from pathlib import Path
from typing import Any

import pytest

from deployments.router import arm_stats
from deployments.router.arm_stats import ArmStats
from policies.events import Decision, Event, Feedback, Outcome, Record
from policies.types import Arm, Objective
from tests.support import exposition
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually
from tests.support.requests import make_profile

CODE = "Write a python function that sorts."


def ask(gateway: Gateway, text: str, model: str) -> str:
    """Ask a model by its name; returns the id of the decision."""
    messages = [{"role": "user", "content": text}]
    answer = gateway.chat(model=model, messages=messages)
    return str(answer.headers.get("x-router-decision-id", ""))


def score(gateway: Gateway, decision_id: str, value: float) -> None:
    body = {"decision_id": decision_id, "score": value}
    assert gateway.client.post("/v1/feedback", json=body).status_code == 200


def models(gateway: Gateway) -> Any:
    eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
    return gateway.client.get("/v1/router/state").json()["models"]


def test_the_state_tells_unknown_from_zero_by_kind(gateway: Gateway) -> None:
    """`small` is wrong at code and unscored at chat; `large` was not asked; `minilm` embeds and has no score."""
    assert models(gateway)["small"]["share"] is None
    for _ in range(3):
        score(gateway, ask(gateway, CODE, "small"), 0.0)
        ask(gateway, "Who is it?", "small")
    gateway.client.post("/v1/embeddings", json={"model": "auto", "input": "a text"})
    found = models(gateway)
    code = found["small"]["kinds"]["code"]
    assert (code["score"], code["votes"], code["answers"]) == (0.0, 3, 3)
    assert code["score_low"] == 0.0 < code["score_high"] < 1.0
    assert code["availability"] == 1.0 and code["latency_p50_s"] > 0
    question = found["small"]["kinds"]["question"]
    assert question["score"] is None and question["votes"] == 0
    assert question["answers"] == 3 and question["overall_score"] is None
    assert found["large"]["kinds"] == {} and found["large"]["figures"]["answers"] == 0
    assert found["large"]["figures"]["availability"] is None
    assert found["minilm"]["expected_quality"] is None
    assert found["minilm"]["figures"]["score"] is None


def test_the_explanation_says_what_is_known_of_this_kind(gateway: Gateway) -> None:
    """For the chosen arm and for the others, with n; figures of other kinds are left out."""
    for value in (1.0, 0.5):
        score(gateway, ask(gateway, CODE, "large"), value)
    ask(gateway, "Who is it?", "large")
    gateway.models["small"].script = failing(RuntimeError())
    ask(gateway, CODE, "small")
    gateway.models["small"].script = None
    decision_id = ask(gateway, CODE, "small")
    models(gateway)
    found = gateway.client.get(f"/v1/router/decisions/{decision_id}").json()
    known = found["figures_of_kind"]
    assert known["large"]["score"] == 0.75 and known["large"]["votes"] == 2
    assert known["large"]["answers"] == 2
    assert known["small"]["availability"] == 0.5 and known["small"]["score"] is None
    assert "of the kind 'code'" in found["summary"]
    assert "large mean score 0.75 [" in found["summary"]
    assert "of 2 scored" in found["summary"]
    assert "small no score yet, 50.0% of 2 without a flaw" in found["summary"]


def test_a_score_that_waits_is_counted_when_it_takes_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held scores are a gauge; afterwards they are accepted, with their source. A refused score has its own status."""
    made = exposition.record(monkeypatch)
    gateway = Gateway(tmp_path)
    counted = made["ray_router_feedback"].values
    with gateway.client:
        portal = gateway.client.portal
        assert portal is not None
        gateway.router.broken = True
        early = gateway.chat().headers["x-router-decision-id"]
        gateway.router.broken = False
        body = {"decision_id": early, "score": 1.0, "source": "judge"}
        assert gateway.client.post("/v1/feedback", json=body).status_code == 202
        assert not counted
        router = gateway.router.thing
        assert router._learner.records.pending_scores == 1
        eventually(lambda: counted)
        assert gateway.client.post("/v1/feedback", json=body).status_code == 200
        body["score"] = 0.5
        gateway.client.post("/v1/feedback", json=body)
        portal.call(router._maintain)
        assert made["ray_router_feedback_pending"].values[()] == 0
    statuses = {dict(key)["status"]: value for key, value in counted.items()}
    assert statuses == {"accepted": 1, "duplicate": 1, "corrected": 1}
    assert sum(made["ray_router_scored_decisions"].values.values()) == 1
    # the counters are those of the process: a replay of the journal is no new event
    made.clear()
    Gateway(tmp_path)
    assert not made["ray_router_feedback"].values


def test_gauges_of_a_kind_that_has_left_the_window_are_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its last mean must not stand in Prometheus for ever; the number of its answers is 0."""
    made = exposition.record(monkeypatch)
    gateway = Gateway(tmp_path)
    with gateway.client:
        portal = gateway.client.portal
        assert portal is not None
        router = gateway.router.thing
        score(gateway, ask(gateway, CODE, "small"), 0.5)
        models(gateway)
        portal.call(router._maintain)
        (key,) = made["ray_router_kind_score"].values
        assert made["ray_router_kind_score"].values[key] == 0.5
        router._arm_stats.reset()
        portal.call(router._maintain)
    assert made["ray_router_kind_votes"].values[key] == 0
    unknown = made["ray_router_kind_score"].values[key]
    assert unknown != unknown


def test_events_before_the_snapshot_rebuild_the_windows_and_not_the_totals() -> None:
    """The snapshot has the totals, so an event that is given again does not count twice."""
    stats = ArmStats()
    stats.set_arms([Arm("small")])
    decision = Decision("d", "small", 0, "v1", make_profile(), Objective())
    record = Record(decision, Outcome("d", latency_s=1.0), {"user": 1.0})
    events: list[Event] = [decision, record.outcome or decision, Feedback("d", 1.0)]
    for event in events:
        stats.rebuild(event, record)
    assert stats.totals.of_all().decisions == 0 and stats.shares() == {"small": 1.0}
    assert stats.figures().total.votes == 1
    for event in events:
        stats.record(event, record)
    assert stats.totals.of_all().scores == 1
    # the same decision again is still one decision of the window
    assert stats.figures().total.decisions == 1
    stats.reset()
    assert stats.totals.of_all().decisions == 0 and stats.recent == 0


def test_a_replica_that_will_stop_has_a_price_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that another model can answer go there; nothing excludes it, and the notice ends by itself."""
    stats = ArmStats()
    stats.set_arms([Arm("small"), Arm("large")])
    stats.report_leaving("large", True)
    for states in (stats.states(), stats.states("ingress")):
        assert states["large"].healthy and states["large"].price >= 1.0
        assert states["small"].price == 0.0
    stats.report_leaving("large", False)
    assert stats.states()["large"].price == 0.0
    stats.report_leaving("large", True)
    monkeypatch.setattr(arm_stats, "LEAVING_S", 0.0)
    assert stats.states()["large"].price == 0.0
