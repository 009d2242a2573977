"""A small gateway over HTTP, in a thread: answers known questions at once, and records what it was asked."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

PRICES = {"nano": 0.1e-6, "small": 0.3e-6, "large": 1e-6, "general": 0.2e-6}
TOKENS = (7, 3)  # prompt, output


@dataclass
class LiveGateway:
    """What the gateway knows, and what it was asked.

    answers: by question; another question gets "?".
    refuses: whether it refuses a request, by its model and number.
    replicas: of each model that chats; a look at the state removes one of them, until one is left.
    asked: model and question of each request. scores: by decision. looked_up: decisions.
    """

    answers: Mapping[str, str]
    refuses: Callable[[str, int], bool] = lambda model, number: False
    replicas: int = 1
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    looked_up: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application()
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/v1/router/state", self._state)
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/v1/feedback", self._score)
        app.router.add_get("/v1/router/decisions/{name}", self._decision)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def _state(self, _: web.Request) -> web.Response:
        models = {
            name: {
                "tasks": ["chat"],
                "variant_of": "",
                "prompt_price_usd": price,
                "output_price_usd": price,
                "replicas": self.replicas,
                "in_flight": 0,
            }
            for name, price in PRICES.items()
        }
        self.replicas = max(1, self.replicas - 1)
        embedder = {**models["nano"], "tasks": ["embed"], "replicas": 5}
        variant = {**models["large"], "variant_of": "large"}
        ordered = {
            "nano": models["nano"],
            "general": models["general"],
            "small": models["small"],
            "large": models["large"],
            "large-direct": variant,
            "minilm": embedder,
        }
        objective = {"latency_weight": 0.005, "cost_weight": 4000.0}
        return web.json_response({"models": ordered, "objective": objective})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        number = len(self.asked)
        model, question = body["model"], body["messages"][0]["content"]
        self.asked.append((model, question))
        if self.refuses(model, number):
            return web.json_response({"error": {"message": "full"}}, status=429)
        headers = {
            "x-router-model": "small" if model == "auto" else model,
            "x-router-decision-id": f"d{number}",
        }
        answer = web.StreamResponse(headers=headers)
        await answer.prepare(request)
        await answer.write(event({"choices": [{"delta": {"role": "assistant"}}]}))
        text = event(
            {"choices": [{"delta": {"content": self.answers.get(question, "?")}}]}
        )
        # a chunk may be divided anywhere
        await answer.write(text[:9])
        await answer.write(text[9:])
        usage = {"prompt_tokens": TOKENS[0], "completion_tokens": TOKENS[1]}
        await answer.write(event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
        return answer

    async def _score(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        self.scores[body["decision_id"]] = body["score"]
        return web.json_response({"status": "accepted"})

    async def _decision(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.looked_up.append(name)
        if name == "unknown":
            return web.json_response({}, status=404)
        if name == "late" and self.looked_up.count(name) == 1:
            return web.json_response({}, status=503)
        if name == "running" and self.looked_up.count(name) == 1:
            return web.json_response({"outcome": None})
        return web.json_response({"outcome": {"latency_s": 0.001}})


def event(data: object) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


@contextmanager
def serving(gateway: LiveGateway) -> Iterator[LiveGateway]:
    """The gateway at a free port, which its `url` then has."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(gateway.app())

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        gateway.url = f"http://127.0.0.1:{port}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield gateway
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
