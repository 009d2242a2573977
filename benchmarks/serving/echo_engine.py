"""Engines that only sleep, to measure the cost of a request outside of the model.

`EchoEngine` replaces vLLM in `LLMServer`; the environment variable RAYLLM_VLLM_ENGINE_CLS selects it. It sleeps a fixed
time for the first token and for each further token. `peer` is Ray's own OpenAI application on this engine, and `floor`
is an ingress that answers at once. `python -m benchmarks.serving.echo_engine` gives the same answers from a bare HTTP
server, for proxies that need an OpenAI endpoint.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

TTFT_S = 0.010  # default time to the first token
TPOT_S = 0.005  # default time of a further token
PROMPT_TOKENS = 16  # reported for every prompt


async def pace(tokens: int, ttft_s: float, tpot_s: float) -> AsyncIterator[int]:
    """Yield the number of each token at its scheduled time. A late token does not delay the next one."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for i in range(tokens):
        if (wait := began + ttft_s + i * tpot_s - loop.time()) > 0:
            await asyncio.sleep(wait)
        yield i


def usage(tokens: int) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }


def whole(model: str, tokens: int) -> dict[str, Any]:
    """A chat completion that is not streamed."""
    message = {"role": "assistant", "content": "echo " * tokens}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "length",
        "logprobs": None,
    }
    head = {
        "id": "chatcmpl-echo",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": model,
    }
    return {**head, "choices": [choice], "usage": usage(tokens)}


async def stream(
    model: str, tokens: int, with_usage: bool, ttft_s: float, tpot_s: float
) -> AsyncIterator[str]:
    """A chat completion as server-sent events with one token each."""
    head = {
        "id": "chatcmpl-echo",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": model,
    }
    async for i in pace(tokens, ttft_s, tpot_s):
        delta = {"content": "echo "}
        if i == 0:
            delta = {"role": "assistant", **delta}
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": "length" if i == tokens - 1 else None,
        }
        yield f"data: {json.dumps({**head, 'choices': [choice]}, separators=(',', ':'))}\n\n"
    if with_usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(tokens)}, separators=(',', ':'))}\n\n"
    yield "data: [DONE]\n\n"


class EchoEngine:
    """The methods that LLMServer needs of an engine.

    Args:
        llm_config: its `experimental_configs` may set `echo_ttft_s`, `echo_tpot_s` and `echo_slots`, the number of
            concurrent answers without streaming; further requests queue.
    """

    def __init__(self, llm_config: Any) -> None:
        options = llm_config.experimental_configs or {}
        self._model = llm_config.model_id
        self._ttft_s = options.get("echo_ttft_s", TTFT_S)
        self._tpot_s = options.get("echo_tpot_s", TPOT_S)
        self._slots = asyncio.Semaphore(options.get("echo_slots", 100_000))
        outputs = SimpleNamespace(
            update_scheduler_stats=None, get_num_unfinished_requests=lambda: 0
        )
        # the watchdog replaces `update_scheduler_stats`
        # no backend: the engine compiles no grammars
        grammars = SimpleNamespace(backend="")
        self._engine_client = SimpleNamespace(
            output_processor=outputs,
            vllm_config=SimpleNamespace(structured_outputs_config=grammars),
        )

    async def start(self) -> None:
        """Do nothing: no model is loaded."""

    async def check_health(self) -> None:
        """Do nothing: the engine is always healthy."""

    async def is_sleeping(self) -> bool:
        """False: the engine never sleeps in vLLM's sense."""
        return False

    async def shutdown(self) -> None:
        """Do nothing: no process runs."""

    async def resolve_lora(self, lora_model: Any) -> None:
        """Do nothing: the engine has no adapters."""

    async def chat(
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncIterator[Any]:
        """Answer a chat request like LLMEngine.chat."""
        from ray.serve.llm.openai_api_models import ChatCompletionResponse

        tokens = request.max_completion_tokens or request.max_tokens or 1
        if request.stream:
            shown = bool(
                request.stream_options and request.stream_options.include_usage
            )
            async for chunk in stream(
                self._model, tokens, shown, self._ttft_s, self._tpot_s
            ):
                yield chunk
            return
        async with self._slots:
            await asyncio.sleep(self._ttft_s + (tokens - 1) * self._tpot_s)
        yield ChatCompletionResponse(**whole(self._model, tokens))

    async def completions(
        self, request: Any, raw_request_info: Any = None
    ) -> AsyncIterator[Any]:
        """Answer a completion of one token, which only the warm-up requests."""
        from ray.serve.llm.openai_api_models import CompletionResponse

        if request.stream:
            yield "data: [DONE]\n\n"
            return
        choice = {"index": 0, "text": "echo", "finish_reason": "length"}
        yield CompletionResponse(model=self._model, choices=[choice], usage=usage(1))


def peer(args: dict[str, Any]) -> Any:
    """Ray's own OpenAI application. `args` are those of ray.serve.llm.build_openai_app."""
    from ray.serve.llm import build_openai_app

    return build_openai_app(args)


def floor(args: dict[str, Any]) -> Any:
    """An application that answers every chat at once: the minimal cost of HTTP in Serve."""
    from fastapi import FastAPI
    from ray import serve

    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat() -> dict[str, str]:
        return {"object": "chat.completion"}

    options = {
        "num_replicas": 1,
        "max_ongoing_requests": 1000,
        "ray_actor_options": {"num_cpus": 0},
    }
    return serve.deployment(
        serve.ingress(app)(type("Floor", (), {})), name="Floor", **options
    ).bind()


def endpoint() -> Any:
    """A Starlette application that gives the answers of EchoEngine."""
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

    parser = argparse.ArgumentParser(
        description="a bare OpenAI endpoint that only sleeps"
    )
    parser.add_argument("--port", type=int, required=True)
    uvicorn.run(
        endpoint(),
        host="127.0.0.1",
        port=parser.parse_args().port,
        log_level="warning",
        access_log=False,
    )
