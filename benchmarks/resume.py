"""Long benchmarks go on where they were cut off: what was played is kept in a file, a line of JSON for each run.

A line is found again only by the same job on the same code: its key is a digest of the job and of every source file
that its result depends on.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def digest(*patterns: str) -> str:
    """Of all files that match, below the project's folder."""
    files = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def play_all(
    run: Callable[[Any], dict[str, Any]], todo: Sequence[Any], pool: Pool, key: Callable[[Any], str], file: Path | None
) -> Iterator[dict[str, Any]]:
    """The result of every job, in any order; new ones are added to the file as they come.

    Args:
        run: plays one job.
        todo: the jobs, dataclasses.
        pool: of processes.
        key: digest of the code that a job's result depends on.
        file: of what was played before; None keeps nothing.
    """
    names = {_name(job, key(job)): job for job in todo}
    known: dict[str, dict[str, Any]] = {}
    if file is not None and file.is_file():
        known = {line["key"]: line["row"] for line in map(json.loads, file.read_text().splitlines())}
    yield from (known[name] for name in names if name in known)
    missing = [(run, name, job) for name, job in names.items() if name not in known]
    for name, row in pool.imap_unordered(_one, missing, chunksize=4):
        if file is not None:
            with file.open("a") as lines:
                lines.write(json.dumps({"key": name, "row": row}) + "\n")
        yield row


def _name(job: Any, code: str) -> str:
    assert is_dataclass(job) and not isinstance(job, type)
    return sha256(json.dumps([asdict(job), code], sort_keys=True).encode()).hexdigest()


def _one(given: tuple[Callable[[Any], dict[str, Any]], str, Any]) -> tuple[str, dict[str, Any]]:
    run, name, job = given
    return name, run(job)
