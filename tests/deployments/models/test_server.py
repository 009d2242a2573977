"""ModelServer: its requests to the engine, and how it reports the engine's failures; the engine is a fake."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.llm.openai_api_models import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import (
    create_error_response,
)
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from deployments import runtime
from deployments.models.report import ModelReport
from deployments.models.server import WARM_UP, ModelServer
from tests.support.gateway import Gateway

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAID = 'data: {"id":"a","choices":[{"index":0,"delta":{"content":"8"}}]}\n\n'
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"),
    (
        {
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        "tool_choice",
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
]


def server(*items: Any) -> ModelServer:
    """A ModelServer without an engine; it answers chats with these items, batched as LLMServer does."""
    made = object.__new__(ModelServer)
    made._llm_config = SimpleNamespace(model_id="small")

    async def chat(_: Any) -> AsyncIterator[Any]:
        async def answer() -> AsyncIterator[Any]:
            for item in items:
                if isinstance(item, Exception):
                    raise item
                yield item

        return answer()

    made.chat = chat
    return made


def played(
    made: ModelServer,
) -> Callable[[str, dict[str, Any]], AsyncIterator[tuple[bytes, Any]]]:
    """The server as the script of a FakeModel."""

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        if body.get("stream"):
            async for item in made.generate(task, body):
                yield item
        else:
            yield await made.complete(task, body)

    return script


def event(error: Exception) -> str:
    """The event with which vLLM's streams report an error."""
    return f"data: {json.dumps(create_error_response(error).model_dump())}\n\n"


@pytest.mark.parametrize("task", WARM_UP)
def test_requests_of_all_tasks_are_validated(task: str) -> None:
    """A valid body becomes a request of the engine; an error names the parameter, but no classes."""
    request = server()._request(task, WARM_UP[task])
    assert request.model == "small" and not isinstance(request, ModelReport)
    refused = server()._request(task, {**WARM_UP[task], "user": 5})
    assert refused.error.status == 400 and refused.error.param == "user"


@pytest.mark.parametrize("task", WARM_UP)
@pytest.mark.parametrize("shared", ["mine-7", ""])
def test_two_requests_of_one_id_have_two_in_the_engine(task: str, shared: str) -> None:
    """The id of an answer comes from it. It begins with the gateway's, which joins the engine's log with the others."""
    token = _serve_request_context.set(_RequestContext(request_id=shared))
    try:
        ids = {server()._request(task, WARM_UP[task]).request_id for _ in range(9)}
        assert runtime.serve_request_id() == shared
    finally:
        _serve_request_context.reset(token)
    assert len(ids) == 9 and all(len(i) <= 64 + 13 for i in ids)
    assert all(
        i.startswith(f"{shared}-" if shared else "") and i[0] != "-" for i in ids
    )


@pytest.mark.parametrize("task", WARM_UP)
def test_llmserver_keeps_an_id_that_was_given(task: str) -> None:
    """Otherwise it would put the gateway's id, which several clients may choose, in its place."""
    request = server()._request(task, WARM_UP[task])
    given = request.request_id
    token = _serve_request_context.set(_RequestContext(request_id="mine-7"))
    try:
        asyncio.run(server()._maybe_add_request_id_to_request(request))
    finally:
        _serve_request_context.reset(token)
    assert request.request_id == given


@pytest.mark.parametrize(("wrong", "param"), MISTAKES)
def test_a_clients_mistake_is_no_failure_of_the_model(
    gateway: Gateway, wrong: dict[str, Any], param: str
) -> None:
    """A request that only the engine can refuse gets a 400 with the engine's message, and no breaker counts it."""
    for model in gateway.models.values():
        model.script = played(server())
    gateway.tune(breaker={"failures": 1})
    for stream in (False, True) if param != "stream_options" else (False,):
        answer = gateway.chat(**wrong, stream=stream)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (
            error["param"] == param
            and error["type"] == "invalid_request_error"
            and error["message"]
        )
    # no second model was asked
    calls = sum(len(model.calls) for model in gateway.models.values())
    assert calls in (1, 2)
    assert all(
        breaker.admits for breaker in gateway.ingress.dispatcher.breakers.values()
    )


def test_a_stream_of_an_engine_that_fails_ends_with_an_error() -> None:
    """The text before the failure is passed on, then comes an error without the engine's message, then nothing."""

    async def all_of(made: ModelServer) -> list[Any]:
        return [
            item
            async for item in made.generate("chat", {**WARM_UP["chat"], "stream": True})
        ]

    said, (payload, report) = asyncio.run(
        all_of(server([SAID, event(EngineDeadError()), "data: [DONE]\n\n"]))
    )
    assert said == (SAID.encode(), None) and payload == b""
    assert report.error.status == 500 and "EngineCore" not in report.error.message
    wrong = VLLMValidationError("the schema is wrong", parameter="response_format")
    ((payload, report),) = asyncio.run(
        all_of(server([event(wrong), "data: [DONE]\n\n"]))
    )
    assert report.error.status == 400 and "the schema is wrong" in report.error.message
    assert report.error.param == "response_format"


def test_a_stream_without_a_finish_reason_has_failed() -> None:
    """So a stream ends whose grammar does not compile; a stream with a finish reason is complete."""

    async def all_of(made: ModelServer) -> list[Any]:
        return [
            item
            async for item in made.generate("chat", {**WARM_UP["chat"], "stream": True})
        ]

    done = "data: [DONE]\n\n"
    assert asyncio.run(all_of(server([SAID, done])))[-1][1].error.status == 500
    last = SAID.replace("}}]", '},"finish_reason":"stop"}]')
    said, (_, report) = asyncio.run(all_of(server([SAID, last, done])))
    assert said[0].endswith(done.encode()) and report.finish_reason == "stop"


def test_a_dead_engine_is_replaced_by_another(gateway: Gateway) -> None:
    """Before the first byte the request gets a 503, after it the stream ends with an error; breakers count both."""
    gateway.models["small"].script = played(
        server([event(EngineDeadError()), "data: [DONE]\n\n"])
    )
    breaker = gateway.ingress.dispatcher.breakers
    for _ in range(3):
        answer = gateway.chat(stream=True, model="small")
        assert answer.status_code == 503 and "EngineCore" not in answer.text
    assert not breaker["small"].admits and breaker["large"].admits
    gateway.models["large"].script = played(
        server([SAID], [event(EngineDeadError()), "data: [DONE]\n\n"])
    )
    answer = gateway.chat(stream=True, model="large")
    assert (
        answer.status_code == 200
        and "EngineCore" not in answer.text
        and "[DONE]" not in answer.text
    )
    assert (
        json.loads(answer.text.split("data: ")[-1])["error"]["type"] == "server_error"
    )


def test_a_whole_answer_may_be_an_error() -> None:
    """A refusal keeps its status and its message; a failure keeps its status only."""
    for error, status in (
        (VLLMValidationError("too long"), 400),
        (RuntimeError("in /usr/lib/x.py"), 500),
    ):
        item = ErrorResponse(**create_error_response(error).model_dump())
        _, report = asyncio.run(server(item).complete("chat", WARM_UP["chat"]))
        assert report.error.status == status and (
            "too long" in report.error.message
        ) == (status == 400)
        assert "/usr" not in report.error.message
