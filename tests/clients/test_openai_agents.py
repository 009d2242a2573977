"""openai-agents with its class for chat models."""

import asyncio

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

ADDED: list[tuple[int, int]] = []


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    ADDED.append((a, b))
    return a + b


def make_agent(url: str, key: str, max_tokens: int) -> Agent[None]:
    """An agent that asks `auto`."""
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)
    return Agent(
        name="adder",
        instructions="Add.",
        model=OpenAIChatCompletionsModel("auto", client),
        model_settings=ModelSettings(max_tokens=max_tokens),
    )


@pytest.fixture
def agent(url: str, key: str) -> Agent[None]:
    return make_agent(url, key, max_tokens=8)


def test_agents_run_and_second_turn(agent: Agent[None]) -> None:
    async def run() -> str:
        first = await Runner.run(agent, "What is 3 plus 5?")
        turns = [*first.to_input_list(), {"role": "user", "content": "2 plus 2?"}]
        second = await Runner.run(agent, turns)  # type: ignore[arg-type]
        return str(second.final_output)

    assert isinstance(asyncio.run(run()), str)


def test_agents_stream(agent: Agent[None]) -> None:
    async def run() -> int:
        result = Runner.run_streamed(agent, "What is 3 plus 5?")
        return len([event async for event in result.stream_events()])

    assert asyncio.run(run()) > 0


def test_agents_tools_are_called_or_refused_by_name(agent: Agent[None]) -> None:
    with_tool = agent.clone(tools=[add])

    async def run() -> str:
        try:
            result = await Runner.run(with_tool, "What is 3 plus 5?", max_turns=2)
        except openai.BadRequestError as error:
            return str(error.param)
        return f"said {result.final_output}"

    found = asyncio.run(run())
    assert found == "tools" or found.startswith("said ")


@pytest.mark.parametrize("streamed", [False, True])
def test_agents_call_a_tool_and_answer_with_its_result(
    tools_url: str, streamed: bool
) -> None:
    """The whole loop: the model calls, the client runs the function, and the model answers with the result."""
    caller = make_agent(tools_url, "none", max_tokens=200).clone(tools=[add])
    ADDED.clear()

    async def run() -> str:
        if not streamed:
            done = await Runner.run(caller, "What is 3 plus 5?", max_turns=3)
            return str(done.final_output)
        result = Runner.run_streamed(caller, "What is 3 plus 5?", max_turns=3)
        async for _ in result.stream_events():
            pass
        return str(result.final_output)

    assert asyncio.run(run()).strip() == "The sum is 8."
    assert ADDED == [(3, 5)]
