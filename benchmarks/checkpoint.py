"""Lets an interrupted benchmark continue: a file keeps the result of every finished job as a line of JSON.

A result is reused only for the same job on the same code. Its key is a digest of the job and of every source file on
which the result depends.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def digest(*patterns: str) -> str:
    """SHA-256 of all files of the project that match one of the patterns."""
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def play_all(
    run: Callable[[Any], dict[str, Any]],
    todo: Sequence[Any],
    pool: Pool,
    key: Callable[[Any], str],
    file: Path | None,
) -> Iterator[dict[str, Any]]:
    """Yield the result of every job, in any order. New results are appended to the file as they arrive.

    Args:
        run: plays one job.
        todo: the jobs, as dataclasses.
        pool: processes that play the jobs.
        key: returns the digest of the code on which a job's result depends.
        file: the earlier results; None keeps no results.
    """
    names = {_name(job, key(job)): job for job in todo}
    known: dict[str, dict[str, Any]] = {}
    if file is not None and file.is_file():
        for text in file.read_text().splitlines():
            line = json.loads(text)
            known[line["key"]] = line["row"]
    yield from (known[name] for name in names if name in known)
    missing = [(run, name, job) for name, job in names.items() if name not in known]
    for name, row in pool.imap_unordered(_play, missing, chunksize=4):
        if file is not None:
            with file.open("a") as lines:
                lines.write(json.dumps({"key": name, "row": row}) + "\n")
        yield row


def _name(job: Any, code: str) -> str:
    """Key of a job's result."""
    assert is_dataclass(job) and not isinstance(job, type)
    return sha256(json.dumps([asdict(job), code], sort_keys=True).encode()).hexdigest()


def _play(
    named_job: tuple[Callable[[Any], dict[str, Any]], str, Any],
) -> tuple[str, dict[str, Any]]:
    """Play one job; for `imap_unordered`, which passes a single argument."""
    run, name, job = named_job
    return name, run(job)
