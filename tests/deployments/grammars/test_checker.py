"""The compilation of grammars before the engine: its limits, its queue, the verdicts that are kept, and the log."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import xgrammar
from transformers import AutoTokenizer
from vllm.exceptions import GenerationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from deployments.grammars import checker as grammar_checker
from deployments.grammars import log_filter
from deployments.grammars.checker import (
    MAX_KEPT,
    MAX_WAITING,
    GrammarChecker,
    grammar_of,
    guard,
)
from deployments.grammars.worker import (
    FAILED,
    LATE,
    LIMIT,
    OK,
    SLOW,
    Job,
    Verdict,
    Vocabulary,
    run,
)
from deployments.models.server import refusal
from tests.deployments.grammars.test_bounds import ACCEPTED
from tests.deployments.models.test_server import event, played, server
from tests.support.gateway import PATIENCE_S, ROOT, Gateway

LARGE = 150_000  # tokens of the vocabulary of a large model
SLOW_SCHEMAS: dict[str, dict[str, Any]] = {
    "a text of at most 4,000 characters": {"type": "string", "maxLength": 4_000},
    "a pattern just within the limits": {
        "type": "string",
        "pattern": "^x([a-z]{0,5}[0-9]{0,4}){0,9}$",
    },
}


def words(count: int) -> list[bytes]:
    """A vocabulary of so many tokens with the lengths and the kinds of those of a large model."""
    rng = random.Random(0)
    found = dict.fromkeys(bytes([value]) for value in range(256))
    while len(found) < count:
        kind = rng.random()
        if kind < 0.7:
            text = " " * (kind < 0.35) + "".join(
                rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))
            )
        elif kind < 0.8:
            text = "".join(rng.choices("0123456789", k=rng.randint(2, 3)))
        elif kind < 0.9:
            text = "".join(rng.choices('{}[]":, \n\t', k=rng.randint(2, 6)))
        else:
            text = "".join(
                chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 3))
            )
        found[text.encode()] = None
    return list(found)


@pytest.fixture(scope="module")
def compiler() -> Any:
    """Of the large vocabulary."""
    info = xgrammar.TokenizerInfo(words(LARGE), xgrammar.VocabType.RAW)
    copy = xgrammar.TokenizerInfo.deserialize_json(info.serialize_json())
    return xgrammar.GrammarCompiler(copy, max_threads=1, cache_enabled=False)


def job(schema: Any, cpu_s: int = 60, wait_s: float = 10 * PATIENCE_S) -> Job:
    return Job("json", json.dumps(schema), cpu_s, wait_s)


@pytest.mark.parametrize("schema", SLOW_SCHEMAS.values(), ids=SLOW_SCHEMAS)
def test_the_limit_of_cpu_time_holds_with_a_large_vocabulary(
    compiler: Any, schema: dict[str, Any]
) -> None:
    """Such a schema takes 8 s of CPU; the kernel ends it after one, and the next schema is compiled."""
    assert run(compiler, job(schema, cpu_s=1)) == Verdict(LIMIT)
    assert run(compiler, job({"type": "boolean"})) == Verdict(OK)


def test_a_compilation_that_makes_no_progress_is_killed(compiler: Any) -> None:
    """The time limit holds on a machine that gives the child no CPU time, too."""
    verdict = run(
        compiler, job(SLOW_SCHEMAS["a text of at most 4,000 characters"], wait_s=0.01)
    )
    assert verdict.result in (SLOW, LATE)


def test_the_limit_of_memory_holds(
    compiler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that needs more than it may have is refused."""
    monkeypatch.setattr("deployments.grammars.worker.MEMORY", 2**20)
    schema = {"enum": ["x" * 30_000 + str(i) for i in range(200)]}
    assert run(compiler, job(schema)).result in (LIMIT, FAILED)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#/$defs/x"}, "Cannot find field"),
        ({"type": "string", "pattern": "["}, ""),
        ({"type": "string", "pattern": "[z-a]"}, "Invalid character class"),
    ],
)
def test_a_grammar_that_fails_has_a_reason(
    compiler: Any, schema: dict[str, Any], words: str
) -> None:
    """The reason is the compiler's, without the place in its code."""
    verdict = run(compiler, job(schema))
    assert verdict.result == FAILED and words in verdict.reason
    assert ".cc:" not in verdict.reason and len(verdict.reason) <= 300


def test_a_grammar_that_no_token_begins_is_refused() -> None:
    """A schema that refers to itself only compiles, and leaves the engine no token to choose."""
    info = xgrammar.TokenizerInfo.deserialize_json(small().tokens)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    twice = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    for schema in ({"$ref": "#"}, twice):
        assert run(compiler, job(schema)).result == FAILED, schema
    assert run(compiler, job({"enum": ["a"]})) == Verdict(OK)


def small() -> Vocabulary:
    """The vocabulary of printable characters."""
    tokens = [chr(32 + i) for i in range(95)]
    return Vocabulary(xgrammar.TokenizerInfo(tokens).serialize_json())


def test_the_process_answers_and_is_started_again() -> None:
    """Ordinary schemas compile; after the process was killed the next schema gets a new one."""

    async def play() -> None:
        checker = GrammarChecker(small, wait_s=PATIENCE_S)
        try:
            await checker.start()
            for schema in list(ACCEPTED.values())[:5]:
                found = await checker.check("json", json.dumps(schema))
                assert found.result in (OK, FAILED)
            assert checker._process is not None
            checker._process.kill()
            await checker._process.wait()
            assert await checker.check("json", '{"type": "null"}') == Verdict(OK)
        finally:
            await checker.close()

    asyncio.run(play())


def test_the_vocabulary_is_the_engines() -> None:
    """It is made by vLLM's own class for xgrammar, and survives the way to the process.

    If this fails after an upgrade of vLLM: see what XgrammarBackend needs, and give it that in `vocabulary_of`.
    """
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/models/nano")
    config = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(disable_any_whitespace=True),
        speculative_config=None,
        model_config=SimpleNamespace(get_vocab_size=lambda: len(tokenizer)),
    )
    client = SimpleNamespace(vllm_config=config, get_tokenizer=lambda: tokenizer)
    vocabulary = grammar_checker.vocabulary_of(client)
    info = xgrammar.TokenizerInfo.deserialize_json(vocabulary.tokens)
    assert info.vocab_size == len(tokenizer) and not vocabulary.any_whitespace
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    assert run(compiler, job({"type": "integer"}), any_whitespace=False) == Verdict(OK)


# a process that gives every job the verdict that its text is, after a line in the file
ECHO = """
import json, sys, time
sys.stdin.readline()
for line in sys.stdin:
    text = json.loads(line)["text"]
    while text.startswith("wait"):
        try:
            open(sys.argv[1]).close()
            break
        except OSError:
            time.sleep(0.005)
    print(json.dumps({"result": "ok" if text.startswith("wait") else text}), flush=True)
"""


@pytest.fixture
def echo(tmp_path: Any) -> Iterator[Callable[[], GrammarChecker]]:
    """Makes a checker whose process answers with the job's text; "wait…" waits for the file `go`."""

    def make() -> GrammarChecker:
        command = (sys.executable, "-S", "-c", ECHO, str(tmp_path / "go"))
        return GrammarChecker(lambda: Vocabulary(""), command)

    yield make


def test_few_grammars_wait_and_the_loop_goes_on(
    echo: Callable[[], GrammarChecker], tmp_path: Any
) -> None:
    """One is compiled at a time, MAX_WAITING wait, further ones shall come back; known ones do not wait."""

    async def play() -> None:
        checker = echo()
        try:
            assert (await checker.check("json", OK)).result == OK
            tasks = [
                asyncio.create_task(checker.check("json", f"wait{i}"))
                for i in range(1 + MAX_WAITING)
            ]
            same = asyncio.create_task(checker.check("json", "wait0"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert (await checker.check("json", "wait-more")).result == LATE
            assert (await checker.check("json", OK)).result == OK
            assert not any(task.done() for task in (*tasks, same))
            tasks[1].cancel()  # its client leaves, and the others are compiled
            (tmp_path / "go").touch()
            found = await asyncio.gather(*tasks, same, return_exceptions=True)
            assert sum(
                isinstance(one, Verdict) and one.result == OK for one in found
            ) == (1 + MAX_WAITING)
        finally:
            await checker.close()

    asyncio.run(play())


def test_verdicts_are_kept_within_a_bound(
    echo: Callable[[], GrammarChecker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted and refused grammars are asked once; the oldest are forgotten; what the machine caused is not kept."""
    assert MAX_KEPT <= 10_000
    monkeypatch.setattr(grammar_checker, "MAX_KEPT", 3)

    async def play() -> None:
        checker = echo()
        try:
            for kind in "abcdef":
                assert (await checker.check(kind, LIMIT)).result == LIMIT
            assert len(checker._kept) == 3
            for result in (SLOW, LATE):
                assert (await checker.check("json", result)).result == result
            assert len(checker._kept) == 3 and not checker._waiting
        finally:
            await checker.close()

    asyncio.run(play())


def test_a_process_that_breaks_refuses_no_schema_for_good(
    echo: Callable[[], GrammarChecker],
) -> None:
    """An answer that is no verdict is a reason to come back, and is not kept."""

    async def play() -> None:
        checker = echo()
        checker._command = (sys.executable, "-S", "-c", "print('no verdict')")
        try:
            assert (await checker.check("json", OK)).result == LATE
            assert not checker._kept
        finally:
            await checker.close()

    asyncio.run(play())


def test_a_refusal_names_the_clients_path() -> None:
    """A grammar that fails or takes too long is a 400 with the path; where others wait it is a 429 without one."""
    path = "response_format.json_schema.schema"
    for result in (FAILED, LIMIT, SLOW):
        error = refusal(Verdict(result, "an odd pattern"), path).error
        assert error is not None and (error.status, error.param) == (400, path)
        assert error.message.startswith(path)
    error = refusal(Verdict(LATE), path).error
    assert error is not None and error.status == 429
    assert error.body()["error"]["type"] == "rate_limit_error"  # type: ignore[index]


BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "a schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "string"}},
            }
        },
        "response_format.json_schema.schema",
    ),
    "a tool": (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"type": "object"}},
                }
            ],
            "tool_choice": "required",
        },
        "tools",
    ),
    **{
        kind: ({"structured_outputs": {kind: value}}, f"structured_outputs.{kind}")
        for kind, value in (
            ("json", {"type": "string"}),
            ("regex", "[a-z]+"),
            ("choice", ["a", "b"]),
        )
    },
}
OUTPUTS: list[dict[str, Any]] = [
    {"json": {"type": "object"}},
    {"json": '{"type": "object"}'},
    {"regex": "[a-z]{1,9}"},
    {"choice": ["yes", "no", 'a "b" \\\\ c']},
]


@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
def test_each_kind_of_structured_outputs_is_compiled_first(
    compiler: Any, outputs: dict[str, Any]
) -> None:
    """In the form in which the engine compiles it; choices become a grammar."""
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**outputs))
    grammar = grammar_of(params)
    assert grammar is not None
    assert run(compiler, Job(*grammar, 60, 10 * PATIENCE_S)) == Verdict(OK)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("result", "status"), [(LIMIT, 400), (LATE, 429)])
@pytest.mark.parametrize(("change", "path"), BODIES.values(), ids=BODIES)
def test_a_refused_grammar_is_asked_of_one_model_and_opens_no_breaker(
    gateway: Gateway,
    change: dict[str, Any],
    path: str,
    result: str,
    status: int,
    stream: bool,
) -> None:
    """The refusal goes through vLLM's error of a failed generation, for whole answers and for streams."""

    def refusing() -> Any:
        made = server()

        async def chat(_: Any) -> Any:
            grammar_checker.refusals.get().append(Verdict(result))
            if not stream:
                raise GenerationError

            async def answer() -> Any:
                yield [event(GenerationError()), "data: [DONE]\n\n"]

            return answer()

        made.chat = chat
        return made

    for model in gateway.models.values():
        model.script = played(refusing())
    gateway.tune(breaker={"failure_threshold": 1})
    for _ in range(3):
        answer = gateway.chat(**change, stream=stream)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert answer.json()["error"]["param"] == path
        else:
            assert int(answer.headers["retry-after"]) >= 1
    assert sum(len(model.calls) for model in gateway.models.values()) == 3
    breakers = gateway.ingress.dispatcher.breakers.values()
    assert all(breaker.admits for breaker in breakers)


def test_the_engine_gets_only_what_was_compiled() -> None:
    """`guard` asks the checker about each grammar, and the engine's generate runs only after an OK."""
    asked: list[tuple[str, str]] = []
    verdicts = {"a": Verdict(OK), "b": Verdict(LIMIT)}

    async def check(kind: str, text: str) -> Verdict:
        asked.append((kind, text))
        return verdicts[json.loads(text)["title"]]

    async def generate(prompt: str, params: Any, request_id: str) -> Any:
        yield prompt

    checked = guard(generate, SimpleNamespace(check=check))  # type: ignore[arg-type]

    async def play(title: str | None) -> list[str]:
        refused: list[Verdict] = []
        grammar_checker.refusals.set(refused)
        schema = StructuredOutputsParams(json={"title": title})
        params = SamplingParams(structured_outputs=schema if title else None)
        try:
            return [item async for item in checked("x", params, "id")]
        except GenerationError:
            return [one.result for one in refused]

    assert asyncio.run(play(None)) == ["x"] and not asked
    assert asyncio.run(play("a")) == ["x"]
    assert asyncio.run(play("b")) == [LIMIT]
    assert asked == [("json", '{"title": "a"}'), ("json", '{"title": "b"}')]
    vllms_own = SamplingParams(
        structured_outputs=StructuredOutputsParams(json_object=True)
    )
    assert grammar_of(vllms_own) is None


CANARY = "canary-7f3a"


def test_xgrammars_warnings_do_not_reach_the_log(
    compiler: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither from the engine, whose other lines pass the filter, nor from the process that compiles first."""
    warned = {"type": "string", "pattern": f"^{CANARY}$|^b$"}
    code = (
        "import json, os, sys, xgrammar\n"
        "from deployments.grammars.log_filter import filter_stderr\n"
        "filter_stderr()\n"
        "os.write(2, b'before\\n')\n"
        "xgrammar.Grammar.from_json_schema(sys.argv[1])\n"
        "info = xgrammar.TokenizerInfo([chr(32 + i) for i in range(95)])\n"
        "xgrammar.GrammarCompiler(info).compile_json_schema(sys.argv[1])\n"
        "print('after', file=sys.stderr, flush=True)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(warned)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "before" in ran.stderr and "after" in ran.stderr
    assert CANARY not in ran.stderr
    assert run(compiler, job(warned)) == Verdict(OK)
    assert CANARY not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("warning", "result"),
    [
        (b"[01:02:03] /a.cc:12: Warning: a\n", OK),
        (b"[01:02:03] /a.cc:12: Warning: a\nsecret\n", FAILED),
    ],
)
def test_a_warning_with_a_line_break_of_the_client_is_a_refusal(
    warning: bytes, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter could not tell its second line from the engine's own lines."""

    def warn(text: str, any_whitespace: bool) -> Any:
        os.write(2, warning)
        return SimpleNamespace(memory_size_bytes=1)

    warns = SimpleNamespace(compile_json_schema=warn)
    for method in ("compile_structural_tag", "compile_regex", "compile_grammar"):
        setattr(warns, method, None)
    monkeypatch.setattr("deployments.grammars.worker._can_begin", bool)
    assert run(warns, job({})).result == result


def test_the_filter_knows_xgrammars_warnings() -> None:
    """Warnings behind a part of another line are removed, too. If this fails after an upgrade, change WARNING."""
    schema = json.dumps({"type": "string", "pattern": f"^{CANARY}$|^b$"})
    code = "import sys, xgrammar; xgrammar.Grammar.from_json_schema(sys.argv[1])"
    ran = subprocess.run(
        [sys.executable, "-c", code, schema], capture_output=True, check=True
    )
    lines = [line for line in ran.stderr.splitlines() if CANARY.encode() in line]
    assert lines and all(log_filter.WARNING.match(line) for line in lines)
    text = b"half " + ran.stderr + b"whole\n[12] text\n"
    filtered = subprocess.run(
        [sys.executable, "-S", log_filter.__file__],
        input=text,
        capture_output=True,
        check=True,
    )
    assert CANARY.encode() not in filtered.stdout
    assert re.match(rb"half .*whole\n\[12\] text\n", filtered.stdout, re.DOTALL)


def test_the_records_cross_the_pipe() -> None:
    """Each record is one line."""
    sent = Job("json", "a\nb", 1, 2.0)
    line = msgspec.json.encode(sent)
    assert b"\n" not in line and msgspec.json.decode(line, type=Job) == sent
