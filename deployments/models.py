"""One model size behind Ray Serve: vLLM through ray.serve.llm, deployed once per size as its own application.

`complete` and `generate` take a plain OpenAI request body and give bytes that go to the client as they are, so that
nobody else needs to import vLLM, and with the last of them what was measured. A whole answer is a call of its own: it
costs both sides much less than a stream of one.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest, EmbeddingRequest, ErrorResponse
from vllm.config import StructuredOutputsConfig
from vllm.exceptions import GenerationError, VLLMClientError

from deployments import dataplane, orphans
from deployments.errors import is_branch
from deployments.grammar import is_constrained
from deployments.watchdog import ANSWER_S, Watchdog

REQUESTS: dict[str, TypeAdapter[Any]] = {  # adapters, as one of them is a union of two
    "chat": TypeAdapter(ChatCompletionRequest),
    "completion": TypeAdapter(CompletionRequest),
    "embed": TypeAdapter(EmbeddingRequest),
}
WARM_UP: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
    "completion": {"prompt": "Hello", "max_tokens": 8},
    "embed": {"input": "Hello"},
}
DATA = "data: "
FAILED, DONE = DATA + '{"error":', DATA + "[DONE]"
ORIGIN = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")  # the time and the line of its own code that xgrammar puts first
UNCOMPILED = "the engine could not compile the schema, or the model could not follow it; simplify the schema"


class ModelServer(LLMServer):  # type: ignore[misc]
    """An LLMServer that speaks bytes, has answered once before it reports ready, notices when its engine hangs, and
    leaves no engine behind.
    """

    _constrained = 0  # requests under way whose grammar the engine compiles

    async def __init__(self, llm_config: Any, **options: Any) -> None:  # type: ignore[misc]
        dataplane.on_loopback()
        orphans.guard()
        # vLLM's own choice, "auto", gives all requests the compiler that the first one happened to need
        if "structured_outputs_config" not in llm_config.engine_kwargs:
            llm_config.update_engine_kwargs(structured_outputs_config=StructuredOutputsConfig(backend="xgrammar"))
        await super().__init__(llm_config, **options)
        self._watchdog = Watchdog(self.engine._engine_client.output_processor, lambda: self._constrained)
        tasks = ("embed",) if llm_config.engine_kwargs.get("runner") == "pooling" else ("chat", "completion")
        for task in tasks:  # the first request compiles and allocates for many seconds
            await self.complete(task, WARM_UP[task])
            if task != "embed":
                async for _ in self.generate(task, {**WARM_UP[task], "stream": True}):
                    pass

    async def check_health(self) -> None:
        """Serve asks every `health_check_period_s`, and replaces the replica when this raises three times in a row.

        Raises:
            HungEngineError: the engine makes no tokens. TimeoutError: it answers nothing at all.
            EngineDeadError: vLLM's, when its process is gone.
        """
        await super().check_health()
        self._watchdog.check()
        async with asyncio.timeout(ANSWER_S):
            await self.engine.is_sleeping()  # any call that goes to the engine's process and back

    async def complete(self, task: str, body: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Answer one request in one piece.

        Args:
            task: chat, completion or embed.
            body: the request in OpenAI's shape, without `model`.

        Returns:
            Bytes for the client, and a report: `prompt_tokens`, `output_tokens`, `finish_reason`; or `error` (OpenAI's
            error object) and `status` (of HTTP).
        """
        if task == "embed":
            body = {key: value for key, value in body.items() if key != "stream"}
        request = self._request(task, body)
        if isinstance(request, dict):
            return b"", request
        method = {"chat": self.chat, "completion": self.completions, "embed": self.embeddings}[task]
        answer = b"", _failure("the engine gave no answer", 500)
        with self._counted(body):
            try:
                async for item in await method(request):  # to its end: the engine cleans up after it
                    answer = _whole(item)
            except GenerationError:  # what a stream tells as its last event
                answer = b"", _failure("the engine failed; its log says why", 500)
        return answer[0], self._blamed(answer[1], body)

    async def generate(self, task: str, body: dict[str, Any]) -> AsyncIterator[tuple[bytes, dict[str, Any] | None]]:
        """Answer one request as a stream.

        Args:
            task: chat or completion.
            body: as of `complete`.

        Yields:
            (bytes for the client, None or, with the last item, a report as of `complete`).
        """
        shown = bool((body.get("stream_options") or {}).get("include_usage"))
        request = self._request(task, {**body, "stream_options": {"include_usage": True}})
        if isinstance(request, dict):
            yield b"", request
            return
        with self._counted(body):
            answer = await (self.chat if task == "chat" else self.completions)(request)
            report: dict[str, Any] = {"prompt_tokens": 0, "output_tokens": 0, "finish_reason": ""}
            async for items in answer:
                parts: list[str] = []
                for item in items if isinstance(items, list) else [items]:
                    if (failure := _failed(item, report)) is not None:
                        if parts:
                            yield "".join(parts).encode(), None
                        yield b"", self._blamed(failure, body)
                        return
                    if _read(item, report) or shown:
                        parts.append(item)
                if parts:
                    yield "".join(parts).encode(), None
            yield b"", report

    @contextmanager
    def _counted(self, body: dict[str, Any]) -> Iterator[None]:
        """While it is answered, the Watchdog knows that its grammar may be compiled."""
        constrained = is_constrained(body)
        self._constrained += constrained
        try:
            yield
        finally:
            self._constrained -= constrained

    def _blamed(self, report: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """The report as it is, or a refusal: an engine that lives and fails a request with a schema failed the schema.

        vLLM checks a schema before the engine compiles it, and some that pass fail there, or leave no token to choose.
        """
        if report.get("status", 0) < 500 or not is_constrained(body) or self.engine._engine_client.errored:
            return report
        return _failure(UNCOMPILED, 400, "response_format" if body.get("response_format") else "tools")

    def _request(self, task: str, body: dict[str, Any]) -> Any:
        """The engine's request, or a report that says what is wrong with it."""
        try:
            return REQUESTS[task].validate_python({"model": self._llm_config.model_id, **body})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"] if not is_branch(part))
            return _failure(f"{where}: {first['msg']}" if where else first["msg"], 400, where or None)
        except VLLMClientError as error:  # of vLLM's validators; no ValueError, so pydantic lets it pass
            return _failure(str(error.args[0]), 400, getattr(error, "parameter", None))


def _read(chunk: str, report: dict[str, Any]) -> bool:
    """Note the usage and the end of a stream; False if the chunk is only there because we asked for usage."""
    if '"choices":[]' in chunk and '"usage":{' in chunk:
        usage = json.loads(chunk.removeprefix(DATA))["usage"]
        report["prompt_tokens"], report["output_tokens"] = usage["prompt_tokens"], usage["completion_tokens"]
        return False
    if '"finish_reason":"' in chunk:
        report["finish_reason"] = json.loads(chunk.removeprefix(DATA))["choices"][0]["finish_reason"]
    return True


def _failed(item: Any, report: dict[str, Any]) -> dict[str, Any] | None:
    """What went wrong, if this item of a stream says so. vLLM catches everything, and ends the stream with the error as
    text; or, where a grammar did not compile, as if it were whole, but for a reason why it ended.
    """
    if isinstance(item, str):
        if item.startswith(DONE) and not report["finish_reason"]:
            return _failure("the engine ended the stream before its end", 500)
        if not item.startswith(FAILED):
            return None
        item = ErrorResponse.model_validate_json(item.removeprefix(DATA))
    return _whole(item)[1] if hasattr(item, "error") else None


def _whole(item: Any) -> tuple[bytes, dict[str, Any]]:
    if hasattr(item, "error"):  # the engine's ErrorResponse, of which there are several classes
        code = item.error.code if isinstance(item.error.code, int) else 500
        message = ORIGIN.sub("", item.error.message) if code < 500 else "the engine failed; its log says why"
        return b"", _failure(message, code, item.error.param)
    usage, choices = item.usage, getattr(item, "choices", None)
    report = {
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens or 0,
        "finish_reason": choices[0].finish_reason if choices else "",
    }
    return item.model_dump_json(exclude_none=True).encode(), report


def _failure(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}, "status": status}
