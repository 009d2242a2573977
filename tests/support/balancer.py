"""A real HAProxy with the shipped deploy/haproxy/haproxy.cfg, in front of two fake gateways."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import httpx

from deployments import errors
from tests.support.debian import debian

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deploy/haproxy/haproxy.cfg"
# changes for gateways without API keys, which trust no forwarded headers
KEYLESS = {
    "    http-request set-header x-forwarded-for %[src]\n": "",
    "    http-request set-header x-forwarded-proto %[ssl_fc,iif(https,http)]\n": "",
}
CHUNKS = 5  # of a stream
PAUSE_S = 0.2  # between two chunks


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def within(seconds: float, check: Callable[[], Any]) -> float:
    """Wait until the check holds; returns the seconds. Fails if it takes longer than `seconds`."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


class FakeGateway:
    """An HTTP server in its own thread that records its requests and returns their headers."""

    def __init__(self, name: str):
        self.name = name
        self.port = free_port()
        self.ready = True
        self.holds_streams = False  # after their first chunk
        # headers and `:path` of all requests but health checks
        self.requests: list[dict[str, str]] = []
        self.connections = 0  # connections with at least one such request
        self.may_send = inf  # chunks of each stream
        self.left = 0  # clients that left before their answer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._open: set[asyncio.StreamWriter] = set()
        self.start()

    def start(self) -> None:
        """Start listening."""
        made = asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self._server = asyncio.run_coroutine_threadsafe(made, self._loop).result(60)

    def kill(self) -> None:
        """Stop listening and abort every connection."""

        async def close() -> None:
            self._server.close()
            for writer in self._open:
                writer.transport.abort()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(60)

    def close(self) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._open.add(writer)
        first = True
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (
                    (await reader.readuntil(b"\r\n\r\n"))
                    .decode("latin-1")
                    .split("\r\n")
                )
                path = head[0].split()[1]
                headers = {
                    k.lower(): v.strip()
                    for k, _, v in (line.partition(":") for line in head[1:] if line)
                }
                await reader.readexactly(int(headers.get("content-length", 0)))
                if path == "/readyz":
                    self._answer(writer, 200 if self.ready else 503, {})
                    continue
                self.connections += first
                first = False
                self.requests.append({**headers, ":path": path})
                if path in ("/break", f"/break/{self.name}"):
                    writer.transport.abort()
                elif path == "/never":
                    try:
                        gone = await reader.read(1) == b""
                    except ConnectionError:
                        gone = True
                    self.left += gone
                elif path == "/stream":
                    await self._stream(writer)
                else:
                    self._answer(writer, 200, {"name": self.name, "headers": headers})
        self._open.discard(writer)
        writer.close()

    def _answer(
        self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]
    ) -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for i in range(CHUNKS):
            event = f"data: {self.name} {i}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(PAUSE_S)
            while self.holds_streams or i + 1 >= self.may_send:
                await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")


class Balancer:
    """HAProxy with the shipped configuration.

    Args:
        folder: folder of its files.
        gateways: the gateways behind it.
        changes: replacements in the configuration, for example shorter timeouts.
        variables: environment variables of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        gateways: list[FakeGateway],
        changes: dict[str, str] | None = None,
        **variables: str,
    ):
        text = CONFIG.read_text()
        for old, new in (changes or {}).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "haproxy.cfg").write_text(text)
        self.port = free_port()
        self.metrics_port = free_port()
        self.admin = str(folder / "admin.sock")
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "haproxy.log"
        environment = {
            **os.environ,
            "LISTEN": f"127.0.0.1:{self.port}",
            "METRICS": f"127.0.0.1:{self.metrics_port}",
            "ADMIN": self.admin,
            **variables,
            **{
                f"GATEWAY_{name}": f"127.0.0.1:{g.port}"
                for name, g in zip("AB", gateways)
            },
        }
        with self.log.open("wb") as log:
            command = [
                debian("haproxy", "haproxy"),
                "-db",
                "-f",
                str(folder / "haproxy.cfg"),
            ]
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        within(
            60, lambda: Path(self.admin).exists() or self._process.poll() is not None
        )
        assert self._process.poll() is None, self.log.read_text()

    def command(self, line: str) -> str:
        """Send a command to HAProxy's admin socket; returns its output."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(self.admin)
            s.sendall(f"{line}\n".encode())
            return b"".join(iter(lambda: s.recv(65536), b"")).decode()

    def names(self, requests: int = 6) -> list[str]:
        """Names of the gateways that answer a number of requests."""
        with httpx.Client(base_url=self.url) as client:
            return [client.get("/").json().get("name", "") for _ in range(requests)]

    def lines(self) -> list[dict[str, Any]]:
        """Lines of HAProxy's log so far."""
        return [
            json.loads(line)
            for line in self.log.read_text().splitlines()
            if line.startswith("{")
        ]

    def logged(self, request_id: str) -> list[dict[str, Any]]:
        """Lines of HAProxy's log about one request."""
        return [line for line in self.lines() if line["request_id"] == request_id]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()


@contextlib.contextmanager
def balanced(
    folder: Path, changes: dict[str, str] | None = None, **variables: str
) -> Iterator[tuple[Balancer, list[FakeGateway]]]:
    """Start a load balancer with two gateways, and stop them at the end."""
    gateways = [FakeGateway("a"), FakeGateway("b")]
    try:
        balancer = Balancer(folder, gateways, changes, **variables)
        try:
            yield balancer, gateways
        finally:
            balancer.close()
    finally:
        for gateway in gateways:
            gateway.close()


Two = tuple[Balancer, list[FakeGateway]]


def is_openai_error(answer: httpx.Response, status: int) -> bool:
    """Whether an answer has this status, and the keys and type of the gateway's own errors."""
    error = answer.json()["error"]
    ours = errors.body(status, "")["error"]
    assert answer.headers["content-type"] == "application/json"
    return (
        answer.status_code == status
        and set(error) == set(ours)
        and error["type"] == ours["type"]
    )


def raw(port: int, *parts: bytes, pause_s: float = 0.0) -> httpx.Response:
    """Send raw bytes, such as a malformed request; returns the answer."""
    with socket.create_connection(("127.0.0.1", port), 15) as s:
        with contextlib.suppress(BrokenPipeError):  # the server may close early
            for part in parts:
                s.sendall(part)
                time.sleep(pause_s)
        received = b"".join(iter(lambda: s.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines[1:]]
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)  # type: ignore[arg-type]
