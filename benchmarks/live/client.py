"""A client that sends recorded load, with a process of its own: `python -m benchmarks.live.client`.

It reads a Plan from its standard input, and writes what was seen of each request to its standard output. While requests
are sent, it only keeps what arrives. It reads the answers when all are there, so that it takes little of the processor
that the system needs.
"""

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import msgspec
import uvloop

from benchmarks.live.plan import OK, TIMEOUT_S, Plan, Seen, Sending

PATH = "/v1/chat/completions"
WARM = 8  # connections that are opened before the first request
BROKEN = "broken stream"  # the status of an answer that ended with an error


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


@dataclass
class Reply:
    """An answer as it arrived.

    intended_s, sent_s, ended_s: on the clock of the process.
    pieces: bytes and when they arrived.
    """

    number: int
    intended_s: float
    sent_s: float
    status: str = ""
    ended_s: float = 0.0
    model: str = ""
    decision_id: str = ""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def seen(self, began_s: float) -> Seen:
        """What the client saw; times count from the intended time of sending."""
        sent_s = self.sent_s - began_s
        lag_s = self.sent_s - self.intended_s
        if self.status != OK:
            return Seen(self.number, self.status, sent_s, lag_s)
        first_s = 0.0
        text = []
        usage = _Usage()
        for at_s, data in self._events():
            if data == b"[DONE]":
                continue
            chunk = msgspec.json.decode(data, type=_Chunk)
            if chunk.error is not None:
                return Seen(self.number, BROKEN, sent_s, lag_s)
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first_s = first_s or at_s
                    text.append(choice.delta.content)
        return Seen(
            self.number,
            self.status,
            sent_s,
            lag_s,
            (first_s or self.ended_s) - self.intended_s,
            self.ended_s - self.intended_s,
            self.model,
            self.decision_id,
            "".join(text),
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def _events(self) -> Iterator[tuple[float, bytes]]:
        """The data of each server-sent event, and when its last byte arrived."""
        rest = b""
        for at_s, piece in self.pieces:
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                for line in event.split(b"\n"):
                    if line.startswith(b"data: "):
                        yield at_s, line[6:].strip()


class Client:
    """Sends the requests of a plan."""

    def __init__(self, session: aiohttp.ClientSession, plan: Plan):
        self._session = session
        self._plan = plan
        self._headers = {"content-type": "application/json", **plan.headers}
        self.replies: list[Reply] = []

    async def _ask(self, number: int, sending: Sending, intended_s: float) -> None:
        reply = Reply(number, intended_s, time.perf_counter())
        self.replies.append(reply)
        try:
            async with self._session.post(
                self._plan.url + PATH, data=bytes(sending.body), headers=self._headers
            ) as answer:
                async for piece in answer.content.iter_any():
                    reply.pieces.append((time.perf_counter(), piece))
                reply.status = str(answer.status)
                reply.model = answer.headers.get("x-router-model", "")
                reply.decision_id = answer.headers.get("x-router-decision-id", "")
        except (aiohttp.ClientError, TimeoutError) as error:
            reply.status = type(error).__name__
        reply.ended_s = time.perf_counter()

    async def warm(self) -> None:
        """Open connections."""

        async def one() -> None:
            async with self._session.get(self._plan.url + "/healthz") as answer:
                await answer.read()

        await asyncio.gather(*(one() for _ in range(WARM)))

    async def open(self, began_s: float) -> None:
        """Send every request at its time, whatever the answers do."""
        running = []
        for number, sending in enumerate(self._plan.sendings):
            intended_s = began_s + sending.at_s
            # uvloop counts in milliseconds, so a sleep may end too soon
            while (wait_s := intended_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            running.append(asyncio.create_task(self._ask(number, sending, intended_s)))
        await asyncio.gather(*running)

    async def closed(self, began_s: float) -> None:
        """Each client sends the next request as soon as it has its answer, until the time is over."""
        ends_s = began_s + self._plan.seconds
        waiting = iter(enumerate(self._plan.sendings))

        async def one() -> None:
            for number, sending in waiting:
                if (now_s := time.perf_counter()) >= ends_s:
                    return
                await self._ask(number, sending, now_s)

        await asyncio.gather(*(one() for _ in range(self._plan.clients)))


async def send(plan: Plan) -> list[Seen]:
    """Carry out a plan; returns what was seen of each request that was sent, by its number.

    Raises:
        aiohttp.ClientError: no gateway answers.
    """
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=TIMEOUT_S),
        timeout=aiohttp.ClientTimeout(TIMEOUT_S),
    ) as session:
        client = Client(session, plan)
        await client.warm()
        began_s = time.perf_counter()
        await (client.closed(began_s) if plan.clients else client.open(began_s))
    seen = [reply.seen(began_s) for reply in client.replies]
    return sorted(seen, key=lambda one: one.number)


def send_apart(plan: Plan) -> list[Seen]:
    """Carry out a plan in a process of its own.

    Raises:
        SystemExit: the process failed; its own message is above this one.
    """
    command = [sys.executable, "-m", "benchmarks.live.client"]
    given = msgspec.json.encode(plan)
    ended = subprocess.run(command, input=given, stdout=subprocess.PIPE, check=False)
    if ended.returncode:
        raise SystemExit(f"the client of {plan.url} failed")
    try:
        return msgspec.json.decode(ended.stdout, type=list[Seen])
    except msgspec.DecodeError as error:
        size = len(ended.stdout)
        raise SystemExit(
            f"the client of {plan.url} wrote {size} bytes that are no report: {error}"
        ) from None


def main() -> None:
    """Carry out the plan of the standard input."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    # A collection would delay the requests of its moment.
    gc.disable()
    sys.stdout.buffer.write(msgspec.json.encode(uvloop.run(send(plan))))


if __name__ == "__main__":
    main()
