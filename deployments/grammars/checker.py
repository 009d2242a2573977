"""Compiles each new grammar of a client in another process, before the engine compiles it (worker.py).

The engine compiles in threads that nothing can stop, and how long it takes depends on the model's vocabulary as much as
on the grammar: with 150,000 tokens a `maxLength` of 4,000 took 8 s. So only a grammar that was compiled within CPU_S
reaches the engine. One is compiled at a time. Few may wait, because each holds one of the model's slots meanwhile. A
verdict is kept, so a grammar is compiled here once.
"""

import asyncio
import hashlib
import logging
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import msgspec

from deployments.grammars.worker import (
    LATE,
    OK,
    SLOW,
    Job,
    Verdict,
    Vocabulary,
)

CPU_S = 2  # of a compilation
WAIT_S = 8.0  # for it; longer than CPU_S, because the process has a low priority
START_S = 120.0  # for the process to load the compiler and the vocabulary
MAX_WAITING = 3
MAX_KEPT = 2_000  # verdicts, each of about 200 bytes
log = logging.getLogger(__name__)
# gets the verdict on a grammar of the request under way, if the grammar was refused
refusals: ContextVar[list[Verdict]] = ContextVar("refusals")


class GrammarChecker:
    """Compiles grammars of clients in a process that can be killed.

    Args:
        vocabulary: gives the model's; called in a thread, once for each start of the process.
        command: of the process.
        cpu_s: limit of a compilation; see worker.Job.
        wait_s: the same.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        command: tuple[str, ...] = (
            sys.executable,
            "-m",
            "deployments.grammars.worker",
        ),
        cpu_s: int = CPU_S,
        wait_s: float = WAIT_S,
    ):
        self._vocabulary = vocabulary
        self._command = command
        self._cpu_s = cpu_s
        self._wait_s = wait_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting: dict[bytes, asyncio.Task[Verdict]] = {}
        self._kept: OrderedDict[bytes, Verdict] = OrderedDict()

    async def start(self) -> None:
        """Start the process, so that the first grammar need not wait for it."""
        async with self._turn:
            with suppress(OSError):
                await self._start()

    async def check(self, kind: str, text: str) -> Verdict:
        """The verdict on a grammar; LATE if too many others wait, or the machine is too busy to compile it now.

        Args:
            kind: of a worker.Job.
            text: of the same.
        """
        key = hashlib.sha256(f"{kind}\n{text}".encode()).digest()
        if (known := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return known
        task = self._waiting.get(key)
        if task is None:
            if len(self._waiting) > MAX_WAITING:  # one of them is being compiled
                return Verdict(LATE)
            job = Job(kind, text, self._cpu_s, self._wait_s)
            task = asyncio.create_task(self._compile(job))
            self._waiting[key] = task
            task.add_done_callback(lambda done: self._keep(key, done))
        # the compilation goes on if this client leaves, for another that sent the same grammar
        return await asyncio.shield(task)

    def _keep(self, key: bytes, task: asyncio.Task[Verdict]) -> None:
        del self._waiting[key]
        if task.cancelled() or task.result().result in (SLOW, LATE):
            return
        self._kept[key] = task.result()
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    async def _compile(self, job: Job) -> Verdict:
        async with self._turn:
            try:
                return await self._answer(job)
            except Exception as error:
                log.error("the compiler of grammars failed (%s)", type(error).__name__)
                self._kill()
                return Verdict(LATE)

    async def _answer(self, job: Job) -> Verdict:
        process = await self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        limit_s = START_S + job.wait_s
        line = await asyncio.wait_for(process.stdout.readline(), limit_s)
        return msgspec.json.decode(line, type=Verdict)

    async def _start(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            vocabulary = await asyncio.to_thread(self._vocabulary)
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(msgspec.json.encode(vocabulary) + b"\n")
        return self._process

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def close(self) -> None:
        """End the process."""
        process = self._process
        self._kill()
        if process is not None:
            await process.wait()


def guard(generate: Callable[..., Any], checker: GrammarChecker) -> Callable[..., Any]:
    """VLLM's `AsyncLLM.generate`, which first checks the grammar of a request that has one.

    A refused request raises GenerationError, the only error that vLLM's streams do not log, and the verdict is
    added to `refusals`.
    """
    from vllm.exceptions import GenerationError

    async def checked(
        prompt: Any, sampling_params: Any, *args: Any, **options: Any
    ) -> AsyncGenerator[Any]:
        grammar = grammar_of(sampling_params)
        if grammar is not None:
            verdict = await checker.check(*grammar)
            if verdict.result != OK:
                refusals.get([]).append(verdict)
                raise GenerationError
        async for output in generate(prompt, sampling_params, *args, **options):
            yield output

    return checked


def grammar_of(sampling_params: Any) -> tuple[str, str] | None:
    """Kind and text of the grammar that vLLM would compile; None if there is none, or it is vLLM's own."""
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions
    from vllm.v1.structured_output.request import get_structured_output_key
    from vllm.v1.structured_output.utils import choice_as_grammar

    params = getattr(sampling_params, "structured_outputs", None)
    if params is None or params.all_constraints_none():
        return None
    kind, text = get_structured_output_key(params)
    if kind is StructuredOutputOptions.JSON_OBJECT:
        return None
    if kind is StructuredOutputOptions.CHOICE:
        return "grammar", choice_as_grammar(params.choice)
    return kind.name.lower(), text


def vocabulary_of(client: Any) -> Vocabulary:
    """The vocabulary of vLLM's AsyncLLM, as its engine gives it to xgrammar."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    config = client.vllm_config
    backend = XgrammarBackend(
        config,
        tokenizer=client.get_tokenizer(),
        vocab_size=config.model_config.get_vocab_size(),
    )
    smallest = backend.compiler.compile_grammar('root ::= "a"')
    return Vocabulary(
        smallest.tokenizer_info.serialize_json(), not backend.disable_any_whitespace
    )
