"""Bad input and hostile clients: every answer is a clear 4xx in OpenAI's shape that reveals no internals."""

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deployments.access import middleware
from deployments.models.report import failure
from tests.support.fakes import failing
from tests.support.gateway import Gateway, eventually
from tests.support.hostile_input import (
    ASK,
    CORPUS,
    JSON,
    chunks,
    fuzz,
    openai_shape,
    tool,
    with_,
)

CASES = int(os.environ.get("ROUTER_FUZZ_CASES", "300"))
INSIDES = re.compile(
    r"Traceback|File \"|\.py\b|Error\b(?<!\"server_error)|/work|/usr|site-packages|secret detail|0x[0-9a-f]+"
)


@pytest.mark.parametrize("name", CORPUS)
def test_each_hostile_body_is_refused(gateway: Gateway, name: str) -> None:
    """Each body gets its 4xx, no model is asked, and the answer does not repeat the body."""
    content, status = CORPUS[name]
    answer = gateway.client.post("/v1/chat/completions", content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    assert (
        openai_shape(answer.json())
        and len(answer.text) < 1_000
        and not INSIDES.search(answer.text)
    )
    assert not any(model.calls for model in gateway.models.values())


def test_a_body_without_a_content_length_is_limited(gateway: Gateway) -> None:
    """It is refused as soon as it is too large. A content-length that is no number is refused, too."""
    answer = gateway.client.post(
        "/v1/chat/completions", content=chunks(2**24), headers=JSON
    )
    assert (
        answer.status_code == 413
        and answer.json()["error"]["code"] == "request_too_large"
    )
    for length in ("9" * 30, "-1", "1e3"):
        answer = gateway.client.post(
            "/v1/chat/completions",
            content=b"{}",
            headers={**JSON, "content-length": length},
        )
        assert answer.status_code == 413


def test_a_slow_body_is_refused(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that is not complete after BODY_TIMEOUT_S gets a 408."""
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.05)
    app: Any = gateway.client.app
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"",
        "query_string": b"",
    }
    scope |= {
        "headers": [],
        "root_path": "",
        "scheme": "http",
        "server": ("a", 80),
        "http_version": "1.1",
    }
    assert gateway.client.portal is not None
    gateway.client.portal.call(app, scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 408 and openai_shape(json.loads(sent[1]["body"]))


COMMON: dict[str, Any] = {
    "service_tier": "auto",
    "store": False,
    "metadata": {"a": "b"},
    "user": "me",
    "safety_identifier": "me",
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"ttl": "30m"},
    "prediction": {"type": "content", "content": "a"},
    "moderation": {"model": "a"},
    "stream": None,
    "top_logprobs": 20,
    "modalities": ["text"],
    "reasoning_effort": "low",
    "verbosity": "low",
    "parallel_tool_calls": True,
    "stream_options": {"include_usage": None, "include_obfuscation": False},
    "logit_bias": {"50256": -100},
    "n": 1,
    "stop": ["\n"],
    "tools": [
        tool({"type": "string", "pattern": "^[a-z]{1,255}$"}),
        tool({"description": "слово " * 3_000}),
    ],
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "a",
            "strict": True,
            "schema": {"enum": ["{200}" * i for i in range(30)]},
        },
    },
    "messages": [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
        },
        {
            "role": "assistant",
            "content": "b",
            "reasoning": "d",
            "reasoning_content": "d",
        },
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ],
}


@pytest.mark.parametrize("field", COMMON)
def test_fields_that_openais_clients_commonly_send_are_accepted(
    gateway: Gateway, field: str
) -> None:
    """Fields without a meaning here do not reach the models."""
    body = {**ASK, "stream": field == "stream_options", field: COMMON[field]}
    if field == "top_logprobs":
        body["logprobs"] = True
    answer = gateway.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (call,) = [call for model in gateway.models.values() for call in model.calls]
    known = {
        "messages",
        "stream",
        "stream_options",
        "logit_bias",
        "n",
        "stop",
        "parallel_tool_calls",
    }
    known |= {"tools", "response_format", "top_logprobs", "logprobs"}
    known |= {"reasoning_effort"}
    if field in ("tools", "response_format"):
        assert call[field] == COMMON[field]
    told = json.dumps(call["messages"])
    assert set(call) <= known and not re.search("refusal|reasoning", told)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-request-id": "a" * 5_000},
        {"x-request-id": "\x1b[31m fake log line"},
        {"x-request-id": b"\xff"},
        {"x-request-timeout-seconds": "nan"},
        {"x-router-decision-id": "dec-0", "x-router-model": "large"},
        {"authorization": "Bearer " + "x" * 10_000},
        {"content-type": "application/json; charset=utf-7"},
        {"content-encoding": "gzip"},
        {"transfer-encoding": "x"},
        {"x" * 1_000: "y" * 10_000},
    ],
)
def test_hostile_headers_change_nothing(
    gateway: Gateway, headers: dict[str, Any], caplog: Any
) -> None:
    """No 5xx, no header in the log, and the client cannot set the router's own headers."""
    gateway.models["small"].script = failing(RuntimeError())
    with caplog.at_level(logging.INFO):
        answer = gateway.client.post(
            "/v1/chat/completions", content=with_(), headers={**JSON, **headers}
        )
    assert answer.status_code in (200, 400)
    assert answer.headers.get("x-router-decision-id", "dec-") != "dec-0"
    assert "fake log line" not in caplog.text and "aaaaaaaa" not in caplog.text


async def engine_error(
    task: str, body: dict[str, Any]
) -> AsyncIterator[tuple[bytes, Any]]:
    """What ModelServer yields for a failure in the middle of a stream."""
    yield b"data: 1\n\n", None
    yield b"", failure("secret detail in /usr/lib/x.py", 500)


class LeakyError(RuntimeError):
    """An error whose message holds a prompt and a path, which must not be shown."""

    def __init__(self) -> None:
        super().__init__(
            f"secret detail: {ASK['messages'][0]['content']} in /usr/lib/python3/x.py"
        )


def test_errors_reveal_no_internals(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """For a failure at any place the client gets a clean error, and the log has no word of the prompt."""

    def explode(*_: Any, **__: Any) -> Any:
        raise LeakyError

    ingress = gateway.ingress
    bodies = []
    with caplog.at_level(logging.DEBUG, logger="deployments"):
        for after in (0, 2):
            gateway.models["large"].script = failing(LeakyError(), after=after)
            bodies += [
                gateway.chat(model="large").text,
                gateway.chat(model="large", stream=True).text,
            ]
            gateway.tune(breaker={"failure_threshold": 1000})
        gateway.models["large"].script = engine_error
        bodies.append(gateway.chat(model="large", stream=True).text)
        gateway.models["large"].script = None
        places = [
            (ingress.router_client, "profile"),
            (ingress.router_client, "decide"),
            (ingress.dispatcher, "check"),
            (ingress.dispatcher, "ask"),
            (ingress.dispatcher, "finish"),
            (ingress, "_objective"),
            (ingress.relay, "_outcome"),
            (ingress.relay, "_stream"),
        ]
        for thing, name in places:
            with monkeypatch.context() as patch:
                patch.setattr(thing, name, explode)
                for stream in (False, True):
                    answer = gateway.chat(model="large", stream=stream)
                    bodies.append(answer.text)
        with monkeypatch.context() as patch:
            patch.setattr(type(gateway.router.thing), "feedback", explode)
            bodies.append(
                gateway.client.post(
                    "/v1/feedback", json={"decision_id": "dec-1", "score": 1}
                ).text
            )
            patch.setattr(type(gateway.router.thing), "record", explode)
            bodies.append(gateway.client.get("/v1/router/decisions/dec-1").text)
            patch.setattr(type(gateway.router.thing), "summary", explode)
            bodies.append(gateway.client.get("/v1/router/state").text)
    assert len(bodies) >= 20
    leaks = [body for body in bodies if INSIDES.search(body) or "What is 3" in body]
    assert leaks == []
    assert "secret detail" not in caplog.text and "What is 3" not in caplog.text


def test_internal_errors_free_their_slots(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the gateway's own code, in the middle of an answer, also frees the slot."""

    def explode(*_: Any, **__: Any) -> Any:
        raise LeakyError

    with monkeypatch.context() as patch:
        patch.setattr(gateway.ingress.relay, "_outcome", explode)
        for stream in (False, True):
            gateway.chat(model="large", stream=stream)
    assert gateway.ingress.dispatcher.admission.in_flight_total == 0
    assert not any(gateway.ingress.router_client.in_flight.values())


def test_no_prompt_or_answer_is_stored(tmp_path: Path, caplog: Any) -> None:
    """A canary in prompts, system messages, tools, bad requests and broken answers is in no log and no file."""
    canary = "canary-7f3a91c4"
    gateway = Gateway(tmp_path)
    message = [
        {"role": "system", "content": canary},
        {"role": "user", "content": f"What is 3 plus 5? {canary}"},
    ]
    with gateway.client, caplog.at_level(logging.DEBUG):
        ids = []
        for script in (
            None,
            failing(RuntimeError(canary)),
            failing(RuntimeError(canary), after=1),
        ):
            for model in gateway.models.values():
                model.script = script
            for stream in (False, True):
                answer = gateway.chat(
                    messages=message, stream=stream, user=canary, stop=canary
                )
                ids.append(answer.headers.get("x-router-decision-id", ""))
                gateway.chat(
                    messages=message, temperature="hot", metadata={"a": canary}
                )
                gateway.chat(
                    messages=message,
                    tools=[{"type": "function", "function": {"name": canary}}],
                )
                gateway.client.post(
                    "/v1/embeddings", json={"model": "auto", "input": canary}
                )
        explained = [
            gateway.client.get(f"/v1/router/decisions/{decision_id}").text
            for decision_id in ids
            if decision_id
        ]
        eventually(lambda: not gateway.ingress.router_client.outcomes.unsent)
        state = gateway.client.get("/v1/router/state").text
    assert len(explained) >= 2 and not any(
        canary in text for text in [*explained, state]
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [
        path.name for path in files if canary.encode() in path.read_bytes()
    ]
    assert canary not in caplog.text


def test_unknown_paths_and_methods_are_refused(gateway: Gateway) -> None:
    """Odd paths get a 404 or 405 in OpenAI's shape."""
    for path in (
        "/v1",
        "/v1/",
        "//v1/models",
        "/v1/models/../x",
        "/v1/%00",
        "/v1/models/%ff",
        "/" + "a" * 5_000,
    ):
        answer = gateway.client.get(path)
        assert answer.status_code in (404, 405) and openai_shape(answer.json()), path
    for method in ("PUT", "DELETE", "PATCH", "GET"):
        answer = gateway.client.request(method, "/v1/chat/completions")
        assert answer.status_code == 405 and openai_shape(answer.json())


def test_no_case_from_the_schema_is_a_server_error(gateway: Gateway) -> None:
    """ROUTER_FUZZ_CASES cases; some of them must pass the first check, or the test would show nothing.

    How many pass is drawn: hypothesis takes values from the constants of all modules that are loaded.
    """
    answers = fuzz(gateway, CASES)
    assert sum(answers.values()) >= CASES
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert answers[path, 200] > 0 < answers[path, 400]


def test_the_openapi_schema_is_served(gateway: Gateway) -> None:
    """The schema has the limits, for generated clients."""
    schema = gateway.client.get("/openapi.json").json()["components"]["schemas"]
    assert schema["ChatRequest"]["additionalProperties"] is False
    assert schema["ChatRequest"]["properties"]["messages"]["maxItems"] == 2048
    assert "top_k" in schema["ChatRequest"]["properties"]
