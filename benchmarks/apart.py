"""One size on a core of its own, as on a cluster it has hardware of its own (see surge.py)."""

import asyncio
import os
from contextlib import suppress

import psutil

EVERY_S = 1.0  # new replicas start on all cores


def found(size: str) -> tuple[set[psutil.Process], set[psutil.Process]]:
    """This size's replicas with their engines; and this process with all others of Ray's."""
    ours, rest = set(), {psutil.Process()}
    for process in psutil.process_iter(["cmdline"]):
        title, family = " ".join(process.info["cmdline"] or []), {process}
        with suppress(psutil.Error):
            family |= set(process.children(recursive=True))
        if f"ServeReplica:{size}:" in title:
            ours |= family
        elif title.startswith("ray::") or "haproxy" in title or "/ray/" in title:
            rest |= family
    return ours, rest - ours


def place(processes: set[psutil.Process], cores: list[int]) -> None:
    """All threads of these on these cores."""
    for process in processes:
        with suppress(psutil.Error):
            for thread in process.threads():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores)


async def keep(size: str) -> None:
    """The size on the first core, the others off it, until cancelled.

    Raises:
        SystemExit: there is only one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("one core cannot be shared out; leave out --apart")
    try:
        while True:
            ours, rest = await asyncio.to_thread(found, size)
            place(ours, cores[:1])
            place(rest, cores[1:])
            await asyncio.sleep(EVERY_S)
    finally:
        place(set().union(*found(size)), cores)
