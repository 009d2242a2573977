"""openai-python, sync and async: every feature that the API promises."""

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

ASK: list[Any] = [{"role": "user", "content": "What is 3 plus 5?"}]


class Sum(BaseModel):
    """An answer with a schema that ends."""

    model_config = ConfigDict(extra="forbid")

    digit: int = Field(ge=0, le=99)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL: Any = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add", "arguments": '{"a": 3}'},
}


@pytest.fixture
def client(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


@pytest.fixture
def later(url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)


def refused(error: pytest.ExceptionInfo[openai.APIStatusError]) -> tuple[Any, Any]:
    """Status and parameter of an error in OpenAI's shape."""
    body: Any = error.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["message"]
    return error.value.status_code, body["param"]


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="auto", messages=ASK, max_tokens=8)
    assert answer.choices[0].message.content is not None
    assert answer.usage and answer.usage.completion_tokens >= 1
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_openai_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="auto",
            messages=ASK,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert not chunks[-1].choices and chunks[-1].usage
    assert any(c.choices and c.choices[0].finish_reason for c in chunks)


def test_openai_async_chat_and_stream(later: openai.AsyncOpenAI) -> None:
    async def run() -> tuple[Any, list[Any]]:
        async with later:
            whole = await later.chat.completions.create(
                model="auto", messages=ASK, max_tokens=8
            )
            stream = await later.chat.completions.create(
                model="auto", messages=ASK, max_tokens=8, stream=True
            )
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(run())
    assert whole.choices[0].message.role == "assistant"
    assert all(chunk.choices for chunk in chunks) and len(chunks) >= 1


def test_openai_async_many_at_once(later: openai.AsyncOpenAI) -> None:
    async def run() -> list[Any]:
        async with later:
            calls = [
                later.completions.create(model="auto", prompt=f"{i} ", max_tokens=2)
                for i in range(12)
            ]
            return await asyncio.gather(*calls)

    assert all(answer.choices[0].index == 0 for answer in asyncio.run(run()))


def test_openai_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="auto", messages=ASK, max_tokens=8
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.role == "assistant"


def test_openai_raw_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=ASK, max_tokens=4
    )
    for name in ("x-request-id", "x-router-decision-id", "x-router-model"):
        assert raw.headers[name]
    assert raw.parse().model == raw.headers["x-router-model"]


def test_openai_several_choices(client: openai.OpenAI, named: str) -> None:
    for temperature in (0, 1):
        answer = client.chat.completions.create(
            model=named, messages=ASK, n=2, max_tokens=4, temperature=temperature
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        if temperature == 0:
            first, second = (choice.message.content for choice in answer.choices)
            assert first == second


def test_openai_logprobs(client: openai.OpenAI, named: str) -> None:
    for top in (0, 20):
        answer = client.chat.completions.create(
            model=named, messages=ASK, max_tokens=2, logprobs=True, top_logprobs=top
        )
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    for logprobs in (0, 5):
        completion = client.completions.create(
            model=named, prompt="3 plus 5", max_tokens=2, logprobs=logprobs
        )
        assert completion.choices[0].logprobs
        assert completion.choices[0].logprobs.token_logprobs


def test_openai_edges_of_ranges(client: openai.OpenAI, named: str) -> None:
    edges: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 0},
        {"top_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"stop": []},
        {"stop": ["a", "b", "c", "d"]},
        {"max_completion_tokens": 1},
    ]
    for edge in edges:
        answer = client.chat.completions.create(
            **{"model": named, "messages": ASK, "max_tokens": 2, **edge}
        )
        assert answer.choices, edge


def test_openai_prompts_as_a_list(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="auto", prompt=["3 plus 5", "2 plus 2", "1"], n=2, max_tokens=2
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage and answer.usage.completion_tokens >= 6
    one = client.completions.create(model="auto", prompt=["3 plus 5"], max_tokens=2)
    assert len(one.choices) == 1


def test_openai_prompts_as_a_list_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="auto",
            prompt=["3 plus 5", "2 plus 2"],
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    ended = {c.index for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ended == {0, 1} and chunks[-1].usage


def test_openai_token_ids(client: openai.OpenAI, named: str) -> None:
    for prompt, choices in (([5, 6, 7], 1), ([[5, 6], [7]], 2)):
        answer = client.completions.create(model=named, prompt=prompt, max_tokens=2)
        assert len(answer.choices) == choices
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model="auto", prompt=prompt, max_tokens=2)
        assert refused(error) == (400, "prompt")


def test_openai_echo_without_an_answer(client: openai.OpenAI, named: str) -> None:
    answer = client.completions.create(
        model=named, prompt="3 plus 5", max_tokens=0, echo=True, logprobs=1
    )
    assert answer.choices[0].text == "3 plus 5"


def test_openai_json_schema_ends(client: openai.OpenAI, named: str) -> None:
    for model in ("auto", named):
        parsed = client.chat.completions.parse(
            model=model, messages=ASK, response_format=Sum
        )
        assert parsed.choices[0].finish_reason == "stop"
        assert parsed.choices[0].message.parsed


def test_openai_json_object_is_json(client: openai.OpenAI, named: str) -> None:
    answer = client.chat.completions.create(
        model=named, messages=ASK, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content or ""
    assert "    " not in text
    if answer.choices[0].finish_reason == "stop":
        json.loads(text)


def test_openai_tools_are_called_or_refused_by_name(client: openai.OpenAI) -> None:
    for choice in ("auto", "required"):
        try:
            answer = client.chat.completions.create(
                model="auto",
                messages=ASK,
                tools=[TOOL],
                tool_choice=choice,  # type: ignore[call-overload]
            )
        except openai.BadRequestError as error:
            assert error.param == "tools", error
            assert "--" not in error.message
        else:
            assert choice == "auto" or answer.choices[0].message.tool_calls
    answer = client.chat.completions.create(
        model="auto", messages=ASK, tools=[TOOL], tool_choice="none", max_tokens=2
    )
    assert answer.choices


def test_openai_histories(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="auto", messages=ASK, max_tokens=4)
    echo: Any = first.choices[0].message.model_dump()
    histories: list[list[Any]] = [
        [*ASK, echo, *ASK],
        [
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "8"},
        ],
        [{"role": "developer", "content": "Add."}, *ASK],
        [{"role": "user", "content": [{"type": "text", "text": "3 plus 5"}]}],
    ]
    for messages in histories:
        answer = client.chat.completions.create(
            model="auto", messages=messages, max_tokens=2
        )
        assert answer.choices, messages


def test_openai_text_parts_are_one_text(client: openai.OpenAI, named: str) -> None:
    parts = [{"type": "text", "text": t} for t in ("What is 3", " plus 5?")]
    usages = []
    for content in ("What is 3 plus 5?", parts):
        messages: Any = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(
            model=named, messages=messages, max_tokens=1
        )
        assert answer.usage
        usages.append(answer.usage.prompt_tokens)
    assert usages[0] == usages[1]


def test_openai_unset_fields_as_null(client: openai.OpenAI) -> None:
    nulls = dict.fromkeys(
        ("functions", "function_call", "audio", "web_search_options", "tools", "stop")
    )
    answer = client.chat.completions.create(
        model="auto", messages=ASK, max_tokens=2, extra_body=nulls
    )
    assert answer.choices
    completion = client.completions.create(
        model="auto", prompt="3", max_tokens=2, best_of=1, extra_body={"suffix": None}
    )
    assert completion.choices


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [*ASK, {"role": "tool", "content": "8"}]}, "messages.1.tool_call_id"),
    (
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {**CALL, "function": {"name": "add", "arguments": {}}}
                    ],
                },
            ]
        },
        "messages.1.tool_calls.0.function.arguments",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
    ),
    ({"temperature": 2.1}, "temperature"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**31 - 1}, "max_tokens"),
    ({"max_completion_tokens": 2**31 - 1}, "max_completion_tokens"),
    ({"extra_body": {"router": {"models": ["nope"]}}}, "router.models"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=str)
def test_openai_errors_name_the_place(
    client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": "auto", "messages": ASK, **change})
    assert refused(error) == (400, param)


def test_openai_too_long(client: openai.OpenAI, named: str) -> None:
    for model in ("auto", named):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "7 " * 200_000}]
            )
        assert error.value.code == "context_length_exceeded"
        assert refused(error) == (400, "messages")


def test_openai_embeddings(client: openai.OpenAI) -> None:
    """Base64 is the client's default; texts that differ at their end have different vectors, or are refused."""
    vectors = client.embeddings.create(model="auto", input=["a cat", "a dog"])
    assert [item.index for item in vectors.data] == [0, 1]
    plain = client.embeddings.create(
        model="auto", input="a cat", encoding_format="float"
    )
    assert plain.data[0].embedding == pytest.approx(vectors.data[0].embedding, abs=1e-6)
    texts = ["a " * 3_000 + end for end in ("zebra", "quantum")]
    try:
        long = client.embeddings.create(model="auto", input=texts)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"
    else:
        assert long.data[0].embedding != long.data[1].embedding
        assert long.usage.prompt_tokens > 6_000


def test_openai_models(client: openai.OpenAI, named: str) -> None:
    assert named in {model.id for model in client.models.list()}
    assert client.models.retrieve(named).id == named
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("unknown/nothing")
    assert error.value.code == "model_not_found"


def test_openai_responses_are_refused_with_what_to_use(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.responses.create(model="auto", input="Hello")
