"""ModelServer's requests, and the engine's failures as it hands them on; the engine itself is a stand-in."""

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.models import WARM_UP, ModelServer
from tests.gateway import Gateway

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
]


def server(*items: Any) -> ModelServer:
    """Without an engine; its answers to chats are these items, batched as LLMServer does."""
    made = object.__new__(ModelServer)
    made._llm_config = SimpleNamespace(model_id="small")

    async def chat(_: Any) -> AsyncIterator[Any]:
        async def answer() -> AsyncIterator[Any]:
            for item in items:
                yield item

        return answer()

    made.chat = chat
    return made


def played(made: ModelServer) -> Callable[[str, dict[str, Any]], AsyncIterator[tuple[bytes, Any]]]:
    """The server as the script of a stand-in for its handle."""

    async def script(task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, Any]]:
        if body.get("stream"):
            async for item in made.generate(task, body):
                yield item
        else:
            yield await made.complete(task, body)

    return script


@pytest.mark.parametrize("task", WARM_UP)
def test_requests_of_all_tasks(task: str) -> None:
    """Each is one of the engine's; a mistake is told by its place, without the names of classes."""
    request = server()._request(task, WARM_UP[task])
    assert request.model == "small" and not isinstance(request, dict)
    refused = server()._request(task, {**WARM_UP[task], "user": 5})
    assert refused["status"] == 400 and refused["error"]["param"] == "user"


@pytest.mark.parametrize(("wrong", "param"), MISTAKES)
def test_a_clients_mistake_is_no_models_failure(gateway: Gateway, wrong: dict[str, Any], param: str) -> None:
    """What only the engine knows to be wrong is a 400 with its words, and no breaker counts it."""
    for model in gateway.models.values():
        model.script = played(server())
    gateway.tune(breaker={"failures": 1})
    for stream in (False, True) if param != "stream_options" else (False,):
        answer = gateway.chat(**wrong, stream=stream)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]
    assert sum(len(model.calls) for model in gateway.models.values()) in (1, 2)  # nobody else was asked
    assert all(breaker.closed for breaker in gateway.ingress.dispatcher.breakers.values())
