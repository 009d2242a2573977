"""Engines that only wait: what a request costs around the model, measured without one.

`EchoEngine` stands behind the same `LLMServer` seam as vLLM (RAYLLM_VLLM_ENGINE_CLS names it), with a set time to the
first token and per further token, asleep while it waits. `peer` is Ray's own OpenAI application on it, `floor` an
ingress that answers at once, and `python -m benchmarks.echo` the same answers from a bare HTTP server, for proxies
that want an OpenAI endpoint behind them.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

TTFT_S, TPOT_S = 0.010, 0.005  # unless the configuration says otherwise
PROMPT_TOKENS = 16  # what it reports; nobody counts


async def pace(tokens: int, ttft_s: float, tpot_s: float) -> AsyncIterator[int]:
    """Each token's number, at its time; late ones do not delay the next."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for i in range(tokens):
        if (wait := began + ttft_s + i * tpot_s - loop.time()) > 0:
            await asyncio.sleep(wait)
        yield i


def usage(tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}


def whole(model: str, tokens: int) -> dict[str, Any]:
    """A chat completion in one piece."""
    message = {"role": "assistant", "content": "echo " * tokens}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
    head = {"id": "chatcmpl-echo", "object": "chat.completion", "created": 1_700_000_000, "model": model}
    return {**head, "choices": [choice], "usage": usage(tokens)}


async def stream(model: str, tokens: int, with_usage: bool, ttft_s: float, tpot_s: float) -> AsyncIterator[str]:
    """A chat completion as server-sent events, one token each."""
    head = {"id": "chatcmpl-echo", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": model}
    async for i in pace(tokens, ttft_s, tpot_s):
        delta = {"role": "assistant", "content": "echo "} if i == 0 else {"content": "echo "}
        choice = {"index": 0, "delta": delta, "finish_reason": "length" if i == tokens - 1 else None}
        yield f"data: {json.dumps({**head, 'choices': [choice]}, separators=(',', ':'))}\n\n"
    if with_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(tokens)}, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"


class EchoEngine:
    """What LLMServer needs of an engine, and no more.

    Args:
        llm_config: its `experimental_configs` may set `echo_ttft_s`, `echo_tpot_s`, and `echo_slots`: how many it
            answers at a time, in one piece; the others queue.
    """

    def __init__(self, llm_config: Any) -> None:
        options = llm_config.experimental_configs or {}
        self._model = llm_config.model_id
        self._ttft_s, self._tpot_s = options.get("echo_ttft_s", TTFT_S), options.get("echo_tpot_s", TPOT_S)
        self._slots = asyncio.Semaphore(options.get("echo_slots", 100_000))
        outputs = SimpleNamespace(update_scheduler_stats=None, get_num_unfinished_requests=lambda: 0)
        self._engine_client = SimpleNamespace(output_processor=outputs)  # where the watchdog listens

    async def start(self) -> None:
        """Nothing to load."""

    async def check_health(self) -> None:
        """Always well."""

    async def is_sleeping(self) -> bool:
        """Never: it answers."""
        return False

    async def shutdown(self) -> None:
        """Nothing to end."""

    async def resolve_lora(self, lora_model: Any) -> None:
        """There are none."""

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """As LLMEngine.chat."""
        from ray.serve.llm.openai_api_models import ChatCompletionResponse

        tokens = request.max_completion_tokens or request.max_tokens or 1
        if request.stream:
            shown = bool(request.stream_options and request.stream_options.include_usage)
            async for chunk in stream(self._model, tokens, shown, self._ttft_s, self._tpot_s):
                yield chunk
            return
        async with self._slots:
            await asyncio.sleep(self._ttft_s + (tokens - 1) * self._tpot_s)
        yield ChatCompletionResponse(**whole(self._model, tokens))

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncIterator[Any]:
        """Only for the warm-up."""
        from ray.serve.llm.openai_api_models import CompletionResponse

        if request.stream:
            yield "data: [DONE]\n\n"
            return
        choice = {"index": 0, "text": "echo", "finish_reason": "length"}
        yield CompletionResponse(model=self._model, choices=[choice], usage=usage(1))


def peer(args: dict[str, Any]) -> Any:
    """Ray's own OpenAI application: `args` as of ray.serve.llm.build_openai_app."""
    from ray.serve.llm import build_openai_app

    return build_openai_app(args)


def floor(args: dict[str, Any]) -> Any:
    """The least that an HTTP answer costs here."""
    from fastapi import FastAPI
    from ray import serve

    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat() -> dict[str, str]:
        return {"object": "chat.completion"}

    options = {"num_replicas": 1, "max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(serve.ingress(app)(type("Floor", (), {})), name="Floor", **options).bind()


def endpoint() -> Any:
    """The same answers from a bare HTTP server."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def chat(request: Request) -> Response:
        body = await request.json()
        tokens = body.get("max_tokens") or 1
        if body.get("stream"):
            shown = bool((body.get("stream_options") or {}).get("include_usage"))
            chunks = stream(body["model"], tokens, shown, TTFT_S, TPOT_S)
            return StreamingResponse(chunks, media_type="text/event-stream")
        await asyncio.sleep(TTFT_S + (tokens - 1) * TPOT_S)
        return JSONResponse(whole(body["model"], tokens))

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser(description="a bare OpenAI endpoint that only waits")
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(endpoint(), host="127.0.0.1", port=parser.parse_args().port, log_level="warning", access_log=False)
