"""Compiles clients' grammars, each in a child process that is killed at its limits.

Command: `python -m deployments.grammars.worker`. The first line of its input is a Vocabulary, each further line a
Job, and each job gets one line of output, a Verdict. Jobs are compiled one after the other. A child has a low priority,
and the kernel limits its CPU time and memory.

xgrammar writes warnings with the client's words to stderr. The child's stderr is a file in memory. A warning that has a
line break of the client's could not be removed from the engine's log later (log_filter.py), so its grammar is refused.
"""

import os
import resource
import select
import signal
import sys
from typing import Any

import msgspec

from deployments.grammars.log_filter import WARNING

NICE = 10  # of a child, below every engine
MEMORY = 2**29  # bytes that a child may allocate
MAX_GRAMMAR = 2**26  # bytes of a compiled grammar
MAX_REASON = 300  # characters of the compiler's message
OK = "ok"
FAILED = "failed"  # the compiler refuses the grammar
LIMIT = "limit"  # of CPU time or memory
SLOW = "slow"  # not done in time, although the child had CPU time
LATE = "late"  # the machine gave the child hardly any CPU time
LITTLE = (
    0.25  # share of a job's CPU time that makes the difference between SLOW and LATE
)


class Vocabulary(msgspec.Struct, frozen=True):
    """`TokenizerInfo.serialize_json()` of xgrammar, and whether JSON may have any white space."""

    tokens: str
    any_whitespace: bool = True


class Job(msgspec.Struct, frozen=True):
    """A grammar to compile.

    kind: json, structural_tag, regex or grammar. text: of the grammar. cpu_s: of the child, whole seconds.
    wait_s: after which the child is killed in any case.
    """

    kind: str
    text: str
    cpu_s: int
    wait_s: float


class Verdict(msgspec.Struct, frozen=True):
    """The result of a job: OK, FAILED, LIMIT, SLOW or LATE, and the compiler's reason if it gave one."""

    result: str
    reason: str = ""


def main() -> None:
    """Answer the jobs until the input ends."""
    import xgrammar

    vocabulary = msgspec.json.decode(sys.stdin.buffer.readline(), type=Vocabulary)
    info = xgrammar.TokenizerInfo.deserialize_json(vocabulary.tokens)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    for line in sys.stdin.buffer:
        job = msgspec.json.decode(line, type=Job)
        verdict = run(compiler, job, vocabulary.any_whitespace)
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


def run(compiler: Any, job: Job, any_whitespace: bool = True) -> Verdict:
    """Compile a grammar in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _restrict(job.cpu_s)
            os.write(
                writer, msgspec.json.encode(_compile(compiler, job, any_whitespace))
            )
        finally:
            os._exit(0)
    os.close(writer)
    try:
        arrived, _, _ = select.select([reader], [], [], job.wait_s)
        written = os.read(reader, 65_536) if arrived else b""
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, _, used = os.wait4(child, 0)
    if written:
        return msgspec.json.decode(written, type=Verdict)
    if arrived:  # the child has ended without a word
        return Verdict(LIMIT)
    enough = used.ru_utime + used.ru_stime >= LITTLE * job.cpu_s
    return Verdict(SLOW if enough else LATE)


def _restrict(cpu_s: int) -> None:
    """Limit this process, which nothing else uses."""
    os.nice(NICE)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))


def _compile(compiler: Any, job: Job, any_whitespace: bool) -> Verdict:
    warnings = os.memfd_create("warnings")
    os.dup2(warnings, 2)
    methods = {
        "json": lambda text: compiler.compile_json_schema(
            text, any_whitespace=any_whitespace
        ),
        "structural_tag": compiler.compile_structural_tag,
        "regex": compiler.compile_regex,
        "grammar": compiler.compile_grammar,
    }
    try:
        compiled = methods[job.kind](job.text)
        begins = _can_begin(compiled)
    except MemoryError:
        return Verdict(LIMIT)
    except Exception as error:
        lines = WARNING.sub(b"", str(error).encode(errors="replace")).split(b"\n")
        return Verdict(FAILED, lines[0].decode(errors="replace")[:MAX_REASON])
    if compiled.memory_size_bytes > MAX_GRAMMAR:
        return Verdict(LIMIT)
    if not begins:
        return Verdict(
            FAILED, "this model has no token with which an answer could begin"
        )
    size = os.lseek(warnings, 0, os.SEEK_END)
    written = os.pread(warnings, size, 0).split(b"\n")
    if any(line and not WARNING.match(line) for line in written):
        return Verdict(FAILED, "a pattern or a reference has a line break")
    return Verdict(OK)


def _can_begin(compiled: Any) -> bool:
    """Whether the vocabulary has a token with which an answer can begin; a schema may refer to itself for ever."""
    import xgrammar

    tokens = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
    xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(tokens)
    return bool(tokens.numpy().any())


if __name__ == "__main__":
    main()
