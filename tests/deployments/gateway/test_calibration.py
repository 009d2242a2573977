"""A whole calibration on the gateway in this process: answers, learning, resumption, budget, cancellation, access."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.access.api_keys import add
from deployments.calibration import run as calibration_run
from deployments.gateway import calibration_routes
from deployments.models.report import ModelReport
from policies.events import CALIBRATION, Decision, Feedback, Outcome
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually

PATH = "/v1/router/calibrations"
Script = Callable[[str, dict[str, Any]], AsyncIterator[tuple[bytes, Any]]]


def prompts(count: int, **fields: Any) -> list[dict[str, Any]]:
    given = {"reference": "large", **fields}
    return [{"prompt": f"What is {i} plus 10?", **given} for i in range(count)]


def start(gateway: Gateway, count: int, **body: Any) -> dict[str, Any]:
    """Start a calibration; each size answers with its own name, so the references make large right and small wrong."""
    given = {"prompts": prompts(count), **body}
    reply = gateway.client.post(PATH, json=given)
    assert reply.status_code == 202, reply.text
    return dict(reply.json())


def status(gateway: Gateway) -> dict[str, Any]:
    return dict(gateway.client.get(PATH, params={"report": False}).json())


def run(gateway: Gateway, count: int, **body: Any) -> dict[str, Any]:
    """A whole calibration; returns it with its report."""
    start(gateway, count, **body)
    eventually(lambda: status(gateway)["state"] != "running")
    return dict(gateway.client.get(PATH).json())


def events(gateway: Gateway) -> list[Any]:
    return [event for _, event in gateway.router.thing._journal.replay()]


def calls(gateway: Gateway) -> dict[str, int]:
    return {name: len(gateway.models[name].calls) for name in ("small", "large")}


def scores(found: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """By size, its mean score over all kinds and the number of scores."""
    return {
        figures["arm"]: (figures["score"]["mean"], figures["score"]["n"])
        for figures in found["report"]["figures"]
        if figures["kind"] == "all"
    }


async def never(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
    """A model that does not answer."""
    await asyncio.Event().wait()
    yield b"", None


def test_every_size_answers_every_prompt_and_the_report_compares_them(
    gateway: Gateway,
) -> None:
    """The embedding model is not asked. The report has scores, tokens and costs."""
    found = run(gateway, 6)
    assert found["state"] == "finished" and found["calls"] == 12
    assert calls(gateway) == {"small": 6, "large": 6}
    assert gateway.models["minilm"].calls == []
    assert scores(found) == {"small": (0.0, 6), "large": (1.0, 6)}
    report = found["report"]
    assert report["arms"] == ["small", "large"] and report["best"]["all"] == "large"
    large = report["figures"][1]
    assert large["output_tokens"]["mean"] == 2.0
    assert large["cost_usd"]["mean"] == pytest.approx(2e-5)
    assert found["spent_usd"] == pytest.approx(6 * 2e-5 + 6 * 2e-6)
    body = gateway.models["small"].calls[0]
    assert body["temperature"] == 0.0 and "max_tokens" not in body


def test_its_answers_are_decisions_that_nothing_drew(gateway: Gateway) -> None:
    """Each has the propensity 1/K for each size, an outcome, and a score; the explanation says so."""
    run(gateway, 3)
    made = [event for event in events(gateway) if isinstance(event, Decision)]
    assert len(made) == 6 and {decision.fallback for decision in made} == {CALIBRATION}
    for decision in made:
        propensities = {e.arm: e.propensity for e in decision.estimates}
        assert propensities == {"small": 0.5, "large": 0.5, "minilm": 0.0}
        eligible = [e.arm for e in decision.estimates if not e.removed_by]
        assert eligible == ["small", "large"] == [*decision.objective.models]
        assert decision.scored == 0 and decision.prompt == "" and decision.prompt_hash
        assert decision.estimate().latency_s > 0
    outcomes = [event for event in events(gateway) if isinstance(event, Outcome)]
    assert {outcome.decision_id for outcome in outcomes} == {d.id for d in made}
    given = [event for event in events(gateway) if isinstance(event, Feedback)]
    assert {score.source for score in given} == {CALIBRATION} and len(given) == 6
    explained = gateway.client.get(f"/v1/router/decisions/{made[0].id}").json()
    assert "No client asked" in explained["summary"]


def test_a_decision_says_how_much_was_known_of_its_size(gateway: Gateway) -> None:
    """Large had five scores before, small none: the drift detector needs the number of the size that answered."""
    run(gateway, 5, models=["large"])
    local = gateway.ingress.router_client._local_policy
    eventually(lambda: local.drift.known[1] == 5)
    before = len(events(gateway))
    run(gateway, 2, fresh=True)
    for decision in events(gateway)[before:]:
        if isinstance(decision, Decision):
            assert (decision.known >= 5) == (decision.arm == "large")


def test_it_teaches_but_is_no_traffic(gateway: Gateway) -> None:
    """Quality, availability and latency are learned; the clock of scores, shares and the budget stay as they were."""
    router = gateway.router.thing
    before = router._policy.state()
    run(gateway, 8)
    after = router._policy.state()
    assert after["quality.count"].sum() == pytest.approx(16)
    assert (after["availability.window"][:2, :, 2].sum(axis=1) == 8).all()
    for part in ("ttft", "tpot", "tokens"):
        assert any(
            not (before[name] == after[name]).all()
            for name in after
            if name.startswith(f"{part}.") and before[name].shape == after[name].shape
        ), part
    decision = next(e for e in events(gateway) if isinstance(e, Decision))
    quality, _ = router._policy.members["champion"].quality.predict(
        decision.profile.features[None]
    )
    assert quality[0, 1] > quality[0, 0] + 0.2
    assert router._learner.records.scored == 0
    state = gateway.client.get("/v1/router/state").json()
    counts = state["counts"]
    assert counts["calibration"] == 16 and counts["routed"] == counts["forced"] == 0
    assert {model["share"] for model in state["models"].values()} == {None}
    assert state["budget"]["mean_cost_usd"] == 0.0
    assert state["models"]["large"]["figures"]["votes"] == 0
    assert router._projections.scoring_rates.rates() == {}
    assert router._projections.pacer.requests == 0
    assert not any(gateway.ingress.router_client.in_flight.values())


def test_a_second_call_goes_on_where_the_first_one_stopped(gateway: Gateway) -> None:
    """Answers that exist are not asked again, and belong to the report; `fresh` asks them again."""
    first = run(gateway, 10, max_calls=7)
    assert first["state"] == "over budget" and first["calls"] == 7
    assert sum(calls(gateway).values()) == 7
    second = run(gateway, 10)
    assert second["state"] == "finished" and second["reused"] == 7
    assert calls(gateway) == {"small": 10, "large": 10}
    assert scores(second) == {"small": (0.0, 10), "large": (1.0, 10)}
    third = run(gateway, 10)
    assert third["calls"] == 0 and third["reused"] == 20
    assert scores(third) == scores(second)
    run(gateway, 3, fresh=True)
    assert calls(gateway) == {"small": 13, "large": 13}


def test_a_size_is_calibrated_alone_and_compared_with_the_others(
    gateway: Gateway,
) -> None:
    """Only the new size is asked; the report has the answers of the other one, too."""
    run(gateway, 4, models=["large"])
    found = run(gateway, 4, models=["small"])
    assert calls(gateway) == {"small": 4, "large": 4}
    assert set(found["models"]) == {"small"}
    assert scores(found) == {"small": (0.0, 4), "large": (1.0, 4)}


def test_the_budget_in_dollars_is_kept(gateway: Gateway) -> None:
    """Large may need 10 tokens of 0.00001 USD for an answer, so after the first answers the rest is not asked."""
    found = run(
        gateway, 0, prompts=prompts(20, max_tokens=10), models=["large"], max_usd=2.5e-4
    )
    assert found["state"] == "over budget" and "USD" in found["reason"]
    assert 1 < len(gateway.models["large"].calls) < 20
    assert found["spent_usd"] <= 2.5e-4


def test_the_answers_survive_a_restart_of_the_router(
    gateway: Gateway, tmp_path: Path
) -> None:
    """State and report come from the journal. A calibration that ran is interrupted; the same prompts continue it."""
    found = run(gateway, 5)
    assert gateway.client.portal is not None
    gateway.client.portal.call(gateway.router.thing._journal.flush)
    again = Gateway(tmp_path)
    again.models["large"].script = never
    with again.client:
        after = again.client.get(PATH).json()
        assert after["state"] == "finished" and after["report"] == found["report"]
        start(again, 7)
        eventually(lambda: status(again)["models"]["small"]["answered"] == 7)
        third = Gateway(tmp_path)
    with third.client:
        stopped = status(third)
        assert stopped["state"] == "interrupted" and "again" in stopped["reason"]
        end = run(third, 7)
        assert end["state"] == "finished" and end["reused"] == 12
        assert calls(third) == {"small": 0, "large": 2}
        assert scores(end) == {"small": (0.0, 7), "large": (1.0, 7)}


def test_a_calibration_is_cancelled(gateway: Gateway) -> None:
    """Calls that are under way are cancelled, and what was answered stays; the same prompts go on from there."""
    gateway.models["large"].script = never
    start(gateway, 3)
    eventually(lambda: status(gateway)["models"]["small"]["answered"] == 3)
    eventually(lambda: len(gateway.models["large"].calls) == 2)
    ended = gateway.client.delete(PATH).json()
    assert ended["state"] == "cancelled" and "operator" in ended["reason"]
    eventually(lambda: gateway.models["large"].cancelled == 2)
    eventually(lambda: not any(gateway.ingress.router_client.in_flight.values()))
    gateway.models["large"].script = None
    found = run(gateway, 3)
    assert found["state"] == "finished" and found["reused"] == 3
    assert len(gateway.models["small"].calls) == 3


def test_only_one_calibration_runs_at_a_time(gateway: Gateway) -> None:
    """The same order is answered with the run that is under way, another one with a 409."""
    gateway.models["large"].script = never
    one = start(gateway, 3)
    assert start(gateway, 3)["run_id"] == one["run_id"]
    other = gateway.client.post(PATH, json={"prompts": prompts(4)})
    assert other.status_code == 409 and "cancel it" in other.json()["error"]["message"]
    gateway.client.delete(PATH)


def test_a_busy_size_is_not_asked_until_it_has_been_idle(gateway: Gateway) -> None:
    """Large has two slots and one request of a client; small finishes meanwhile, and the state says who waits."""
    released = asyncio.Event()

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        if body.get("stream"):
            yield b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', None
            await released.wait()
            yield b"data: [DONE]\n\n", ModelReport(7, 2, "stop")
        else:
            async for item in gateway.models["large"]._say_name(task, body):
                yield item

    gateway.models["large"].script = script
    gateway.tune(admission={"max_running": 2})

    async def client() -> None:
        await gateway.ingress.dispatcher.admission.queues["large"].enter(1)

    assert gateway.client.portal is not None
    gateway.client.portal.call(client)
    start(gateway, 3)
    eventually(lambda: status(gateway)["models"]["small"]["answered"] == 3)
    assert status(gateway)["models"]["large"]["waiting"]
    assert gateway.models["large"].calls == []
    queue = gateway.ingress.dispatcher.admission.queues["large"]

    async def leave() -> None:
        queue.leave(None)

    gateway.client.portal.call(leave)
    eventually(lambda: status(gateway)["state"] == "finished")
    assert len(gateway.models["large"].calls) == 3


def test_failed_answers_are_recorded_and_asked_again_next_time(
    gateway: Gateway,
) -> None:
    """An error is news of the availability, and no score; the next call tries it again."""
    gateway.models["small"].script = failing(RuntimeError("broken"))
    found = run(gateway, 3)
    assert found["models"]["small"]["failed"] == 3
    assert scores(found)["small"] == (0.0, 3)
    assert gateway.router.thing._policy.state()["quality.count"][0] == 0
    gateway.models["small"].script = None
    found = run(gateway, 3, prompts=prompts(3, reference="large"))
    assert found["reused"] == 3 and found["calls"] == 3
    assert found["models"]["small"]["failed"] == 0
    assert len(gateway.models["large"].calls) == 3


def test_the_judge_grades_what_has_no_reference(gateway: Gateway) -> None:
    """The largest model judges, although no judge is configured; its calls count as calls."""

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        asked = body["messages"][0]["content"]
        content = "a good answer"
        if "Grade the answer" in asked:
            content = "9" if "a good answer" in asked else "2"
        payload = {"choices": [{"message": {"content": content}}]}
        yield json.dumps(payload).encode(), ModelReport(7, 2, "stop")

    gateway.models["large"].script = script
    questions = [{"prompt": f"Why is {i} odd?"} for i in (1, 3)]
    found = run(gateway, 0, prompts=questions)
    assert scores(found) == {"small": (0.2, 2), "large": (0.9, 2)}
    assert found["calls"] == 8 and len(gateway.models["large"].calls) == 6
    counts = gateway.client.get("/v1/router/state").json()["counts"]
    assert counts["calibration"] == 4 and counts["routed"] == counts["forced"] == 0


def test_the_clients_program_grades(gateway: Gateway) -> None:
    """The answers wait for their scores, with prompt and reference; unknown ids are ignored."""
    start(gateway, 2, by_program=True)
    eventually(lambda: status(gateway)["ungraded"] == 4)
    waiting = gateway.client.get(f"{PATH}/answers").json()["answers"]
    assert {answer["answer"] for answer in waiting} == {"small", "large"}
    assert waiting[0]["prompt"].startswith("What is") and waiting[0]["reference"]
    given = [
        {"decision_id": a["decision_id"], "score": 0.25 if a["model"] == "small" else 1}
        for a in waiting
    ]
    given.append({"decision_id": "dec-unknown", "score": 0.0})
    reply = gateway.client.post(f"{PATH}/scores", json={"scores": given})
    assert reply.json() == {"graded": 4}
    found = gateway.client.get(PATH).json()
    assert found["state"] == "finished"
    assert scores(found) == {"small": (0.25, 2), "large": (1.0, 2)}
    assert gateway.router.thing._learner.records.scored == 0


def test_another_ingress_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ingress that was ordered is gone after some answers. The other one finds the work, and the tasks it had."""
    monkeypatch.setattr(calibration_run, "LEASE_S", 1.0)
    one = Gateway(tmp_path)
    two = Gateway(tmp_path / "two")
    two.router, two.models = one.router, one.models

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        await asyncio.sleep(0.1)
        payload = {"choices": [{"message": {"content": "large"}}]}
        yield json.dumps(payload).encode(), ModelReport(7, 2, "stop")

    for name in ("small", "large"):
        one.models[name].script = script

    async def play() -> dict[str, Any]:
        async with one.at_once() as first, two.at_once() as second:
            body = {"prompts": prompts(20), "concurrency": 1}
            assert (await first.post(PATH, json=body)).status_code == 202
            worker = one.ingress.calibration
            while len(one.models["large"].calls) < 3:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(worker, "start", lambda: None)
            for task in (worker._loop, *worker._running.values()):
                task.cancel()
            while (await second.get(PATH)).json()["state"] == "running":
                await asyncio.sleep(0.1)
            return dict((await second.get(PATH)).json())

    found = asyncio.run(play())
    assert scores(found) == {"small": (1.0, 20), "large": (1.0, 20)}
    assert 20 <= min(calls(one).values()) <= max(calls(one).values()) <= 21


def test_only_operators_may_calibrate(tmp_path: Path) -> None:
    """A key without the scope `operate` gets a 403 on each route."""
    keys = tmp_path / "keys.json"
    headers = {}
    for name, scope in (("client", "infer"), ("user", "feedback"), ("op", "operate")):
        headers[name] = {"authorization": f"Bearer {add(keys, name, (scope,))}"}
    made = Gateway(tmp_path, keys={"file": str(keys)})
    body = {"prompts": prompts(2)}
    routes = (
        ("POST", PATH, body),
        ("GET", PATH, None),
        ("DELETE", PATH, None),
        ("GET", f"{PATH}/answers", None),
        ("POST", f"{PATH}/scores", {"scores": [{"decision_id": "a", "score": 1}]}),
    )
    with made.client as client:
        for method, path, content in routes:
            assert client.request(method, path, json=content).status_code == 401
            for name in ("client", "user"):
                reply = client.request(
                    method, path, json=content, headers=headers[name]
                )
                assert reply.status_code == 403, (method, path, name)
        reply = client.post(PATH, json=body, headers=headers["op"])
        assert reply.status_code == 202

        def over() -> bool:
            found = client.get(PATH, headers=headers["op"]).json()
            return bool(found["state"] == "finished")

        eventually(over)
        reply = client.delete(PATH, headers=headers["op"])
        assert reply.json()["state"] == "finished"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": prompts(2001)}, "prompts"),
        ({"prompts": [{"promt": "a"}]}, "unknown key 'prompts.0.promt'"),
        ({"prompts": prompts(1), "models": ["small", "small"]}, "named twice"),
        ({"prompts": [{"prompt": "a", "reference": "(", "grade": "regex"}]}, "regular"),
        ({"prompts": prompts(1), "max_calls": 0}, "max_calls"),
        ({"prompts": prompts(1), "concurrency": 1000}, "concurrency"),
    ],
)
def test_a_wrong_order_is_refused(
    gateway: Gateway, body: dict[str, Any], words: str
) -> None:
    """The error says what is wrong, and no model is asked."""
    reply = gateway.client.post(PATH, json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"], reply.text
    assert calls(gateway) == {"small": 0, "large": 0}


def test_a_model_that_does_not_chat_is_refused(gateway: Gateway) -> None:
    """The error names those that do."""
    for name in ("minilm", "missing"):
        reply = gateway.client.post(
            PATH, json={"prompts": prompts(1), "models": [name]}
        )
        assert reply.status_code == 409
        assert "choose from: small, large" in reply.json()["error"]["message"]


def test_before_the_first_calibration_there_is_nothing_to_show(
    gateway: Gateway,
) -> None:
    """Nor to cancel, and no answers to grade."""
    found = gateway.client.get(PATH).json()
    assert found["state"] == "none" and found["report"] is None
    assert gateway.client.delete(PATH).json()["state"] == "none"
    assert gateway.client.get(f"{PATH}/answers").json() == {"answers": []}
    scores = {"scores": [{"decision_id": "dec-1", "score": 1.0}]}
    reply = gateway.client.post(f"{PATH}/scores", json=scores)
    assert reply.json() == {"graded": 0}


def test_no_text_is_stored(gateway: Gateway, tmp_path: Path) -> None:
    """Neither prompts nor references nor answers are in the journal, unless `store_text` is on."""
    secret = "the answer of fort knox"
    run(gateway, 0, prompts=[{"prompt": secret, "reference": secret}])
    written = b"".join(file.read_bytes() for file in tmp_path.glob("journal.db*"))
    assert secret.encode() not in written


@pytest.mark.parametrize(
    ("reference", "grade", "param"),
    [
        ("(", "regex", "prompts.1.reference"),
        ("(" * 20 + "a" + "){2}" * 20, "regex", "prompts.1"),
        ("[" * 3_000, "json", "prompts.1"),
        ("9" * 400, "number", "prompts.1"),
    ],
)
def test_a_reference_that_cannot_be_used_starts_nothing(
    gateway: Gateway, reference: str, grade: str, param: str
) -> None:
    """The error names the prompt; patterns that explode in the compiler and deep JSON are refused before they cost."""
    given = [*prompts(1), *prompts(1, reference=reference, grade=grade)]
    answer = gateway.client.post(PATH, json={"prompts": given})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert status(gateway)["state"] != "running"


def test_patterns_have_a_limit_of_time_together(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many patterns, each of them allowed, do not occupy the gateway for long."""
    monkeypatch.setattr(calibration_routes, "MAX_PATTERNS_S", -1.0)
    given = prompts(3, reference="(a|b){1,9}", grade="regex")
    answer = gateway.client.post(PATH, json={"prompts": given})
    assert answer.status_code == 400 and "too long to compile" in answer.text


def test_a_variant_is_calibrated_like_a_model(tmp_path: Path) -> None:
    """Its model's application answers the prompts once more, with the variant's defaults."""
    variants = {"large-direct": {"chat_template_kwargs": {"enable_thinking": False}}}
    models = {"small": {}, "large": {"variants": variants}}
    gateway = Gateway(tmp_path, models=models)
    with gateway.client:
        gateway.deploy("large", {"engine_kwargs": {}})
        found = run(gateway, 4)
    assert calls(gateway) == {"small": 4, "large": 8}
    bodies = gateway.models["large"].calls
    assert sum("chat_template_kwargs" in body for body in bodies) == 4
    assert scores(found)["large-direct"] == (1.0, 4)
