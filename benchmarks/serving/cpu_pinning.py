"""Pins one model to a core of its own, as a model on a cluster has its own hardware (see saturation.py)."""

import asyncio
import os
from collections import defaultdict
from contextlib import suppress

import psutil

INTERVAL_S = 0.5  # seconds between two passes over all processes
# in the command of a Ray worker that has no task yet
UNNAMED = "/ray/_private/workers/"
# in the commands of processes that requests of other models pass through
REQUEST_PATH = ("ServeReplica:", "ray::Router", "ray::ProxyActor", "haproxy")


class CpuPinning:
    """Pins the replicas of a model and their engines to the first core, and the request path of others to the rest.

    Control processes of Ray and Serve also run on the first core, above all the raylet: a new process starts on the
    core of the raylet, and a replica uses its core before it has a name.

    The clients of the benchmark run in this process and stay unpinned. On one core with Ray's processes, which have a
    lower priority, this process did not run for tens of seconds. A pass changes only new threads, to keep it cheap.

    Raises:
        SystemExit: the machine has only one core.
    """

    def __init__(self, model: str):
        self._mark = f"ServeReplica:{model}:"
        self._cores = sorted(os.sched_getaffinity(0))
        if len(self._cores) < 2:
            raise SystemExit("--apart needs at least two cores; leave it out")
        self._commands: dict[int, str] = {}
        self._pinned: dict[int, bool] = {}  # by thread: whether to the first core

    def _command(self, process: psutil.Process) -> str:
        """Command of a process; read again while it can change, since Ray renames its processes."""
        known = self._commands.get(process.pid)
        if known is None or known.startswith("ray::") or UNNAMED in known:
            with suppress(psutil.Error):
                self._commands[process.pid] = " ".join(process.cmdline())
        return self._commands.get(process.pid, "")

    def _on_first_core(self, command: str) -> bool:
        """Whether a process of Ray belongs to the model, or to no request path."""
        if self._mark in command:
            return True
        return not any(mark in command for mark in REQUEST_PATH)

    def _cores_by_process(self) -> dict[int, bool]:
        """By process to be pinned: whether it runs on the first core."""
        children: dict[int, list[int]] = defaultdict(list)
        parents: dict[int, bool] = {}
        raylets: dict[int, bool] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                children[process.ppid()].append(process.pid)
            command = self._command(process)
            if "raylet/raylet" in command:
                raylets[process.pid] = True
            elif command.startswith("ray::") or any(
                mark in command for mark in ("haproxy", "/ray/")
            ):
                parents[process.pid] = self._on_first_core(command)
        found: dict[int, bool] = {}
        # The first core comes last, since a replica of the model is itself a child of Ray's processes.
        for pid, first in sorted(parents.items(), key=lambda item: item[1]):
            family = [pid]
            for member in family:
                found[member] = first
                family += children[member]
        return found | raylets

    def pin(self) -> None:
        """Pin all threads that are not on their cores yet."""
        for pid, first in self._cores_by_process().items():
            cores = self._cores[:1] if first else self._cores[1:]
            with suppress(OSError):
                for thread in map(int, os.listdir(f"/proc/{pid}/task")):
                    if self._pinned.get(thread) != first:
                        os.sched_setaffinity(thread, cores)
                        self._pinned[thread] = first

    async def run(self) -> None:
        """Pin until cancelled; then allow every core again."""
        try:
            while True:
                await asyncio.to_thread(self.pin)
                await asyncio.sleep(INTERVAL_S)
        finally:
            for thread in self._pinned:
                with suppress(OSError):
                    os.sched_setaffinity(thread, self._cores)
