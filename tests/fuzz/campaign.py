"""Plays generated and mutated requests in one process, and measures the gateway meanwhile.

The time for which a callback holds the event loop is CPU time of the loop's thread, so other programs do not count.
"""

import asyncio
import ctypes
import gc
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tests.fuzz.mutations import Sent, mutated
from tests.support.gateway import Gateway
from tests.support.hostile_input import documented_refusal, fuzz, openai_shape

MAX_HOLD_S = 0.1  # of the event loop, by one callback
MAX_GROWTH_MB = 20.0
WARM = 2_000  # mutations before the memory is measured first


@dataclass
class Result:
    """What a campaign found.

    statuses: number of answers by status. failures: descriptions of requests whose answer was wrong.
    longest_s: of all callbacks. longest: the request that had it. grown_mb: memory since mutation WARM.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    longest: str = ""
    grown_mb: float = 0.0

    def held(self, most_hold_s: float = MAX_HOLD_S) -> bool:
        """Whether all bars held; `most_hold_s` is the bar of `longest_s`."""
        return (
            not self.failures
            and self.longest_s <= most_hold_s
            and self.grown_mb <= MAX_GROWTH_MB
        )


@contextmanager
def holds() -> Iterator[list[float]]:
    """The CPU time of the longest callback of any event loop, as the only item of the list."""
    longest = [0.0]
    run = asyncio.Handle._run

    def timed(self: Any) -> None:
        began = time.thread_time()
        run(self)
        longest[0] = max(longest[0], time.thread_time() - began)

    with mock.patch.object(asyncio.Handle, "_run", timed):
        yield longest


def memory_mb() -> float:
    """Resident memory of this process, without what was freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss) / 2**20


def describe(sent: Sent) -> str:
    """A request, short enough for a line."""
    return f"{sent.method} {sent.path} {sent.headers} {sent.raw[:400]!r} ({len(sent.raw)} bytes)"


def problem(status: int, headers: Any, body: Any) -> str:
    """What is wrong with an answer; "" if nothing is."""
    if status >= 500 and not documented_refusal(status, headers, body):
        return "a server error"
    if status >= 400 and not openai_shape(body):
        return "an error of another shape"
    return ""


def mutate(gateway: Gateway, count: int, seed: int) -> Result:
    """Send mutations; the same seed sends the same requests."""
    rng = random.Random(seed)
    result = Result()
    before_mb = 0.0
    with holds() as longest:
        for number in range(count):
            if number == min(WARM, count // 2):
                before_mb = memory_mb()
            for model in gateway.models.values():
                model.calls.clear()  # the fakes keep every body
            sent = mutated(rng)
            longest[0] = 0.0
            answer = gateway.client.request(
                sent.method, sent.path, content=sent.raw, headers=sent.headers
            )
            result.statuses[answer.status_code] += 1
            if longest[0] > result.longest_s:
                result.longest_s, result.longest = longest[0], describe(sent)
            body = None
            if answer.status_code >= 400:
                try:
                    body = answer.json()
                except ValueError:
                    body = answer.text
            if why := problem(answer.status_code, answer.headers, body):
                result.failures.append(
                    f"{number}: {why} {answer.status_code} {str(body)[:200]} to {describe(sent)}"
                )
    result.grown_mb = memory_mb() - before_mb
    return result


def generate(folder: Path, cases: int, seed: int) -> Counter[tuple[str, int]]:
    """Cases of schemathesis, which raise at the first wrong answer."""
    gateway = Gateway(folder)
    with gateway.client:
        return fuzz(gateway, cases, seed)
