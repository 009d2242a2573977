"""Serves one model with vLLM through ray.serve.llm; each model is deployed as an application of its own.

`complete` and `generate` take a plain OpenAI request body. They return bytes that go to the client as they are, so the
gateway need not import vLLM, and a ModelReport with the last bytes. An answer in one piece has a method of its own: it
costs both sides much less than a stream of one item.
"""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec import structs
from pydantic import TypeAdapter, ValidationError
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    ErrorResponse,
)
from vllm.config import StructuredOutputsConfig
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.exceptions import GenerationError, VLLMClientError

from deployments import runtime
from deployments.errors import is_branch
from deployments.grammars import checker as grammar_checker
from deployments.grammars import log_filter
from deployments.grammars.bounds import constraint_path, is_constrained
from deployments.grammars.checker import CPU_S, GrammarChecker
from deployments.grammars.log_filter import WARNING
from deployments.grammars.worker import FAILED, LATE, Verdict
from deployments.models import capabilities, context_length, process_reaper
from deployments.models.engine import Engine
from deployments.models.handle import ANSWERS_AS, Body, Item
from deployments.models.report import ModelError, ModelReport, failure
from deployments.models.thinking import name_thinking, with_both_names
from deployments.models.watchdog import ANSWER_S, Watchdog

REQUESTS: dict[str, TypeAdapter[Any]] = {  # adapters, as one of them is a union of two
    "chat": TypeAdapter(ChatCompletionRequest),
    "completion": TypeAdapter(CompletionRequest),
    "embed": TypeAdapter(EmbeddingRequest),
}
WARM_UP: dict[str, Body] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
    "completion": {"prompt": "Hello", "max_tokens": 8},
    "embed": {"input": "Hello"},
}
DATA = "data: "
ERROR_EVENT = DATA + '{"error":'
DONE = DATA + "[DONE]"
ENGINE_FAILED = "the engine failed; its log says why"
# what names parts of the engine and not of the request: its flags, classes and environment
ENGINE_CLASS = re.compile(r"[A-Z]\w*[a-z][A-Z]\w*|function-(before|after|wrap)\[.*")
ENGINE_WORDS = re.compile(
    r"(?<!\w)--\w|vllm|\w*Error\b|[A-Z][a-z]+[A-Z]\w*|environment variable|max_model_len",
)
NO_TOKEN = re.compile(r"[Tt]oken id \d+ is out of vocabulary")
# the field of a chunk
MODEL = re.compile(r'"model":"(?:[^"\\]|\\.)*"')
REFUSED = "the model's engine cannot answer this request as it is"
SIMPLER = "use fewer properties, shorter maxLength and maxItems, and smaller counts in patterns"
BUSY = "this model compiles the schemas of other requests; send this one again shortly"
SCHEMA_FAILED = (
    "the engine could not compile the schema, or the model could not follow it; "
    "simplify the schema"
)


def bound_grammars(llm_config: Any) -> None:
    """Choose the compiler of grammars, unless the configuration has chosen: one for all requests, and no free blanks.

    vLLM's default, "auto", gives all requests the compiler that the first one happened to need. A grammar that allows
    any white space lets a small model write blanks up to its limit.
    """
    if "structured_outputs_config" not in llm_config.engine_kwargs:
        llm_config.update_engine_kwargs(
            structured_outputs_config=StructuredOutputsConfig(
                backend="xgrammar", disable_any_whitespace=True
            )
        )


def read_adapters(llm_config: Any) -> None:
    """Turn the LoRA adapters of a configuration into what vLLM wants: records, where YAML has objects."""
    adapters = llm_config.engine_kwargs.get("lora_modules")
    if adapters:
        # an argument of vLLM's server, which Ray keeps apart from those of the engine
        llm_config.get_engine_config().frontend_kwargs["lora_modules"] = [
            LoRAModulePath(**adapter) for adapter in adapters
        ]


class ModelServer(LLMServer):  # type: ignore[misc]
    """An LLMServer that answers in bytes. It becomes ready after a first answer, detects a hung engine, and its engine
    never outlives it.
    """

    _default_engine_cls = Engine  # Ray's RAYLLM_VLLM_ENGINE_CLS may name another
    _constrained = 0  # requests under way whose grammar the engine compiles

    async def __init__(self, llm_config: Any, **options: Any) -> None:  # type: ignore[misc]
        runtime.bind_to_loopback()
        process_reaper.kill_children_on_exit()
        log_filter.filter_stderr()
        bound_grammars(llm_config)
        read_adapters(llm_config)
        await super().__init__(llm_config, **options)
        client = runtime.engine_client(self.engine)
        self._watchdog = Watchdog(client.output_processor, lambda: self._constrained)
        tasks: tuple[str, ...] = ("chat", "completion")
        if llm_config.engine_kwargs.get("runner") == "pooling":
            tasks = ("embed",)
        # the first request compiles kernels and allocates memory, which takes seconds
        for task in tasks:
            await self.complete(task, WARM_UP[task])
            if task != "embed":
                async for _ in self.generate(task, {**WARM_UP[task], "stream": True}):
                    pass
        backend = client.vllm_config.structured_outputs_config.backend
        if tasks != ("embed",) and backend == "xgrammar":
            checker = GrammarChecker(lambda: grammar_checker.vocabulary_of(client))
            client.generate = grammar_checker.guard(client.generate, checker)
            self._checker_starts = asyncio.create_task(checker.start())

    async def _start_engine(self) -> None:
        """Start the engine. Without Ray's statistics of usage, the report for them is left out: Ray starts a process of
        0.4 GB for it, and each engine waits for its answer.

        When Ray changes: look in `LLMServer._start_engine` for what it does beside `engine.start()`.
        """
        if runtime.reports_usage():
            await super()._start_engine()
        else:
            await self.engine.start()

    async def check_health(self) -> None:
        """Serve calls this every `health_check_period_s`, and replaces the replica when it raises three times in a row.

        Raises:
            HungEngineError: the engine makes no steps.
            TimeoutError: the engine's process does not answer a call.
            EngineDeadError: vLLM's, when the engine's process has ended.
        """
        await super().check_health()
        self._watchdog.check()
        async with asyncio.timeout(ANSWER_S):
            # any call that goes to the engine's process and back
            await self.engine.is_sleeping()

    async def complete(self, task: str, body: Body) -> tuple[bytes, ModelReport]:
        """Answer one request in one piece.

        Args:
            task: chat, completion or embed.
            body: the request in OpenAI's shape. Its `model`, if it has one, is an adapter of this application. The
                answer names what is under ANSWERS_AS as its model, by default this application.

        Returns:
            The bytes for the client, empty after an error; and the report.
        """
        if task == "embed":
            body = {key: value for key, value in body.items() if key != "stream"}
        request = self._request(task, body)
        if isinstance(request, ModelReport):
            return b"", request
        methods = {
            "chat": self.chat,
            "completion": self.completions,
            "embed": self.embeddings,
        }
        payload = b""
        report = failure(ENGINE_FAILED, 500)
        refused: list[Verdict] = []
        grammar_checker.refusals.set(refused)
        with self._count_constrained(body):
            try:
                # read to the end: the engine frees the request's memory after the last item
                async for item in await methods[task](request):
                    payload, report = _read_answer(item, body.get(ANSWERS_AS))
            except GenerationError:  # a stream gets this error as its last event
                payload, report = b"", failure(ENGINE_FAILED, 500)
        return payload, self._for_client(report, body, refused)

    async def generate(self, task: str, body: Body) -> AsyncIterator[Item]:
        """Answer one request as a stream.

        Args:
            task: chat or completion.
            body: as of `complete`.

        Yields:
            The bytes for the client; and None or, with the last item, the report.
        """
        options = body.get("stream_options")
        wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        asked = {"include_usage": True}
        if wants_usage and isinstance(options, dict):
            asked["continuous_usage_stats"] = bool(
                options.get("continuous_usage_stats")
            )
        request = self._request(task, {**body, "stream_options": asked})
        if isinstance(request, ModelReport):
            yield b"", request
            return
        name = body.get(ANSWERS_AS)
        refused: list[Verdict] = []
        grammar_checker.refusals.set(refused)
        with self._count_constrained(body):
            answer = await (self.chat if task == "chat" else self.completions)(request)
            report = ModelReport()
            async for items in answer:
                parts: list[str] = []
                for item in items if isinstance(items, list) else [items]:
                    failed = _stream_failure(item, report)
                    if failed is not None:
                        if parts:
                            yield "".join(parts).encode(), None
                        yield b"", self._for_client(failed, body, refused)
                        return
                    usage = _usage(item)
                    if usage is not None:
                        report = structs.replace(report, **usage)
                    elif '"finish_reason":"' in item:
                        report = structs.replace(
                            report, finish_reason=_finish_reason(item)
                        )
                    if usage is None or wants_usage:
                        parts.append(_named(with_both_names(item), name))
                if parts:
                    yield "".join(parts).encode(), None
            yield b"", report

    @contextmanager
    def _count_constrained(self, body: Body) -> Iterator[None]:
        """While the request is answered, the watchdog knows that the engine may compile the request's grammar."""
        constrained = is_constrained(body)
        self._constrained += constrained
        try:
            yield
        finally:
            self._constrained -= constrained

    def _for_client(
        self, report: ModelReport, body: Body, refused: Sequence[Verdict] = ()
    ) -> ModelReport:
        """The report with an error that the client can understand; `refused` is that of _attribute_failure."""
        report = self._attribute_failure(report, body, refused)
        if report.error is None or report.error.status >= 500:
            return report
        return structs.replace(report, error=_in_own_words(report.error, body))

    def _attribute_failure(
        self, report: ModelReport, body: Body, refused: Sequence[Verdict]
    ) -> ModelReport:
        """Turn a failure into a refusal where the request's schema caused it; other reports stay as they are.

        A schema that compiles may leave no token to choose. So if the engine is alive and fails a request with a
        schema, the schema is the cause.

        Args:
            report: of the answer.
            body: the request.
            refused: verdicts of the GrammarChecker.
        """
        if refused:
            return refusal(refused[0], _schema_path(body))
        if report.error is None or report.error.status < 500:
            return report
        if not is_constrained(body) or runtime.engine_client(self.engine).errored:
            return report
        return failure(SCHEMA_FAILED, 400, _schema_path(body))

    def _request(self, task: str, body: Body) -> Any:
        """The engine's request, or a report of what is wrong with the client's.

        Its id is that of the gateway's request, made unique: several clients may choose the same one.
        """
        unique_id = f"{runtime.serve_request_id()}-{uuid.uuid4().hex[:12]}".lstrip("-")
        named = {"model": self._llm_config.model_id, "request_id": unique_id}
        given = {key: value for key, value in body.items() if key != ANSWERS_AS}
        try:
            return REQUESTS[task].validate_python({**named, **given})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(
                str(part)
                for part in first["loc"]
                if not is_branch(part) and not ENGINE_CLASS.match(str(part))
            )
            message = f"{where}: {first['msg']}" if where else first["msg"]
            return self._for_client(failure(message, 400, where or None), body)
        except VLLMClientError as error:
            # raised by vLLM's validators; it is no ValueError, so pydantic lets it pass
            parameter = getattr(error, "parameter", None)
            refused = failure(str(error.args[0]), 400, parameter)
            return self._for_client(refused, body)


def _in_own_words(error: ModelError, body: Body) -> ModelError:
    """A refusal of the engine's in the words of this API."""
    longer = context_length.from_engine(error.message, body)
    if longer is not None:
        return longer
    cannot = capabilities.from_engine(error.message)
    if cannot is not None:
        return cannot
    if NO_TOKEN.search(error.message):
        return ModelError(f"prompt: {error.message}", error.status, "prompt")
    if ENGINE_WORDS.search(error.message):
        where = f"; change {error.param}" if error.param else ""
        return ModelError(f"{REFUSED}{where}", error.status, error.param)
    return error


def refusal(verdict: Verdict, param: str) -> ModelReport:
    """The report of a request whose grammar was refused.

    Args:
        verdict: not OK.
        param: the grammar's path in the client's request.
    """
    if verdict.result == LATE:
        return failure(BUSY, 429)
    message = f"{param}: takes this model more than {CPU_S} s to compile; {SIMPLER}"
    if verdict.result == FAILED:
        reason = verdict.reason or "it is not supported"
        message = f"{param}: this model cannot compile the schema ({reason})"
    return failure(message, 400, param)


def _schema_path(body: Body) -> str:
    """The path of what the engine compiles for this request."""
    return constraint_path(body) or "response_format"


def _usage(chunk: str) -> dict[str, int] | None:
    """The token counts in the chunk of a stream that vLLM adds for `include_usage`; None for any other chunk."""
    if '"choices":[]' not in chunk or '"usage":{' not in chunk:
        return None
    usage = json.loads(chunk.removeprefix(DATA))["usage"]
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
    }


def _finish_reason(chunk: str) -> str:
    """Why the model stopped, in a chunk of a stream that says so."""
    choices = json.loads(chunk.removeprefix(DATA))["choices"]
    reason: str = choices[0]["finish_reason"]
    return reason


def _stream_failure(item: object, report: ModelReport) -> ModelReport | None:
    """The report of a failed stream, if this item of the stream shows a failure.

    vLLM catches every exception and sends it as the last event. Where a grammar did not compile, vLLM ends the stream
    as if it were complete, but without a finish reason.
    """
    if isinstance(item, str):
        if item.startswith(DONE) and not report.finish_reason:
            return failure("the engine ended the stream before its end", 500)
        if not item.startswith(ERROR_EVENT):
            return None
        item = ErrorResponse.model_validate_json(item.removeprefix(DATA))
    return _read_answer(item)[1] if hasattr(item, "error") else None


def _named(event: str, name: object) -> str:
    """An event of vLLM's stream whose chunks name this model; the same event if the name is None."""
    if name is None:
        return event
    field = f'"model":{json.dumps(name)}'
    # the first one of a line is the chunk's own: what the model writes comes later, and its quotes are escaped
    lines = [MODEL.sub(lambda _: field, line, count=1) for line in event.split("\n")]
    return "\n".join(lines)


def _read_answer(item: Any, name: object = None) -> tuple[bytes, ModelReport]:
    """The bytes and the report of one of the engine's responses; no bytes for an ErrorResponse.

    The answer names its model so, unless the name is None.
    """
    # by attribute: the engine has several classes of error responses
    if hasattr(item, "error"):
        code = item.error.code if isinstance(item.error.code, int) else 500
        message = ENGINE_FAILED
        if code < 500:
            message = WARNING.sub(b"", item.error.message.encode()).decode()
        return b"", failure(message, code, item.error.param)
    usage = item.usage
    choices = getattr(item, "choices", None)
    report = ModelReport(
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens or 0,
        finish_reason=(choices[0].finish_reason or "") if choices else "",
    )
    return _encode_answer(item, name), report


def _encode_answer(item: Any, name: object) -> bytes:
    """An answer in OpenAI's shape: without the engine's empty fields, but with those that OpenAI's API always has."""
    plain = item.model_dump(mode="json", exclude_none=True)
    if name is not None:
        plain["model"] = name
    for choice in plain.get("choices", ()):
        choice.setdefault("logprobs", None)
        message = choice.get("message")
        if message is not None:
            message.setdefault("content", None)
            message.setdefault("refusal", None)
            name_thinking(message)
    return msgspec.json.encode(plain)
