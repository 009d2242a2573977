"""Requests go to the models that have what they need; an engine double with vLLM's parsers answers."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.models import capabilities
from deployments.models.report import failure
from tests.support.engine_double import (
    ANSWER,
    ARGUMENTS,
    CALL,
    ONLY_THOUGHT,
    THOUGHT,
    EngineDouble,
)
from tests.support.fakes import FakeModel
from tests.support.gateway import Gateway, eventually

TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
SIZE = {"context_tokens": 512}
PARSES = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "reasoning_parser": "qwen3",
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Three sizes, of which the middle one has vLLM's parsers, and the largest another engine."""
    models = {"small": SIZE, "medium": SIZE, "large": SIZE}
    made = Gateway(tmp_path_factory.mktemp("three"), models=models)
    with made.client:
        made.deploy("small", {"engine_kwargs": {}})
        made.deploy("medium", {"engine_kwargs": PARSES})
        made.deploy("large", {"llm_engine": "SGLang", "engine_kwargs": {}})
        yield made


@pytest.fixture(autouse=True)
def plain(three: Gateway) -> None:
    """Each test begins with models that say their name."""
    for name in three.models:
        three.models[name] = FakeModel(name)
    three.ingress.dispatcher._methods.clear()
    three.models["large"].script = refuses


async def refuses(_: str, __: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
    """An engine that cannot what it is asked."""
    message = "this model cannot call tools"
    yield b"", failure(message, 400, "tools", capabilities.CODE)


def answered(three: Gateway) -> list[str]:
    """The models that were asked."""
    return [name for name, model in three.models.items() for _ in model.calls]


def delta_sum(text: str) -> dict[str, str]:
    """The text of a stream by field of its deltas, and the arguments of its calls."""
    total: dict[str, str] = {}
    for line in text.split("\n"):
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:]).get("choices", ()):
            delta = choice["delta"]
            for name in ("content", "reasoning", "reasoning_content"):
                total[name] = total.get(name, "") + (delta.get(name) or "")
            for call in delta.get("tool_calls") or ():
                more = call["function"].get("arguments") or ""
                total["arguments"] = total.get("arguments", "") + more
    return total


def outcome_of(three: Gateway, answer: Any) -> dict[str, Any]:
    """The outcome of the decision behind an answer."""
    where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    eventually(lambda: three.client.get(where).json().get("outcome"))
    found: dict[str, Any] = three.client.get(where).json()["outcome"]
    return found


def test_tools_go_to_the_one_model_that_calls_them(three: Gateway) -> None:
    """200 of 200 requests, half of them streamed, and each calls the tool with its arguments."""
    three.deploy("large", {"engine_kwargs": {}})
    three.models["medium"].script = EngineDouble(CALL).script
    try:
        for number in range(200):
            stream = number % 2 == 1
            answer = three.chat(tools=[TOOL], stream=stream)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-router-model"] == "medium"
            if stream:
                assert json.loads(delta_sum(answer.text)["arguments"]) == ARGUMENTS
            else:
                (choice,) = answer.json()["choices"]
                (call,) = choice["message"]["tool_calls"]
                assert json.loads(call["function"]["arguments"]) == ARGUMENTS
                assert choice["finish_reason"] == "tool_calls"
        assert answered(three) == ["medium"] * 200
    finally:
        three.deploy("large", {"llm_engine": "SGLang", "engine_kwargs": {}})


def test_an_explanation_says_what_an_arm_cannot(three: Gateway) -> None:
    """And what the request needs."""
    answer = three.chat(tools=[TOOL], top_k=5)
    assert answer.headers["x-router-model"] == "medium"
    where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
    eventually(lambda: three.client.get(where).json().get("outcome"))
    explained = three.client.get(where).json()
    removed = {row["arm"]: row["removed_by"] for row in explained["models"]}
    assert removed["medium"] == ""
    assert removed["small"] == "cannot call tools"
    assert removed["large"] == "cannot take parameters of vLLM"
    assert "small (cannot call tools)" in explained["summary"]
    assert set(explained["profile"]["needs"]) == {"tools", "vllm_parameters"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        (
            {"chat_template_kwargs": {"enable_thinking": True}},
            "chat_template_kwargs.enable_thinking",
        ),
    ],
    ids=str,
)
def test_a_model_that_cannot_is_refused_by_name(
    three: Gateway, change: dict[str, Any], param: str, stream: bool
) -> None:
    """With the parameter, before a decision; by `auto`, another model answers."""
    answer = three.chat(model="small", stream=stream, **change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["code"] == capabilities.CODE
    assert "small" in error["message"] and param in error["message"]
    assert "x-router-decision-id" not in answer.headers
    assert answered(three) == []
    assert three.chat(stream=stream, **change).headers["x-router-model"] == "medium"


def test_parameters_of_vllm_go_to_vllm_only(three: Gateway) -> None:
    """By `auto` and by name; a model with another engine is refused with the parameter."""
    for _ in range(8):
        answer = three.chat(top_k=5, min_p=0.1)
        assert answer.headers["x-router-model"] in ("small", "medium")
    for model in ("small", "medium"):
        assert three.chat(model=model, top_k=5).status_code == 200
    error = three.chat(model="large", min_p=0.1).json()["error"]
    assert error["param"] == "min_p" and error["code"] == capabilities.CODE
    assert "large" not in answered(three)


def test_needs_that_no_single_model_meets(tmp_path: Path) -> None:
    """The error names a parameter, although each need alone is met by some model."""
    models = {
        "small": {**SIZE, "capabilities": {"tools": False}},
        "large": {**SIZE, "capabilities": {"logprobs": False}},
    }
    made = Gateway(tmp_path, models=models)
    with made.client:
        assert made.chat(tools=[TOOL]).headers["x-router-model"] == "large"
        assert made.chat(logprobs=True).headers["x-router-model"] == "small"
        both = made.chat(tools=[TOOL], logprobs=True)
        assert both.status_code == 400
        assert both.json()["error"]["param"] in ("tools", "logprobs")


def test_models_of_which_nothing_is_known_are_asked(gateway: Gateway) -> None:
    """The default models' applications may have no arguments; all but images, audio and videos is assumed then."""
    changes: list[dict[str, Any]] = [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"top_k": 5},
        {"thinking_token_budget": 5},
    ]
    for change in changes:
        assert gateway.chat(**change).status_code == 200, change


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_tried_once_on_another_model_and_recorded(
    tmp_path: Path, stream: bool
) -> None:
    """The first decision is `rejected`, and the second names it."""
    made = Gateway(tmp_path, models={"small": SIZE, "large": SIZE})
    with made.client:
        made.models["small"].script = refuses
        wish = {"cost_weight": 0.0, "models": ["small", "large"]}
        seen = set()
        for _ in range(20):
            answer = made.chat(tools=[TOOL], router=wish, stream=stream)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-router-model"] == "large"
            seen.add(answer.headers["x-router-fallback"])
            if answer.headers["x-router-fallback"] == "model":
                break
        assert "model" in seen
        where = f"/v1/router/decisions/{answer.headers['x-router-decision-id']}"
        eventually(lambda: made.client.get(where).json().get("outcome"))
        assert "The first try was the decision" in made.client.get(where).text
        assert len(made.models["small"].calls) == 1
        made.models["large"].script = refuses
        answer = made.chat(tools=[TOOL], router=wish, stream=stream)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "tools"


@pytest.mark.parametrize("model", ["medium", "auto"])
@pytest.mark.parametrize("stream", [False, True])
def test_thinking_comes_in_both_fields(
    three: Gateway, model: str, stream: bool
) -> None:
    """Its tokens count, and it is no part of the answer's text."""
    double = EngineDouble(ANSWER)
    three.models["medium"].script = double.script
    wish = {"models": ["medium"]}
    answer = three.chat(model=model, router=wish, stream=stream)
    assert answer.status_code == 200
    if stream:
        said = delta_sum(answer.text)
    else:
        said = answer.json()["choices"][0]["message"]
        assert answer.json()["usage"]["completion_tokens"] == double.tokens
    assert said["reasoning"].strip() == said["reasoning_content"].strip() == THOUGHT
    assert said["content"].strip() == "The sum is 8."
    outcome = outcome_of(three, answer)
    assert outcome["output_tokens"] == double.tokens
    assert outcome["flaw"] == "" and outcome["latency_s"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_thoughts_alone_is_empty(three: Gateway, stream: bool) -> None:
    """Thinking is not looked at as content."""
    three.models["medium"].script = EngineDouble(ONLY_THOUGHT).script
    answer = three.chat(model="medium", stream=stream)
    said = delta_sum(answer.text)
    if not stream:
        said = answer.json()["choices"][0]["message"]
    assert "3 and 5" in said["reasoning"] and not said["content"]
    assert outcome_of(three, answer)["flaw"] == "empty"


def test_thinking_can_be_left_out(three: Gateway) -> None:
    three.models["medium"].script = EngineDouble(ANSWER).script
    answer = three.chat(model="medium", include_reasoning=False)
    assert "reasoning" not in answer.json()["choices"][0]["message"]
    assert three.models["medium"].calls[0]["include_reasoning"] is False
