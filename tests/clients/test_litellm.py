"""litellm as a client of an OpenAI-compatible endpoint."""

import asyncio
from typing import Any

import litellm
import pytest

ASK = [{"role": "user", "content": "What is 3 plus 5?"}]


@pytest.fixture
def options(url: str, key: str) -> dict[str, Any]:
    return {
        "api_base": url,
        "api_key": key,
        "num_retries": 0,
        "max_tokens": 4,
    }


def test_litellm_completion_and_stream(options: dict[str, Any]) -> None:
    answer: Any = litellm.completion("openai/auto", messages=ASK, **options)
    assert answer.choices[0].message.role == "assistant" and answer.usage.total_tokens
    chunks: Any = litellm.completion(
        "openai/auto", messages=ASK, stream=True, **options
    )
    assert any(chunk.choices for chunk in chunks)


def test_litellm_async(options: dict[str, Any]) -> None:
    async def run() -> list[Any]:
        calls = [
            litellm.acompletion("openai/auto", messages=ASK, **options)
            for _ in range(4)
        ]
        return await asyncio.gather(*calls)

    assert len(asyncio.run(run())) == 4


def test_litellm_text_completion_of_a_list(options: dict[str, Any]) -> None:
    for prompt, choices in (("3 plus 5", 1), (["3 plus 5", "2 plus 2"], 2)):
        answer: Any = litellm.text_completion(
            model="text-completion-openai/auto", prompt=prompt, **options
        )
        assert len(answer.choices) == choices


def test_litellm_embedding(options: dict[str, Any]) -> None:
    del options["max_tokens"]
    answer: Any = litellm.embedding("openai/auto", input=["a cat", "a dog"], **options)
    assert len(answer.data) == 2


def test_litellm_knows_what_is_too_long(options: dict[str, Any]) -> None:
    text: list[Any] = [{"role": "user", "content": "7 " * 200_000}]
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion("openai/auto", messages=text, **options)
    options["max_tokens"] = 2**31 - 1
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):
        litellm.completion("openai/auto", messages=ASK, **options)


def test_litellm_tools_are_called_or_refused_by_name(options: dict[str, Any]) -> None:
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    try:
        answer: Any = litellm.completion(
            "openai/auto", messages=ASK, tools=[tool], **options
        )
    except litellm.exceptions.BadRequestError as error:
        assert "leave tools out" in str(error)
    else:
        assert answer.choices
