"""A small client of the gateway that records when the first and the last token of an answer arrive."""

import asyncio
import json
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tqdm import tqdm

from assets.tasks import Task, check
from deployments.errors import NoAnswerError

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_TOKENS = 100  # of an answer


@dataclass(frozen=True)
class Answer:
    """An answered task.

    model: the model that answered.
    ttft_s, latency_s: seconds to the first and to the last token, measured by the client.
    """

    task: Task
    text: str
    right: bool
    model: str
    decision_id: str
    fallback: str
    ttft_s: float
    latency_s: float
    prompt_tokens: int
    output_tokens: int


def body_of(model: str, task: Task) -> dict[str, Any]:
    """The request that asks a model a task. Its answer is streamed."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": task.question}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        # every right reply is one line, and the longest that a model was trained to give has 87 tokens
        "max_tokens": MAX_TOKENS,
        "stop": ["\n"],
    }


async def ask(
    client: httpx.AsyncClient,
    model: str,
    task: Task,
    router: dict[str, Any] | None = None,
) -> Answer:
    """Ask one task and read its answer as a stream.

    Raises:
        RuntimeError: the gateway answered with an error.
    """
    body = body_of(model, task)
    if router:
        body["router"] = router
    began = time.perf_counter()
    ttft_s = 0.0
    parts = []
    usage: dict[str, int] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError(
                f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}"
            )
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(f"the stream ended with: {chunk['error']}")
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    ttft_s = ttft_s or time.perf_counter() - began
                    parts.append(text)
        headers = response.headers
    text = "".join(parts)
    return Answer(
        task=task,
        text=text,
        right=check(task, text),
        model=headers["x-router-model"],
        decision_id=headers["x-router-decision-id"],
        fallback=headers["x-router-fallback"],
        ttft_s=ttft_s,
        latency_s=time.perf_counter() - began,
        prompt_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
    )


async def give_feedback(client: httpx.AsyncClient, answer: Answer) -> None:
    """Send the router a score: 1 if the answer was right, else 0."""
    body = {
        "decision_id": answer.decision_id,
        "score": float(answer.right),
        "source": "program",
    }
    (await client.post("/v1/feedback", json=body)).raise_for_status()


def run_stream(
    url: str,
    tasks: Sequence[Task],
    choose: Callable[[Task], str],
    label: str,
    concurrency: int = 4,
    feedback: Container[int] = (),
    router: dict[str, Any] | None = None,
    quiet: bool = False,
    headers: Mapping[str, str] | None = None,
) -> list[Answer]:
    """Ask all tasks and return their answers in the order of the tasks.

    Args:
        url: address of the gateway.
        tasks: the tasks to ask.
        choose: returns the `model` to ask for a task.
        label: text of the progress bar.
        concurrency: number of requests in flight.
        feedback: numbers of the tasks whose answers get a score.
        router: router options of every request.
        quiet: hides the progress bar.
        headers: of every request, as that with an API key.

    Raises:
        RuntimeError: the gateway answered with an error.
        httpx.HTTPError: it did not answer, or refused a score.
    """

    async def run() -> list[Answer]:
        answers: list[Answer | None] = [None] * len(tasks)
        waiting = iter(enumerate(tasks))
        limits = httpx.Limits(max_connections=2 * concurrency)
        async with httpx.AsyncClient(
            base_url=url, timeout=120, limits=limits, headers=headers
        ) as client:
            with tqdm(total=len(tasks), desc=label, disable=quiet, unit="req") as bar:

                async def work() -> None:
                    for i, task in waiting:
                        answer = await ask(client, choose(task), task, router)
                        if i in feedback:
                            await give_feedback(client, answer)
                        answers[i] = answer
                        bar.update()

                await asyncio.gather(*(work() for _ in range(concurrency)))
        return [answer for answer in answers if answer is not None]

    return asyncio.run(run())


def state(url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """State of the router.

    Raises:
        NoAnswerError: no gateway answers at this address.
        SystemExit: it asks for another API key.
    """
    try:
        answer = httpx.get(f"{url}/v1/router/state", headers=headers, timeout=10)
    except httpx.HTTPError as error:
        raise NoAnswerError(
            f"no gateway answers at {url} ({error}); `router up` starts it"
        ) from None
    if answer.status_code in (401, 403):
        raise SystemExit(
            "the gateway asks for an API key with the scopes infer, feedback and operate; put it into the environment "
            "variable ROUTER_API_KEY"
        )
    if answer.is_error:
        raise NoAnswerError(
            f"{url} answers {answer.status_code}, not as this router does; is it the gateway's URL?"
        )
    found: dict[str, Any] = answer.json()
    return found


def chat_models(url: str, headers: Mapping[str, str] | None = None) -> list[str]:
    """Names of the models that can chat, smallest first."""
    models = state(url, headers)["models"]
    return [name for name, model in models.items() if "chat" in model["tasks"]]
