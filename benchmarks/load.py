"""A load generator in a process of its own: `python -m benchmarks.load PLAN FILE`, the plan as JSON, the report too.

Open loop: requests leave at the times of a seeded Poisson process whatever the answers do, and latency counts from
the time at which a request should have left, so that a stalled server cannot hide the waiting it caused ("coordinated
omission"). Closed loop: so many clients, each of which asks again as soon as it was answered; that finds saturation.
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
class Plan:
    """What to send.

    url: of the chat completions. models: asked for in turn.
    rate: requests a second of the open loop; 0 for a closed loop of `clients`.
    seconds: how long requests leave. tokens: of each answer. stream: as server-sent events or in one piece.
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
    """What came back; times in seconds.

    latency_s, ttft_s: of the good answers, from the intended time of leaving.
    per_token_s: from the first piece of a stream to its last, per token between them. chunks: pieces of all streams.
    lag_s: how much later than intended each request left: the generator's own fault.
    status: answers by HTTP status, or the error's name. fallbacks: answers that the router did not decide in time.
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
    """One run of a plan."""

    def __init__(self, plan: Plan, session: aiohttp.ClientSession):
        self._plan, self._session, self._sent = plan, session, 0
        self.report = Report()
        self._headers = {"content-type": "application/json", "authorization": "Bearer none"}

    def _body(self) -> bytes:
        plan, i = self._plan, self._sent
        self._sent += 1
        body = {
            "model": plan.models[i % len(plan.models)],
            "messages": [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}],
            "max_tokens": plan.tokens,
            "stream": plan.stream,
        }
        return json.dumps(body).encode()

    async def ask(self, intended: float) -> None:
        """One request, timed from the moment at which it should have left."""
        report, clock = self.report, time.perf_counter
        report.lag_s.append(max(0.0, clock() - intended))
        first = last = 0.0
        try:
            async with self._session.post(self._plan.url, data=self._body(), headers=self._headers) as answer:
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
        """Requests at random times, the same for everybody with the same seed."""
        rng, clock, running = random.Random(self._plan.seed), time.perf_counter, []
        began = intended = clock()
        while True:
            intended += rng.expovariate(self._plan.rate)
            if intended > began + self._plan.seconds:
                break
            if (wait := intended - clock()) > 0:
                await asyncio.sleep(wait)
            running.append(asyncio.create_task(self.ask(intended)))
        await asyncio.gather(*running)

    async def closed(self) -> None:
        """Each client as fast as it is answered."""
        end = time.perf_counter() + self._plan.seconds

        async def client() -> None:
            while (now := time.perf_counter()) < end:
                await self.ask(now)

        await asyncio.gather(*(client() for _ in range(self._plan.clients)))


async def run(plan: Plan) -> Report:
    """Warm connections, then the plan."""
    limits = aiohttp.TCPConnector(limit=0, keepalive_timeout=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:
        await asyncio.gather(*(Load(plan, session).ask(time.perf_counter()) for _ in range(8)))
        load = Load(plan, session)
        began = time.perf_counter()
        await (load.open() if plan.rate else load.closed())
        load.report.elapsed_s = time.perf_counter() - began
        return load.report


def main(text: str) -> dict[str, Any]:
    """The report of a plan, both as plain data."""
    given = json.loads(text)
    plan = Plan(**{**given, "models": tuple(given["models"])})
    return vars(uvloop.run(run(plan)))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(sys.argv[1])))
