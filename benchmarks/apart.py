"""One size on a core of its own, as on a cluster it has hardware of its own (see surge.py)."""

import asyncio
import os
from collections import defaultdict
from contextlib import suppress

import psutil

EVERY_S = 0.5
UNNAMED = "/ray/_private/workers/"  # in the command of Ray's processes, before they are told what they are for
ON_THE_WAY = ("ServeReplica:", "ray::Router", "ray::ProxyActor", "haproxy")  # of a request


class Apart:
    """Keeps a size's replicas, with their engines, on the first core, and what is on a request's way to others off it.

    What is on nobody's way (Ray's and Serve's control) is kept on the first, too, above all the raylet: whatever it
    starts begins where it is, and a replica takes a core from its first moment, long before it has a name.
    Only what is new is looked at, as the clients of the benchmark run in this process. They may run everywhere: kept on
    a core beside Ray's processes, of lower priority, this one was not let run there for tens of seconds.

    Raises:
        SystemExit: there is only one core.
    """

    def __init__(self, size: str):
        self._mark, self._cores = f"ServeReplica:{size}:", sorted(os.sched_getaffinity(0))
        if len(self._cores) < 2:
            raise SystemExit("one core cannot be shared out; leave out --apart")
        self._commands: dict[int, str] = {}
        self._placed: dict[int, bool] = {}  # threads: whether they are the size's

    def _found(self) -> dict[int, bool]:
        """By the number of each process to be placed, whether it is the size's."""
        children: dict[int, list[int]] = defaultdict(list)
        top, raylets, found = dict[int, bool](), dict[int, bool](), dict[int, bool]()
        for process in psutil.process_iter():
            pid = process.pid
            with suppress(psutil.Error):
                children[process.ppid()].append(pid)
                if self._commands.get(pid, "ray::").startswith("ray::") or UNNAMED in self._commands[pid]:
                    self._commands[pid] = " ".join(process.cmdline())  # which Ray's change
            command = self._commands.get(pid, "")
            if "raylet/raylet" in command:
                raylets[pid] = True
            elif command.startswith("ray::") or "haproxy" in command or "/ray/" in command:
                top[pid] = self._mark in command or not any(mark in command for mark in ON_THE_WAY)
        for pid, ours in sorted(top.items(), key=lambda item: item[1]):  # the size's last: its parent is Ray's
            family = [pid]
            for member in family:
                found[member] = ours
                family += children[member]
        return found | raylets

    def place(self) -> None:
        """All threads that are not where they belong."""
        for pid, ours in self._found().items():
            with suppress(OSError):
                for thread in map(int, os.listdir(f"/proc/{pid}/task")):
                    if self._placed.get(thread) != ours:
                        os.sched_setaffinity(thread, self._cores[:1] if ours else self._cores[1:])
                        self._placed[thread] = ours

    async def keep(self) -> None:
        """Again and again until cancelled; then all may run everywhere."""
        try:
            while True:
                await asyncio.to_thread(self.place)
                await asyncio.sleep(EVERY_S)
        finally:
            for thread in self._placed:
                with suppress(OSError):
                    os.sched_setaffinity(thread, self._cores)
