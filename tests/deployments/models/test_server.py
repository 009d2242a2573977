"""ModelServer: its requests to the engine, and how it reports the engine's failures; the engine is a fake."""

import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import xgrammar
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.llm import LLMConfig
from ray.serve.llm.openai_api_models import ChatCompletionResponse, ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import (
    create_error_response,
)
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from deployments import runtime
from deployments.models.report import ModelReport
from deployments.models.server import (
    WARM_UP,
    ModelServer,
    bound_grammars,
    read_adapters,
)
from tests.support.gateway import Gateway

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAID = 'data: {"id":"a","choices":[{"index":0,"delta":{"content":"8"}}]}\n\n'
MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
        "tools.0.function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]},
        "tools.0.function.description",
    ),
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
async def test_llmserver_keeps_an_id_that_was_given(task: str) -> None:
    """Otherwise it would put the gateway's id, which several clients may choose, in its place."""
    request = server()._request(task, WARM_UP[task])
    given = request.request_id
    token = _serve_request_context.set(_RequestContext(request_id="mine-7"))
    try:
        await server()._maybe_add_request_id_to_request(request)
    finally:
        _serve_request_context.reset(token)
    assert request.request_id == given


@pytest.mark.parametrize(("wrong", "param"), MISTAKES)
def test_a_clients_mistake_is_no_failure_of_the_model(
    gateway: Gateway, wrong: dict[str, Any], param: str
) -> None:
    """A request that only the engine can refuse gets a 400 with the place, and no breaker counts it."""
    for model in gateway.models.values():
        model.script = played(server())
    gateway.tune(breaker={"failure_threshold": 1})
    for stream in (False, True):
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


async def test_a_stream_of_an_engine_that_fails_ends_with_an_error() -> None:
    """The text before the failure is passed on, then comes an error without the engine's message, then nothing."""

    async def all_of(made: ModelServer) -> list[Any]:
        return [
            item
            async for item in made.generate("chat", {**WARM_UP["chat"], "stream": True})
        ]

    said, (payload, report) = await all_of(
        server([SAID, event(EngineDeadError()), "data: [DONE]\n\n"])
    )
    assert said == (SAID.encode(), None) and payload == b""
    assert report.error.status == 500 and "EngineCore" not in report.error.message
    wrong = VLLMValidationError("the schema is wrong", parameter="response_format")
    ((payload, report),) = await all_of(server([event(wrong), "data: [DONE]\n\n"]))
    assert report.error.status == 400 and "the schema is wrong" in report.error.message
    assert report.error.param == "response_format"


async def test_a_stream_without_a_finish_reason_has_failed() -> None:
    """So a stream ends whose grammar does not compile; a stream with a finish reason is complete."""

    async def all_of(made: ModelServer) -> list[Any]:
        return [
            item
            async for item in made.generate("chat", {**WARM_UP["chat"], "stream": True})
        ]

    done = "data: [DONE]\n\n"
    assert (await all_of(server([SAID, done])))[-1][1].error.status == 500
    last = SAID.replace("}}]", '},"finish_reason":"stop"}]')
    said, (_, report) = await all_of(server([SAID, last, done]))
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


async def test_a_whole_answer_may_be_an_error() -> None:
    """A refusal keeps its status and its message; a failure keeps its status only."""
    for error, status in (
        (VLLMValidationError("too long"), 400),
        (RuntimeError("in /usr/lib/x.py"), 500),
    ):
        item = ErrorResponse(**create_error_response(error).model_dump())
        _, report = await server(item).complete("chat", WARM_UP["chat"])
        assert report.error.status == status and (
            "too long" in report.error.message
        ) == (status == 400)
        assert "/usr" not in report.error.message


@pytest.mark.parametrize(
    ("said", "param", "code"),
    [
        (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            "tools",
            "unsupported_parameter",
        ),
        (
            'tool_choice="required" requires --tool-call-parser to be set',
            "tools",
            "unsupported_parameter",
        ),
        (
            "This model's maximum context length is 512 tokens. However, you requested 500 output tokens and your "
            "prompt contains at least 13 input tokens, for a total of at least 513 tokens.",
            "max_tokens",
            "context_length_exceeded",
        ),
        ("Token id 99999999 is out of vocabulary", "prompt", None),
        ("VLLMValidationError: see --max-logprobs", None, None),
        ("set the VLLM_MAX_COMPLETION_PROMPTS environment variable", None, None),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_are_in_the_words_of_this_api(
    said: str, param: str | None, code: str | None, stream: bool
) -> None:
    """The engine's flags, classes and parameters do not reach the client."""

    async def refusal() -> Any:
        body = {**WARM_UP["chat"], "max_tokens": 500, "stream": stream}
        error = VLLMValidationError(said)
        if stream:
            made = server(event(error))
            return [item async for item in made.generate("chat", body)][-1][1]
        item = ErrorResponse(**create_error_response(error).model_dump())
        return (await server(item).complete("chat", body))[1]

    error = (await refusal()).error
    assert (error.status, error.param, error.code) == (400, param, code)
    for word in ("--", "VLLM", "Error", "output tokens", "environment variable"):
        assert word not in error.message


def answer(**message: Any) -> Any:
    """An engine's whole answer to a chat."""
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return ChatCompletionResponse.model_validate(
        {"model": "small", "choices": [choice], "usage": usage}
    )


async def test_fields_that_openais_answers_always_have_are_present() -> None:
    """`content` is null beside tool calls, and an empty text stays one; the engine's own empty fields are left out."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for message, content in (
        ({"role": "assistant", "content": None, "tool_calls": [call]}, None),
        ({"role": "assistant", "content": ""}, ""),
        ({"role": "assistant", "content": "8"}, "8"),
    ):
        payload, report = await server(answer(**message)).complete(
            "chat", WARM_UP["chat"]
        )
        assert report.error is None
        (choice,) = json.loads(payload)["choices"]
        assert choice["message"]["content"] == content
        assert choice["message"]["refusal"] is None and choice["logprobs"] is None
        assert ("tool_calls" in choice["message"]) == ("tool_calls" in message)
        assert "prompt_logprobs" not in json.loads(payload)


def test_grammars_allow_no_free_white_space() -> None:
    """An engine's own setting is kept."""

    def configured(**engine_kwargs: Any) -> dict[str, Any]:
        config = SimpleNamespace(engine_kwargs=engine_kwargs)
        config.update_engine_kwargs = lambda **new: engine_kwargs.update(new)
        bound_grammars(config)
        return engine_kwargs

    made = configured()["structured_outputs_config"]
    assert made.backend == "xgrammar" and made.disable_any_whitespace
    own = {"backend": "guidance"}
    kept = configured(structured_outputs_config=own)
    assert kept == {"structured_outputs_config": own}


@pytest.mark.parametrize("schema", [{"type": "object"}, {"type": "array"}, {}])
def test_json_ends_within_its_grammar(schema: dict[str, Any]) -> None:
    """The grammar that the engine compiles takes JSON as Python writes it, and neither line breaks nor more blanks."""
    made = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo([chr(i) for i in range(128)], stop_token_ids=[0])
    )
    for text, taken in (
        ('{"a": 1, "b": [2, 3]}', "array" not in str(schema)),
        ('{"a":  1}', False),
        ('{ "a": 1}', False),
        ("[1,\n2]", False),
        (" ", False),
    ):
        matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(made))
        assert matcher.accept_string(text) == taken, text


def test_adapters_of_a_configuration_are_records_of_vllm() -> None:
    """VLLM's server gets them, and not its engine. A request of an adapter's variant names it, and others the model."""
    loading = {"model_id": "small", "model_source": "assets/models/small"}
    modules = [{"name": "legal", "path": "/models/legal"}]
    arguments: dict[str, Any] = {"enable_lora": True, "lora_modules": modules}
    for kwargs in (arguments, {}):
        config = LLMConfig(model_loading_config=loading, engine_kwargs=kwargs)
        config.get_engine_config()  # Ray makes it before the server
        read_adapters(config)
        made = config.get_engine_config()
        names = [(a.name, a.path) for a in made.frontend_kwargs.get("lora_modules", ())]
        assert names == [("legal", "/models/legal")] * bool(kwargs)
        assert "lora_modules" not in made.get_initialization_kwargs()
    messages = [{"role": "user", "content": "Hello"}]
    named = server()._request("chat", {"messages": messages, "model": "legal"})
    assert named.model == "legal"
    assert server()._request("chat", {"messages": messages}).model == "small"
