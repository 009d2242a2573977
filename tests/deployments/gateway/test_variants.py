"""Variants of a model: arms of one application, by name and by `auto`, whole and streamed."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.models.report import ModelReport
from policies.constraints import Exclusion
from tests.support.engine_double import ANSWER, AT_ONCE, THOUGHT, EngineDouble
from tests.support.fakes import FakeModel, failing
from tests.support.gateway import Gateway, eventually

THINKS_NOT = {"chat_template_kwargs": {"enable_thinking": False}}
MODELS: dict[str, Any] = {
    "small": {"context_tokens": 512},
    "large": {
        "context_tokens": 512,
        "output_price_usd_per_million": 10,
        "variants": {
            "large-direct": THINKS_NOT,
            "large-brief": {"system_prompt": "Be brief.", "prior_quality": 0.4},
        },
    },
    "minilm": {"tasks": ["embed"], "context_tokens": 10_000},
}
ARMS = ("large", "large-direct", "large-brief")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A small model, and a large one with two variants."""
    gateway = Gateway(tmp_path_factory.mktemp("variants"), models=MODELS)
    with gateway.client:
        for name in ("small", "large"):
            gateway.deploy(name, {"engine_kwargs": {}})
        yield gateway


@pytest.fixture(autouse=True)
def plain(made: Gateway) -> None:
    """Each test begins with models that say their name."""
    for name in made.models:
        made.models[name] = FakeModel(name)
    made.ingress.dispatcher._methods.clear()


def explained(gateway: Gateway, answer: Any) -> dict[str, Any]:
    """The explanation of an answer's decision, with its outcome."""
    where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    eventually(lambda: gateway.client.get(where).json().get("outcome"))
    found: dict[str, Any] = gateway.client.get(where).json()
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_variant_is_asked_by_its_name(made: Gateway, stream: bool) -> None:
    """Its model's application gets its defaults, and the response, the explanation and the state have its name."""
    answer = made.chat(model="large-direct", stream=stream)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-router-model"] == "large-direct"
    (body,) = made.models["large"].calls
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    found = explained(made, answer)
    assert found["model"] == "large-direct"
    assert {row["arm"] for row in found["models"]} == {*MODELS, *ARMS}
    state = made.client.get("/v1/router/state").json()["models"]
    assert state["large-direct"]["variant_of"] == "large"
    assert state["large"]["variant_of"] is None
    assert state["large-direct"]["figures"]["answers"] >= 1
    assert state["large-direct"]["demand"] is None
    own = made.chat(model="large", stream=stream)
    assert own.headers["x-router-model"] == "large"
    assert "chat_template_kwargs" not in made.models["large"].calls[-1]


def test_the_list_of_models_has_the_variants(made: Gateway) -> None:
    """With the model of each as its parent; a variant of chats does no completion."""
    listed = made.client.get("/v1/models").json()["data"]
    parents = {card["id"]: card.get("parent") for card in listed}
    assert parents["large-direct"] == parents["large-brief"] == "large"
    assert parents["large"] is None and parents["small"] is None
    card = made.client.get("/v1/models/large-direct").json()
    assert card["id"] == "large-direct"
    body = {"model": "large-direct", "prompt": "What is it?"}
    refused = made.client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_auto_chooses_among_the_variants(made: Gateway, stream: bool) -> None:
    """Scores teach it that one variant is right where the model's own defaults and the small model are wrong."""

    async def says(_: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        async for item in made.models["large"]._say_name("chat", body):
            yield item

    made.models["large"].script = says
    chosen = []
    for _ in range(60):
        answer = made.chat(stream=stream)
        chosen.append(answer.headers["x-router-model"])
        score = {
            "decision_id": answer.headers["x-router-decision-id"],
            "score": float(chosen[-1] == "large-direct"),
        }
        assert made.client.post("/v1/feedback", json=score).status_code == 200
    assert chosen[-20:].count("large-direct") > 15
    assert len(made.models["large"].calls) == sum(name in ARMS for name in chosen)


@pytest.mark.parametrize("snapshot_max_age_s", [0.0, 3600.0])
@pytest.mark.parametrize(
    ("asked", "never"),
    [
        ({"reasoning_effort": "none"}, ["large", "large-brief"]),
        ({"reasoning_effort": "minimal"}, ["large", "large-brief"]),
        ({"reasoning_effort": "low"}, ["large-direct"]),
        ({"reasoning_effort": "medium"}, ["large-direct"]),
        ({"reasoning_effort": "high"}, ["large-direct"]),
        (THINKS_NOT, ["large", "large-brief"]),
        ({"chat_template_kwargs": {"enable_thinking": 0}}, ["large-direct"]),
        ({"chat_template_kwargs": {"language": "en"}}, []),
    ],
    ids=str,
)
def test_parameters_bound_the_eligible_variants(
    made: Gateway, asked: dict[str, Any], never: list[str], snapshot_max_age_s: float
) -> None:
    """An arm whose defaults the request contradicts is left out, with the reason; other models are not concerned."""
    made.tune(snapshot_max_age_s=snapshot_max_age_s)
    found = explained(made, made.chat(**asked))
    removed = {row["arm"]: row["removed_by"] for row in found["models"]}
    others = {
        name for name, why in removed.items() if Exclusion.of(why) is Exclusion.VARIANT
    }
    assert others == set(never)
    assert removed["small"] == ""
    parameter = next(iter(asked))
    assert all(parameter in removed[name] for name in never)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "asked", "answers"),
    [
        ("large", {"reasoning_effort": "none"}, "large-direct"),
        ("large", THINKS_NOT, "large-direct"),
        ("large", {"reasoning_effort": "high"}, "large"),
        ("large-direct", {"reasoning_effort": "minimal"}, "large-direct"),
        ("large-brief", {"reasoning_effort": "high"}, "large-brief"),
        ("small", {"reasoning_effort": "none"}, "small"),
    ],
    ids=str,
)
def test_a_models_name_stands_for_the_arm_that_its_parameters_ask_for(
    made: Gateway, name: str, asked: dict[str, Any], answers: str, stream: bool
) -> None:
    """So a client that switches thinking off for a model gets it, and the router learns of what it got."""
    by_name = made.chat(model=name, stream=stream, **asked)
    assert by_name.headers["x-router-model"] == answers, by_name.text
    allowed = made.chat(router={"models": [name]}, stream=stream, **asked)
    assert allowed.headers["x-router-model"] == answers


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("name", "asked", "param"),
    [
        ("large-direct", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("large-brief", THINKS_NOT, "chat_template_kwargs.enable_thinking"),
        (
            "large",
            {**THINKS_NOT, "reasoning_effort": "high"},
            "reasoning_effort",
        ),
    ],
    ids=str,
)
def test_a_contradiction_is_refused(
    made: Gateway, name: str, asked: dict[str, Any], param: str, named: bool
) -> None:
    """With the parameter, before a decision."""
    who: dict[str, Any] = {"model": name} if named else {"router": {"models": [name]}}
    answer = made.chat(**who, **asked)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] in (param, "chat_template_kwargs.enable_thinking")
    assert "large" in error["message"] and "leave it out" in error["message"]
    assert made.models["large"].calls == []


def test_the_clients_own_values_stay(made: Gateway) -> None:
    """A variant adds what it sets, and a system prompt stands before the client's."""
    variables = {"chat_template_kwargs": {"language": "en", "enable_thinking": False}}
    made.chat(model="large-direct", **variables)
    assert made.models["large"].calls[-1]["chat_template_kwargs"] == {
        "enable_thinking": False,
        "language": "en",
    }
    made.chat(model="large-brief")
    first, second = made.models["large"].calls[-1]["messages"]
    assert first == {"role": "system", "content": "Be brief."}
    assert second["role"] == "user"
    asked = [{"role": "system", "content": "Be kind."}, second]
    made.chat(model="large-brief", messages=asked)
    first, second = made.models["large"].calls[-1]["messages"]
    assert first["content"] == "Be brief.\n\nBe kind."


def test_variants_share_load_and_queue(made: Gateway) -> None:
    """Requests of one are load of the others, once in all; the model's queue is that of its variants."""
    client = made.ingress.router_client
    assert set(made.ingress.dispatcher.admission.queues) == set(MODELS)
    made.tune(snapshot_max_age_s=3600.0)
    client.in_flight["large"] += 5
    try:
        found = explained(made, made.chat(model="large-direct"))
    finally:
        client.in_flight["large"] -= 5
    loads = {row["arm"]: row["load"] for row in found["models"]}
    assert {loads[name] for name in ARMS} == {5.0} and loads["small"] == 0.0
    assert found["models"][0]["total_load"] == 5.0


def test_variants_share_the_circuit_breaker(made: Gateway) -> None:
    """Failures of one variant open it for all; another model answers `auto`, and never a variant of the broken one."""
    made.models["large"].script = failing(RuntimeError("broken"))
    made.tune(snapshot_max_age_s=3600.0)
    breaker = made.ingress.dispatcher.breakers["large"]
    only = {"models": ["large-direct", "large-brief", "small"]}
    for _ in range(40):
        assert made.chat(router=only).headers["x-router-model"] == "small"
        if not breaker.closed:
            break
        made.chat(model="large-direct")
    eventually(lambda: not breaker.closed)
    for name in ARMS:
        assert made.chat(model=name).status_code == 503
    found = explained(made, made.chat())
    removed = {row["arm"]: row["removed_by"] for row in found["models"]}
    for name in ARMS:
        assert Exclusion.of(removed[name]) is Exclusion.CIRCUIT_OPEN
    breaker._close()


def test_a_variant_that_does_not_think_lacks_the_capability(tmp_path: Path) -> None:
    """Qwen3 with thinking on and off: vLLM's own parsers read the answers of both, whole and streamed."""
    args = {"engine_kwargs": {"reasoning_parser": "qwen3"}}
    gateway = Gateway(tmp_path, models=MODELS)
    with gateway.client:
        gateway.deploy("large", args)
        client = gateway.ingress.router_client
        assert "thinking" in client.lacks("large-direct")
        assert "thinking" not in client.lacks("large-brief")
        double = EngineDouble(ANSWER, at_once=AT_ONCE)
        gateway.models["large"].script = double.script
        thought = gateway.chat(model="large", reasoning_effort="high")
        message = thought.json()["choices"][0]["message"]
        assert message["reasoning"].strip() == THOUGHT
        assert gateway.models["large"].calls[-1]["reasoning_effort"] == "high"
        wants = {"chat_template_kwargs": {"enable_thinking": True}}
        for _ in range(5):
            answer = gateway.chat(router={"models": list(ARMS)}, **wants)
            assert answer.headers["x-router-model"] in ("large", "large-brief")
        direct = gateway.chat(model="large", reasoning_effort="none")
        message = direct.json()["choices"][0]["message"]
        assert message["content"] == AT_ONCE and not message.get("reasoning")
        # the engine calls itself "double"; the answer has the name of the variant, as the header does
        assert direct.json()["model"] == "large-direct"
        assert thought.json()["model"] == "double"
        assert direct.headers["x-router-model"] == "large-direct"
        sent = gateway.models["large"].calls[-1]
        assert sent["chat_template_kwargs"] == {"enable_thinking": False}
        assert "reasoning_effort" not in sent
        streamed = gateway.chat(model="large-direct", stream=True)
        chunks = [
            json.loads(line[6:])
            for line in streamed.text.split("\n")
            if line.startswith("data: {")
        ]
        assert {chunk["model"] for chunk in chunks} == {"large-direct"}
        texts = [
            one["delta"].get("content") or ""
            for chunk in chunks
            for one in chunk["choices"]
        ]
        assert "".join(texts) == AT_ONCE


def test_lengths_and_times_are_learned_for_each_variant(tmp_path: Path) -> None:
    """One that answers in two tokens and one that takes a hundred differ in cost; the price is the model's."""

    async def long_or_short(
        _: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        tokens = 2 if "chat_template_kwargs" in body else 100
        payload = json.dumps({"choices": [{"message": {"content": "8"}}]})
        yield payload.encode(), ModelReport(7, tokens, "stop")

    gateway = Gateway(tmp_path, models=MODELS)
    with gateway.client:
        gateway.deploy("large", {"engine_kwargs": {}})
        gateway.models["large"].script = long_or_short
        for _ in range(30):
            for name in ("large", "large-direct"):
                assert gateway.chat(model=name).status_code == 200
        found: dict[str, Any] = {}

        def learned() -> bool:
            rows = explained(gateway, gateway.chat(model="small"))["models"]
            found.update({row["arm"]: row for row in rows})
            direct = found["large-direct"]["output_tokens"]
            return bool(4 * direct < found["large"]["output_tokens"])

        eventually(learned)
        assert found["large-direct"]["cost_usd"] < found["large"]["cost_usd"]
