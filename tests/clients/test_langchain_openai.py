"""langchain-openai: chat, completion and embedding classes."""

from typing import Any

import openai
import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Sum(BaseModel):
    """The sum of two numbers."""

    digit: int = Field(ge=0, le=99)


@pytest.fixture
def chat(url: str, key: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="auto", base_url=url, api_key=key, max_retries=0, max_tokens=8
    )  # type: ignore[call-arg, arg-type]


@pytest.fixture
def completion(url: str, key: str) -> OpenAI:
    return OpenAI(model="auto", base_url=url, api_key=key, max_retries=0, max_tokens=4)  # type: ignore[call-arg, arg-type]


def test_langchain_chat_invoke_and_batch(chat: ChatOpenAI) -> None:
    answer = chat.invoke("What is 3 plus 5?")
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] >= 1
    assert len(chat.batch(["3 plus 5", "2 plus 2"])) == 2


def test_langchain_chat_stream_with_usage(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream("What is 3 plus 5?", stream_usage=True))
    assert any(chunk.usage_metadata for chunk in chunks)


def test_langchain_chat_history(chat: ChatOpenAI) -> None:
    call: Any = {"name": "add", "args": {"a": 3}, "id": "call_1"}
    history = [
        SystemMessage("Add."),
        HumanMessage([{"type": "text", "text": "3 plus 5"}]),
        AIMessage("", tool_calls=[call]),
        ToolMessage("8", tool_call_id="call_1"),
    ]
    assert isinstance(chat.invoke(history).content, str)


def test_langchain_structured_output(chat: ChatOpenAI) -> None:
    free = chat.model_copy(update={"max_tokens": None})
    parsed = free.with_structured_output(Sum, method="json_schema").invoke("3 plus 5?")
    assert isinstance(parsed, Sum)


def test_langchain_tools_are_called_or_refused_by_name(chat: ChatOpenAI) -> None:
    try:
        answer = chat.bind_tools([Sum]).invoke("3 plus 5?")
    except openai.BadRequestError as error:
        assert error.param == "tools"
    else:
        assert isinstance(answer, AIMessage)


@pytest.mark.parametrize("streamed", [False, True])
def test_langchain_calls_a_tool_and_answers_with_its_result(
    tools_url: str, streamed: bool
) -> None:
    """As an agent does: the call, the result of the function, the answer."""

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    chat = ChatOpenAI(model="auto", base_url=tools_url, api_key="none", max_retries=0)  # type: ignore[call-arg, arg-type]
    bound = chat.bind_tools([add])

    def ask(turns: list[BaseMessage]) -> Any:
        if not streamed:
            return bound.invoke(turns)
        first, *others = bound.stream(turns)
        return sum(others, first)

    turns: list[BaseMessage] = [HumanMessage("What is 3 plus 5?")]
    called = ask(turns)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 3, "b": 5})
    result = ToolMessage(str(add(**call["args"])), tool_call_id=call["id"])
    answer = ask([*turns, called, result])
    assert answer.content.strip() == "The sum is 8."
    assert not answer.tool_calls


def test_langchain_completion(completion: OpenAI) -> None:
    assert isinstance(completion.invoke("3 plus 5"), str)
    assert len(completion.batch(["3 plus 5", "2 plus 2"])) == 2
    assert "".join(completion.stream("3 plus 5")) is not None


def test_langchain_knows_a_prompt_that_is_too_long(chat: ChatOpenAI) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        chat.invoke("7 " * 200_000)
    with pytest.raises(ContextOverflowError):
        chat.model_copy(update={"max_tokens": 2**31 - 1}).invoke("3 plus 5?")


def test_langchain_embeddings(url: str, key: str) -> None:
    embeddings = OpenAIEmbeddings(
        model="auto", base_url=url, api_key=key, check_embedding_ctx_length=False
    )  # type: ignore[call-arg, arg-type]
    first, second = embeddings.embed_documents(["a cat", "a dog"])
    assert len(first) == len(second) and first != second
