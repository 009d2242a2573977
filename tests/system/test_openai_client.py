"""Tests of the running system and its three real models with the unmodified openai client."""

from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.live


@pytest.fixture
def client(system: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system}/v1", api_key="none", max_retries=0)


ASK: list[Any] = [{"role": "user", "content": "What is 3 plus 5?"}]


def test_chat(client: openai.OpenAI) -> None:
    """The answer has the usage, and headers that name the model."""
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=ASK, temperature=0
    )
    answer = raw.parse()
    assert (
        answer.choices[0].message.content
        and answer.model == raw.headers["x-router-model"]
    )
    assert answer.usage and answer.usage.completion_tokens >= 1
    assert raw.headers["x-request-id"] and raw.headers["x-router-policy-version"]


def test_every_size_is_right_on_an_easy_task(client: openai.OpenAI) -> None:
    """A request that names a model is answered by that model."""
    for name in ("nano", "small", "large"):
        answer = client.chat.completions.create(model=name, messages=ASK, temperature=0)
        assert answer.model == name and answer.choices[0].message.content == "8"


def test_chat_stream_with_usage(client: openai.OpenAI) -> None:
    """The last chunk has the usage if it was requested; else no chunk has it."""
    chunks = list(
        client.chat.completions.create(
            model="auto",
            messages=ASK,
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert (
        chunks[-1].usage
        and chunks[-1].usage.completion_tokens >= 1
        and not chunks[-1].choices
    )
    plain = list(
        client.chat.completions.create(model="auto", messages=ASK, stream=True)
    )
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_presets_and_router_options(client: openai.OpenAI) -> None:
    """`auto:cheap` and limits in the `router` object are accepted."""
    assert client.chat.completions.create(model="auto:cheap", messages=ASK).choices
    answer = client.chat.completions.create(
        model="auto", messages=ASK, extra_body={"router": {"models": ["small"]}}
    )
    assert answer.model == "small"
    with pytest.raises(openai.BadRequestError, match=r"unknown key 'router\.modles'"):
        client.chat.completions.create(
            model="auto", messages=ASK, extra_body={"router": {"modles": ["small"]}}
        )


def test_completions_with_and_without_stream(client: openai.OpenAI) -> None:
    """A prompt in plain text gets a completion in plain text."""
    answer = client.completions.create(
        model="small", prompt="What is 3 plus 5?\n", temperature=0
    )
    assert answer.choices[0].text == "8" and answer.usage
    options: Any = {"stream_options": {"include_usage": True}}
    chunks = list(
        client.completions.create(
            model="auto", prompt="What is 3 plus 5?\n", stream=True, **options
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) and chunks[-1].usage


def test_embeddings(client: openai.OpenAI) -> None:
    """Embeddings have unit length and come from one model; similar texts have similar embeddings."""
    texts = ["a cat sat on the mat", "a kitten on a rug", "quarterly tax report"]
    answer = client.embeddings.create(model="auto", input=texts)
    vectors = [item.embedding for item in answer.data]

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert answer.model == "minilm" and abs(dot(vectors[0], vectors[0]) - 1) < 1e-3
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2])


def test_models(client: openai.OpenAI) -> None:
    """The list has the arms and the router's own names."""
    names = {model.id for model in client.models.list()}
    assert {
        "auto",
        "auto:fast",
        "auto:cheap",
        "auto:best",
        "nano",
        "small",
        "large",
        "minilm",
    } <= names


def test_feedback_and_explanation(client: openai.OpenAI, system: str) -> None:
    """Both use the decision id of the headers."""
    raw = client.chat.completions.with_raw_response.create(model="auto", messages=ASK)
    decision_id = raw.headers["x-router-decision-id"]
    feedback = {"decision_id": decision_id, "score": 1.0, "source": "program"}
    # its decision may still be on its way to the router
    assert httpx.post(f"{system}/v1/feedback", json=feedback).json()["status"] in (
        "accepted",
        "pending",
    )
    found = httpx.get(f"{system}/v1/router/decisions/{decision_id}").json()
    assert found["model"] == raw.parse().model and found["feedback"][0]["score"] == 1.0
    assert (
        found["profile"]["kind"] == "arithmetic"
        and "chosen with probability" in found["summary"]
    )


BAD: list[dict[str, Any]] = [
    {"model": "gpt-9", "messages": ASK},
    {"model": "auto", "messages": []},
    {"model": "auto", "messages": [{"role": "user", "content": "x" * 600}]},
    {
        "model": "nano",
        "messages": [{"role": "user", "content": "x" * 300}],
        "max_tokens": 400,
    },
    {"model": "auto", "messages": ASK, "temperature": 7},
    {
        "model": "auto",
        "messages": ASK,
        "extra_body": {"router": {"max_latency_s": 1e-9}},
    },
    {"model": "minilm", "messages": ASK},
]


@pytest.mark.parametrize("body", BAD, ids=str)
def test_bad_requests_are_the_clients_errors(
    client: openai.OpenAI, body: dict[str, Any]
) -> None:
    """They get a 4xx that the client library understands, and the server keeps working."""
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**body)
    assert 400 <= caught.value.status_code < 500 and caught.value.body["message"]  # type: ignore[index]
    assert client.chat.completions.create(model="auto", messages=ASK).choices
