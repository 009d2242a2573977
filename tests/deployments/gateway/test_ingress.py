"""The HTTP API over the real router, profiler and policy, with fake models and fake handles of Ray."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from deployments.gateway import ingress
from tests.support import clock
from tests.support.gateway import Gateway, eventually


def test_an_answer_of_auto_names_its_model(gateway: Gateway) -> None:
    """Every answer names the model, the decision and the policy version."""
    answer = gateway.chat()
    assert answer.status_code == 200
    assert (
        answer.json()["model"] == answer.headers["x-router-model"] in ("small", "large")
    )
    assert answer.headers["x-router-decision-id"].startswith("dec-")
    assert answer.headers["x-router-policy-version"] == "thompson-v0"
    assert answer.headers["x-router-fallback"] == "none"


def test_a_stream_passes_the_models_bytes_on(gateway: Gateway) -> None:
    """The bytes are unchanged, and the headers are those of a whole answer."""
    answer = gateway.chat(stream=True, model="large")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-router-model"] == "large"
    assert answer.text.endswith("data: [DONE]\n\n") and "I am " in answer.text


def test_the_model_gets_no_fields_of_the_router(gateway: Gateway) -> None:
    """The body for the model lacks `router` and `user`."""
    gateway.chat(
        model="small",
        temperature=0.5,
        router={"latency_weight": 1},
        user="me",
        max_tokens=9,
    )
    (body,) = gateway.models["small"].calls
    assert set(body) == {"messages", "temperature", "max_tokens", "stream"}


def test_an_explicit_model_bypasses_the_choice_but_is_recorded(
    gateway: Gateway,
) -> None:
    """The explanation says that the client named the model."""
    answer = gateway.chat(model="large")
    found = gateway.client.get(
        f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    ).json()
    assert (
        found["fallback"] == "forced"
        and "The client named the model large" in found["summary"]
    )
    assert gateway.client.get("/v1/router/state").json()["counts"]["forced"] == 1


def test_feedback_is_learned_once_and_explained(gateway: Gateway) -> None:
    """The first score is accepted, the second a duplicate; the explanation has profile, estimates, outcome, score."""
    decision_id = gateway.chat().headers["x-router-decision-id"]
    feedback = {"decision_id": decision_id, "score": 1.0, "source": "program"}
    statuses = [
        gateway.client.post("/v1/feedback", json=feedback).json()["status"]
        for _ in range(2)
    ]
    assert statuses == ["accepted", "duplicate"]
    where = f"/v1/router/decisions/{decision_id}"
    eventually(lambda: gateway.client.get(where).json()["outcome"] is not None)
    found = gateway.client.get(where).json()
    assert found["feedback"] == [{"source": "program", "score": 1.0}]
    assert (
        found["profile"]["kind"] == "arithmetic"
        and found["outcome"]["output_tokens"] == 2
    )
    chat = [m for m in found["models"] if not m["removed_by"]]
    assert {m["arm"] for m in chat} == {"small", "large"}
    assert sum(m["propensity"] for m in chat) == pytest.approx(1)
    assert "was chosen with probability" in found["summary"]


def test_embeddings_always_go_to_the_same_model(gateway: Gateway) -> None:
    """Embeddings of different models cannot be compared."""
    answers = [
        gateway.client.post("/v1/embeddings", json={"model": "auto", "input": "a"})
        for _ in range(5)
    ]
    assert {a.headers["x-router-model"] for a in answers} == {"minilm"}


def test_many_texts_may_together_be_longer_than_one_context(gateway: Gateway) -> None:
    """The model reads every text by itself, and refuses one that is too long."""
    texts = [f"text {i} " + "word " * 200 for i in range(100)]
    answer = gateway.client.post(
        "/v1/embeddings", json={"model": "auto", "input": texts}
    )
    assert answer.status_code == 200 and sum(map(len, texts)) > 10 * 10_000


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2], [3]]])
def test_token_ids_are_refused_with_what_to_send(gateway: Gateway, tokens: Any) -> None:
    """Token ids belong to another model's tokenizer. Nulls that OpenAI's clients send are accepted."""
    answer = gateway.client.post(
        "/v1/embeddings", json={"model": "auto", "input": tokens}
    )
    assert (
        answer.status_code == 400
        and "check_embedding_ctx_length=False" in answer.json()["error"]["message"]
    )
    nulls = {"encoding_format": None, "dimensions": None, "user": None, "stream": None}
    assert (
        gateway.client.post(
            "/v1/embeddings", json={"model": "auto", "input": ["a"], **nulls}
        ).status_code
        == 200
    )


def test_models_lists_arms_and_presets(gateway: Gateway) -> None:
    """The list has `auto`, the presets and the models; one model has a route of its own."""
    names = [card["id"] for card in gateway.client.get("/v1/models").json()["data"]]
    assert names == ["auto", "auto:fast", "small", "large", "minilm"]
    assert gateway.client.get("/v1/models/large").json()["object"] == "model"


MESSAGE = [{"role": "user", "content": "a"}]
BAD = [
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages.0.role"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
            ]
        },
        400,
        "messages.0.content",
    ),
    (
        {"model": "gpt-9"},
        404,
        "unknown model 'gpt-9'; choose one of: auto, auto:fast, small",
    ),
    ({"model": "auto:turbo"}, 404, "unknown model 'auto:turbo'"),
    ({"model": "minilm"}, 400, "does not do the task 'chat'"),
    ({"temperature": 9}, 400, "temperature"),
    ({"n": 10**9}, 400, "n:"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"stop": ["a"] * 9}, 400, "at most 4 items"),
    ({"temprature": 1}, 400, "unknown key 'temprature'"),
    ({"stream": "maybe"}, 400, "stream: "),
    ({"strict": True}, 400, "unknown key 'strict'"),
    ({"str": 1}, 400, "unknown key 'str'"),
    ({"body": 1}, 400, "unknown key 'body'"),
    ({"structured_outputs": {}}, 400, "structured_outputs: has one of json, regex"),
    ({"stream_options": {"x": 1}}, 400, "unknown key 'stream_options.x'"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a", "list[x]": 1}],
                }
            ]
        },
        400,
        "0.list[x]'",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}] * 2049},
        400,
        "at most 2048 items",
    ),
    ({"router": {"latency": 1}}, 400, "unknown key 'router.latency'"),
    (
        {"router": {"models": ["gpt"]}},
        400,
        "unknown model 'gpt'; choose from: small, large",
    ),
    ({"router": {"max_latency_s": 1e-9}}, 400, "is over the limit"),
    ({"router": {"max_cost": -1}}, 400, "router.max_cost"),
    (
        {"messages": [{"role": "user", "content": "x" * 4000}]},
        400,
        "the prompt is too long",
    ),
]


@pytest.mark.parametrize(("change", "status", "message"), BAD)
def test_bad_requests_say_what_to_change(
    gateway: Gateway, change: dict[str, Any], status: int, message: str
) -> None:
    """The error is a 4xx in OpenAI's shape, and no model is asked."""
    answer = gateway.chat(**change)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (
        set(error) == {"message", "type", "param", "code"}
        and message in error["message"]
    )
    assert not any(model.calls for model in gateway.models.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{bad", "not valid JSON"),
        (b"", "send a JSON object"),
        (b"[]", "send a JSON object"),
        (
            b'{"model": "auto", "messages": [{"role": "user", "content": "\\ud800"}]}',
            "hex escape",
        ),
        (b'{"decision_id": "a", "score": NaN}', "score"),
        (b"\xff\xfe", ""),
    ],
)
def test_bodies_that_are_no_requests_are_refused(
    gateway: Gateway, content: bytes, message: str
) -> None:
    """Broken JSON, no JSON, not an object, lone surrogates, NaN, not even UTF-8."""
    where = "/v1/feedback" if b"decision_id" in content else "/v1/chat/completions"
    answer = gateway.client.post(
        where, content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("application/vnd.me+json", 200),
        ("text/plain", 400),
        ("", 400),
    ],
)
def test_the_content_type_must_be_json(
    gateway: Gateway, kind: str, status: int
) -> None:
    """A web page of another site can make a browser send `text/plain` without a CORS preflight, but no JSON."""
    content = b'{"model": "auto", "messages": [{"role": "user", "content": "Hello"}]}'
    answer = gateway.client.post(
        "/v1/chat/completions", content=content, headers={"content-type": kind}
    )
    assert answer.status_code == status
    assert (
        status == 200
        or "content-type: application/json" in answer.json()["error"]["message"]
    )


@pytest.mark.parametrize("score", [1.5, -0.1, "1", "nan", None, True])
def test_scores_out_of_range_are_refused(gateway: Gateway, score: Any) -> None:
    """A score must be a number in [0, 1]."""
    decision_id = gateway.chat().headers["x-router-decision-id"]
    answer = gateway.client.post(
        "/v1/feedback", json={"decision_id": decision_id, "score": score}
    )
    assert answer.status_code == 400 and "score" in answer.json()["error"]["message"]


def test_unknown_decisions_are_not_found(gateway: Gateway) -> None:
    """Feedback and explanations give a 404."""
    answers = [
        gateway.client.post(
            "/v1/feedback", json={"decision_id": "dec-0", "score": 1.0}
        ),
        gateway.client.get("/v1/router/decisions/dec-0"),
    ]
    assert [a.status_code for a in answers] == [404, 404]
    assert all("x-router-decision-id" in a.json()["error"]["message"] for a in answers)


@pytest.mark.parametrize("text", ["a\x00b", "a\n", "a" * 65])
def test_an_impossible_decision_id_is_not_looked_up(
    gateway: Gateway, text: str
) -> None:
    """A database may fail on control characters."""
    gateway.router.broken = True
    answer = gateway.client.post(
        "/v1/feedback", json={"decision_id": text, "score": 1.0}
    )
    assert (
        answer.status_code == 400 and answer.json()["error"]["param"] == "decision_id"
    )
    assert gateway.client.get(f"/v1/router/decisions/{quote(text)}").status_code == 404


def test_unknown_paths_and_methods_have_openais_shape_too(gateway: Gateway) -> None:
    """The routes of the framework give 404 and 405 in the same shape."""
    assert (
        gateway.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    )
    assert gateway.client.delete("/v1/models").status_code == 405


def test_health_and_readiness(gateway: Gateway) -> None:
    """The gateway is ready if one model is ready, or with `models=all` every model; also while the router is down."""

    def status(path: str) -> int:
        return int(gateway.client.get(path).status_code)

    assert (
        status("/healthz") == status("/readyz") == status("/readyz?models=all") == 200
    )
    gateway.replicas["small"] = 0
    eventually(lambda: status("/readyz?models=all") == 503)
    assert status("/readyz") == 200
    gateway.router.broken = True
    assert status("/readyz") == 200
    gateway.router.broken = False
    gateway.replicas |= dict.fromkeys(gateway.replicas, 0)
    eventually(lambda: status("/readyz") == 503)


def test_a_gateway_whose_models_are_scaled_to_zero_is_ready(gateway: Gateway) -> None:
    """A load balancer must send it requests, because they start the models; a start waits for no model at zero."""

    def status(path: str) -> int:
        return int(gateway.client.get(path).status_code)

    gateway.replicas["large"] = 0
    eventually(lambda: status("/readyz?models=all") == 503)
    gateway.watch.targets["large"] = 0
    eventually(lambda: status("/readyz?models=all") == 200)
    gateway.replicas |= dict.fromkeys(gateway.replicas, 0)
    eventually(lambda: status("/readyz") == 200 != status("/readyz?models=all"))
    gateway.watch.targets |= dict.fromkeys(gateway.replicas, 0)
    eventually(lambda: status("/readyz?models=all") == 200)
    assert gateway.chat().status_code == 503
    # wanted, and not there yet
    gateway.watch.targets |= dict.fromkeys(gateway.replicas, 1)
    eventually(lambda: status("/readyz") == 503)


@pytest.mark.parametrize("away", [False, True])
def test_a_stopped_ingress_reports_its_last_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """Serve stops the ingress; it waits for a router that is down no longer than REPORT_TIMEOUT_S."""
    monkeypatch.setattr(ingress, "REPORT_TIMEOUT_S", 0.5)
    gateway = Gateway(tmp_path)

    async def run() -> tuple[float, Any]:
        async with gateway.at_once() as client:
            await gateway.ingress.__del__()  # no outcomes are queued
            body = {"model": "auto", "messages": [{"role": "user", "content": "Why?"}]}
            answer = await client.post("/v1/chat/completions", json=body)
            gateway.router.broken = away
            began = asyncio.get_running_loop().time()
            await gateway.ingress.__del__()
            took_s = asyncio.get_running_loop().time() - began
            gateway.router.broken = False
            return took_s, (
                await gateway.router.thing.record(
                    answer.headers["x-router-decision-id"]
                )
            ).outcome

    took_s, outcome = clock.run(run())
    assert took_s <= 0.5 + 0.01 and (outcome is None) == away


def test_the_static_policy_can_be_selected(tmp_path: Path) -> None:
    """Simple prompts go to the small model and complex ones to the large; the explanation names the rule."""
    made = Gateway(tmp_path, policy="static")
    with made.client:
        simple = made.chat(messages=[{"role": "user", "content": "hello"}])
        text = "Explain why 384 times 27 and then 9 more is 10377, and prove each step in Python code."
        complex_task = made.chat(messages=[{"role": "user", "content": text}])
        found = made.client.get(
            f"/v1/router/decisions/{simple.headers['x-router-decision-id']}"
        ).json()
    assert (
        simple.headers["x-router-model"] == "small"
        and complex_task.headers["x-router-model"] == "large"
    )
    assert "rule 'static-v0'" in found["summary"]
