"""LlamaIndex with its class for OpenAI-compatible endpoints."""

import asyncio

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def client(url: str, key: str, is_chat: bool) -> OpenAILike:
    return OpenAILike(
        model="auto",
        api_base=url,
        api_key=key,
        is_chat_model=is_chat,
        max_retries=0,
        max_tokens=8,
    )


def test_llama_index_chat_and_stream(url: str, key: str) -> None:
    chat = client(url, key, True)
    turns = [ChatMessage(role="system", content="Add."), ChatMessage("3 plus 5?")]
    answer = chat.chat(turns)
    assert chat.chat([*turns, answer.message, ChatMessage("2 plus 2?")]).message
    assert list(chat.stream_chat(turns))


def test_llama_index_async(url: str, key: str) -> None:
    answer = asyncio.run(client(url, key, True).achat([ChatMessage("3 plus 5?")]))
    assert answer.message.role == "assistant"


@pytest.mark.parametrize("is_chat", [False, True])
def test_llama_index_completion(url: str, key: str, is_chat: bool) -> None:
    made = client(url, key, is_chat)
    assert made.complete("3 plus 5") is not None
    assert list(made.stream_complete("3 plus 5"))
