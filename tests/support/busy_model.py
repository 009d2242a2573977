"""Load that keeps one model busy, from a process of its own: the tests' process then has time for its own requests."""

import asyncio
import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event

import httpx

from assets.tasks import make_task

CLIENTS = 24
TIMEOUT_S = 180.0
LONG_KINDS = ("chain", "multiply", "story")  # of tasks, with answers in many steps


@contextmanager
def busy_model(system: str, model: str) -> Iterator[None]:
    """Keep a model busy with clients that ask without pause; they are warmed up when the block begins."""
    spawn = multiprocessing.get_context("spawn")
    warm = spawn.Event()
    stop = spawn.Event()
    load = spawn.Process(target=_load, args=(system, model, warm, stop), daemon=True)
    load.start()
    try:
        assert warm.wait(TIMEOUT_S), f"no answers of {model} within {TIMEOUT_S:g} s"
        yield
    finally:
        stop.set()
        load.join(TIMEOUT_S)


def _load(system: str, model: str, warm: Event, stop: Event) -> None:
    asyncio.run(_ask_forever(system, model, warm, stop))


async def _ask_forever(system: str, model: str, warm: Event, stop: Event) -> None:
    answered = 0

    async def work(client: httpx.AsyncClient, rng: random.Random) -> None:
        nonlocal answered
        while not stop.is_set():
            question = make_task(rng, rng.choice(LONG_KINDS)).question
            body = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                # four answers in one piece: much work for the engine, and little for this client
                "n": 4,
                "max_tokens": 200,
            }
            answer = await client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            answered += 1
            if answered >= CLIENTS:
                warm.set()

    async with httpx.AsyncClient(base_url=system, timeout=TIMEOUT_S) as client:
        await asyncio.gather(*(work(client, random.Random(i)) for i in range(CLIENTS)))
