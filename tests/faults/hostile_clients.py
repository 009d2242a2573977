"""Checks of hostile clients of a running system: what an ordinary client notices (see catalogue.py).

The ordinary client sends requests at a steady rate from a process of its own, first alone and then beside the hostile
client.
"""

import asyncio
import gzip
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
import numpy as np

from tests.faults.catalogue import ALONE, Fault, Finding, System
from tests.faults.running_system import CHAT, cluster, headers

REQUESTS = 1_000
RATE = 20.0  # requests a second of the ordinary client
HOSTILE_RATE = 10.0  # of the hostile client: the default limit of a key
MAX_FACTOR = 2.0  # by which the ordinary client's p99 may grow
MAX_INCREASE_S = 0.05  # by which it may grow in any case
ORDINARY = {
    "model": "auto",
    "messages": [{"role": "user", "content": "What is 3 plus 5?"}],
    "max_tokens": 8,
}
ARMS = ("nano", "small", "large")


@dataclass(frozen=True)
class Measured:
    """Measurements of the ordinary client: seconds of each answer, and number of answers by status."""

    seconds: list[float]
    statuses: Counter[str]

    @property
    def p99_s(self) -> float:
        """99th percentile of the seconds of all answers."""
        return float(np.percentile(self.seconds, 99))

    @property
    def failed(self) -> int:
        """Number of requests without a successful answer."""
        return sum(count for status, count in self.statuses.items() if status != "200")


async def ordinary(url: str, requests: int) -> Measured:
    """Send requests at RATE, independent of earlier answers."""
    seconds: list[float] = []
    statuses: Counter[str] = Counter()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)

    async def ask(client: aiohttp.ClientSession) -> None:
        began = time.perf_counter()
        try:
            async with client.post(url + CHAT, json=ORDINARY) as answer:
                await answer.read()
                statuses[str(answer.status)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            statuses[type(error).__name__] += 1
        seconds.append(time.perf_counter() - began)

    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers()
    ) as client:
        began = time.perf_counter()
        tasks = []
        for i in range(requests):
            await asyncio.sleep(max(0.0, began + i / RATE - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client)))
        await asyncio.gather(*tasks)
    return Measured(seconds, statuses)


async def measure(url: str, requests: int = REQUESTS) -> Measured:
    """Run the ordinary client in its own process, so that the hostile client does not slow it down."""
    command = (sys.executable, "-m", "tests.faults.hostile_clients", url, str(requests))
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE
    )
    found = json.loads((await process.communicate())[0])
    return Measured(found["seconds"], Counter(found["statuses"]))


def replicas(system: System) -> set[str]:
    """Names of all replicas of Serve. A replacement has a new name."""
    url = cluster(system).url("Ray dashboard") + "/api/serve/applications/"
    applications = httpx.get(url, timeout=30).json()["applications"].values()
    deployments = [
        deployment for a in applications for deployment in a["deployments"].values()
    ]
    return {
        replica["replica_id"]
        for deployment in deployments
        for replica in deployment["replicas"]
    }


async def unavailable(url: str) -> int:
    """Number of requests to models by name that an open circuit breaker refuses, over all ingresses."""
    refused = 0
    async with aiohttp.ClientSession(headers=headers()) as client:
        for arm in ARMS * 6:
            async with client.post(
                url + CHAT, json={**ORDINARY, "model": arm}
            ) as answer:
                refused += answer.status == 503
    return refused


def beside(
    hostile: Callable[[str], Awaitable[Counter[str]]],
) -> Callable[[System], Finding]:
    """A check that plays the ordinary client alone and then beside this hostile client."""

    def check(system: System) -> Finding:
        async def run() -> Finding:
            await measure(system.url, 100)
            before = await measure(system.url)
            there = replicas(system)
            attack = asyncio.create_task(_again_and_again(hostile, system.url))
            during = await measure(system.url)
            attack.cancel()
            answers = await attack
            opened = await unavailable(system.url)
            replaced = len(there - replicas(system))
            limit_s = max(MAX_FACTOR * before.p99_s, before.p99_s + MAX_INCREASE_S)
            figure = (
                f"p99 {1000 * before.p99_s:.0f} ms before, {1000 * during.p99_s:.0f} ms during (bound "
                f"{1000 * limit_s:.0f}), {during.failed} of {len(during.seconds)} failed, {opened} refused by a "
                f"breaker, {replaced} replicas replaced; hostile answers {dict(sorted(answers.items()))}"
            )
            held = during.p99_s <= limit_s and during.failed == opened == replaced == 0
            return Finding(figure, held)

        return asyncio.run(run())

    return check


async def _again_and_again(
    hostile: Callable[[str], Awaitable[Counter[str]]], url: str
) -> Counter[str]:
    """Play the hostile client until cancelled; returns the number of its answers by status."""
    answers: Counter[str] = Counter()
    try:
        while True:
            answers += await hostile(url)
    except asyncio.CancelledError:
        return answers


def sends(
    *bodies: bytes, path: str = CHAT, at_once: int = 1
) -> Callable[[str], Awaitable[Counter[str]]]:
    """A hostile client that sends these bodies, `at_once` of them together, at the rate limit of a key."""
    waiting = itertools.cycle(bodies)

    async def play(url: str) -> Counter[str]:
        return await _send(url + path, [next(waiting) for _ in range(at_once)])

    return play


def in_turn(
    *players: Callable[[str], Awaitable[Counter[str]]],
) -> Callable[[str], Awaitable[Counter[str]]]:
    """A hostile client that plays one of these after the other."""
    waiting = itertools.cycle(players)

    async def play(url: str) -> Counter[str]:
        return await next(waiting)(url)

    return play


async def _send(url: str, bodies: list[bytes]) -> Counter[str]:
    answers: Counter[str] = Counter()
    options = {"content-type": "application/json", **headers()}
    timeout = aiohttp.ClientTimeout(total=30)

    async def one(client: aiohttp.ClientSession, body: bytes) -> None:
        try:
            async with client.post(url, data=body, headers=options) as answer:
                await answer.read()
                answers[str(answer.status)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            answers[type(error).__name__] += 1

    async with aiohttp.ClientSession(timeout=timeout) as client:
        await asyncio.gather(*(one(client, body) for body in bodies))
    await asyncio.sleep(len(bodies) / HOSTILE_RATE)
    return answers


def with_schema(schema: Any) -> bytes:
    """Body of a chat whose answer must follow this schema."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return json.dumps({**ORDINARY, "response_format": form}).encode()


def text(pattern: str) -> dict[str, str]:
    """Schema of a string with this pattern."""
    return {"type": "string", "pattern": pattern}


def largest() -> Iterator[bytes]:
    """Bodies with schemas just within the limits. All differ, so that no engine has compiled them before."""
    for i in range(2_000):
        yield with_schema(text(f"^x{i}" + "([a-z]{0,5}[0-9]{0,4}){0,9}$"))


def half_open(count: int, head: bytes) -> Callable[[str], Awaitable[Counter[str]]]:
    """A hostile client that opens many connections, sends the beginning of a request on each, and waits."""

    async def play(url: str) -> Counter[str]:
        host = httpx.URL(url).host
        port = httpx.URL(url).port
        writers: list[asyncio.StreamWriter] = []
        try:
            for _ in range(count):
                _, writer = await asyncio.open_connection(host, port)
                writer.write(head)
                writers.append(writer)
            await asyncio.sleep(12)
        except OSError:
            pass
        finally:
            for writer in writers:
                writer.close()
        return Counter({"connections": len(writers)})

    return play


def tools(pattern: str, count: int) -> bytes:
    """Body of a chat that must call one of `count` tools."""
    parameters = {"type": "object", "properties": {"a": text(pattern)}}
    function = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return json.dumps(
        {**ORDINARY, "tools": [function] * count, "tool_choice": "required"}
    ).encode()


def megabyte(item: str, opening: str, closing: str) -> bytes:
    """Body of a megabyte in which every item is wrong."""
    count = (1_000_000 - len(opening) - len(closing)) // (len(item) + 1)
    return (opening + ",".join([item] * count) + closing).encode()


def chat(content: str = "x", **change: Any) -> bytes:
    """Body of a chat."""
    messages = [{"role": "user", "content": content}]
    body = {**ORDINARY, "messages": messages, **change}
    return json.dumps(body, ensure_ascii=False).encode()


def doubling(word: str) -> dict[str, Any]:
    """Schema of 60 definitions, each of which refers twice to the next one."""
    parts: dict[str, Any] = {
        f"a{i}": {word: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**parts, "a60": {"type": "null"}}}


def pattern_prompts(opening: str, closing: str) -> bytes:
    """Body of a calibration whose references are patterns of this form; the last one is wrong."""
    patterns = [*(f"{opening}{i}{closing}" for i in range(1_000)), "("]
    prompts = [{"prompt": "x", "reference": p, "grade": "regex"} for p in patterns]
    return json.dumps({"prompts": prompts}).encode()


PROPERTIES = {f"p{i}": {"type": "integer"} for i in range(600)}
MESSAGE = '{"model":"auto","messages":[{"role":"user","content":['
COMPLETION = {"model": "auto", "prompt": "3 plus 5 is", "max_tokens": 4}
ODD = {"logprobs": 0, "echo": True, "stream": True}
ODD_COMPLETIONS = [
    {"n": 2, **ODD},
    {"n": 3, **ODD},
    {"n": 4, **ODD},
    {"n": 2, **ODD, "logprobs": 5},
]
BAR = "p99 ≤ 2 × or + 50 ms, 0, 0, 0"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"

FAULTS = [
    Fault("T30", what, BAR, beside(hostile), "state", ALONE)
    for what, hostile in {
        "patterns that a check could read for long": sends(
            with_schema(text("{" + " " * 998)),
            tools("{" + " " * 998, 100),
            with_schema(text("[" * 999)),
        ),
        "schemas that take an engine minutes": sends(
            with_schema(text("^((a?){1,128}){1,128}$")),
            with_schema(
                {
                    "type": "object",
                    "properties": PROPERTIES,
                    "minProperties": 300,
                    "maxProperties": 400,
                }
            ),
            with_schema(text("^(([a-z]{0,128})[0-9]{0,128}){0,128}$")),
            tools("^((a?){1,100}){1,100}$", 20),
        ),
        "schemas just within the limits": sends(*largest()),
        "schemas that an engine fails": sends(
            with_schema({"$ref": "#"}),
            with_schema({"const": "\u202e"}),
            with_schema(text("a\x00b")),
            with_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
            at_once=4,
        ),
        "completions that an engine fails": sends(
            *(json.dumps(COMPLETION | odd).encode() for odd in ODD_COMPLETIONS),
            path="/v1/completions",
        ),
        "bodies that are wrong in 300,000 places": sends(
            megabyte("{}", MESSAGE, "]}]}"),
            megabyte('"a":1', '{"model":"auto",', "}"),
            megabyte("1", '{"model":"auto","messages":[', "]}"),
            megabyte("[]", '{"model":"auto","messages":[],"tools":[', "]}"),
        ),
        "2,050 requests whose body does not come": half_open(
            2_050, b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
        ),
        "1,500 chats whose body does not come": half_open(
            1_500, HEAD + b"content-length: 100\r\n\r\n{"
        ),
        "1,500 heads that do not end": half_open(1_500, HEAD),
    }.items()
]
FAULTS += [
    Fault("T31", what, BAR, beside(hostile), "state", ALONE)
    for what, hostile in {
        "schemas whose references multiply": sends(
            with_schema(doubling("anyOf")),
            with_schema(doubling("allOf")),
            with_schema({"enum": [f"{i:05d}" for i in range(3_000)]}),
            with_schema(text("^(?!a)b$|^c$")),
            with_schema({"$ref": "#/$defs/x"}),
            with_schema(text("[z-a]")),
        ),
        "odd numbers, keys and bytes": sends(
            chat()[:-1] + b',"temperature":1e999}',
            chat()[:-1] + b',"seed":' + b"9" * 900_000 + b"}",
            chat()[:-1] + b',"metadata":{"a":' + b"[" * 400_000 + b"}}",
            b"{" + b'"model":"auto",' * 60_000 + chat()[1:],
            chat(**{"k" * 900_000: 1}),
            chat(stop=["x"] * 200_000),
            chat(logit_bias={str(i): 1 for i in range(50_000)}),
            gzip.compress(b" " * 2**24),
            chat().decode().encode("utf-16"),
        ),
        "texts that are long to read": sends(
            chat("a" * 399_999),
            chat("a" + "\u0301" * 399_000),
            chat("\ufdfa" * 300_000),
            chat("1 - " * 99_000),
            chat(("1" + " " * 3_990) * 50),
            chat(messages=[{"role": "user", "content": "a b"}] * 2_048),
        ),
        "scores and calibrations that are wrong everywhere": in_turn(
            sends(
                b'{"decision_id":"a","score":' + b"9" * 5_000 + b"}",
                b"[" + b"1," * 400_000 + b"1]",
                b'{"decision_id":"' + b"d" * 900_000 + b'","score":1}',
                path="/v1/feedback",
            ),
            sends(
                pattern_prompts("(" * 20, "){2}" * 20),
                pattern_prompts("(" * 6, "){2}" * 6),
                json.dumps({"prompts": [{"q": 1}] * 2_000}).encode(),
                path="/v1/router/calibrations",
            ),
        ),
    }.items()
]


if __name__ == "__main__":
    measured = asyncio.run(ordinary(sys.argv[1], int(sys.argv[2])))
    print(json.dumps({"seconds": measured.seconds, "statuses": measured.statuses}))
