"""A load generator with a process of its own: `python -m benchmarks.serving.load_generator PLAN FILE`.

PLAN is JSON, and so is the report in FILE.

Open loop: requests are sent at the times of a seeded Poisson process, independent of the answers. Latency counts from
the intended time of sending, so a stalled server cannot hide the waiting that it caused ("coordinated omission").

Closed loop: each of a number of clients sends its next request as soon as it has its answer. This finds saturation.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LoadPlan:
    """The requests to send.

    url: address of the chat completions.
    models: names that are asked for in turn.
    rate: requests a second of the open loop; 0 selects the closed loop.
    clients: clients of the closed loop.
    seconds: duration in which requests are sent.
    tokens: tokens of each answer.
    stream: whether answers are streamed.
    seed: seed of the sending times.
    """

    url: str
    models: tuple[str, ...]
    rate: float = 0.0
    clients: int = 32
    seconds: float = 5.0
    tokens: int = 1
    stream: bool = False
    seed: int = 0


@dataclass
class Report:
    """The results of a run; times in seconds.

    latency_s, ttft_s: successful answers, from the intended time of sending.
    per_token_s: time between the first and the last chunk of a stream, per token.
    chunks: number of chunks of all streams.
    lag_s: delay of each request against its intended time, caused by the generator itself.
    status: number of answers by HTTP status or by the name of the error.
    fallbacks: number of answers by the reason of their fallback.
    models: number of answers by model.
    """

    elapsed_s: float = 0.0
    latency_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    chunks: int = 0
    status: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)


QUESTIONS = (
    "What is 347 plus 586?",
    "Please be exact. Tom has 47 coins. Tom buys 6 bags with 58 coins in each. How many coins does Tom have now?",
    "Quick: reverse the word planet.",
    "Sort these numbers from small to large: 9 4 7 1 8.",
)


class Load:
    """A run of a plan."""

    def __init__(self, plan: LoadPlan, session: aiohttp.ClientSession):
        self._plan = plan
        self._session = session
        self._sent = 0
        self.report = Report()
        self._headers = {
            "content-type": "application/json",
            "authorization": "Bearer none",
        }

    def _body(self) -> bytes:
        plan = self._plan
        i = self._sent
        self._sent += 1
        body = {
            "model": plan.models[i % len(plan.models)],
            "messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
            "max_tokens": plan.tokens,
            "stream": plan.stream,
        }
        return json.dumps(body).encode()

    async def ask(self, intended: float) -> None:
        """Send one request; its latency counts from the intended time."""
        report = self.report
        clock = time.perf_counter
        report.lag_s.append(max(0.0, clock() - intended))
        first = last = 0.0
        try:
            async with self._session.post(
                self._plan.url, data=self._body(), headers=self._headers
            ) as answer:
                async for _ in answer.content.iter_any():
                    last = clock()
                    first = first or last
                    report.chunks += 1
                report.status[str(answer.status)] += 1
                report.models[answer.headers.get("x-router-model", "")] += 1
                report.fallbacks[answer.headers.get("x-router-fallback", "none")] += 1
                if answer.status != 200:
                    return
        except (aiohttp.ClientError, TimeoutError) as error:
            report.status[type(error).__name__] += 1
            return
        report.latency_s.append(clock() - intended)
        report.ttft_s.append(first - intended)
        if self._plan.tokens > 1:
            report.per_token_s.append((last - first) / (self._plan.tokens - 1))

    async def open(self) -> None:
        """Send requests at random times, which depend only on the seed."""
        rng = random.Random(self._plan.seed)
        clock = time.perf_counter
        running = []
        began = intended = clock()
        while True:
            intended += rng.expovariate(self._plan.rate)
            if intended > began + self._plan.seconds:
                break
            # uvloop counts in milliseconds, so a sleep may end too soon
            while (wait := intended - clock()) > 0:
                await asyncio.sleep(wait)
            running.append(asyncio.create_task(self.ask(intended)))
        await asyncio.gather(*running)

    async def closed(self) -> None:
        """Run the clients; each sends its next request as soon as it has an answer."""
        end = time.perf_counter() + self._plan.seconds

        async def client() -> None:
            while (now := time.perf_counter()) < end:
                await self.ask(now)

        await asyncio.gather(*(client() for _ in range(self._plan.clients)))


async def run(plan: LoadPlan) -> Report:
    """Open connections by a few requests, then run the plan."""
    limits = aiohttp.TCPConnector(limit=0, keepalive_timeout=TIMEOUT_S)
    async with aiohttp.ClientSession(
        connector=limits, timeout=aiohttp.ClientTimeout(TIMEOUT_S)
    ) as session:
        await asyncio.gather(
            *(Load(plan, session).ask(time.perf_counter()) for _ in range(8))
        )
        load = Load(plan, session)
        began = time.perf_counter()
        await (load.open() if plan.rate else load.closed())
        load.report.elapsed_s = time.perf_counter() - began
        return load.report


def main(text: str) -> dict[str, Any]:
    """Run a plan given as JSON; returns the report as a dictionary."""
    given = json.loads(text)
    plan = LoadPlan(**{**given, "models": tuple(given["models"])})
    return vars(uvloop.run(run(plan)))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(sys.argv[1])))
