"""An event loop whose clock is not the machine's: when all wait, it is at once as late as the next of them wants."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

Result = TypeVar("Result")
LOOK_S = 0.001  # of real time, between two looks whether a thread has ended
START_S, LONGEST_S = 1000.0, 7200.0  # what its clock shows at first; after so long a test has failed


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    loop: "FakeTimeLoop"

    def select(self, timeout: float | None = None) -> Any:
        if events := super().select(0):
            return events
        if (
            self.loop.threads or timeout is None
        ):  # only a thread can wake it: that takes real time, and none of the loop's
            return super().select(LOOK_S if self.loop.threads else None)
        if timeout > 0 and (events := super().select(LOOK_S)):  # what is on its way through a socket comes first
            return events
        self.loop.now += timeout
        assert self.loop.now < START_S + LONGEST_S, f"waited in vain for {LONGEST_S:g} s"
        return events


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """Sleeps and timeouts take no time, and come in their order, however slow the machine is.

    now: its seconds. threads: how many calls are under way in threads, during which its clock stands still.
    """

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop, self.now, self.threads = self, START_S, 0
        super().__init__(selector)

    def time(self) -> float:
        """What every timer of the loop goes by."""
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """As asyncio.to_thread calls it."""
        self.threads += 1
        call = super().run_in_executor(executor, func, *args)

        def ended(_: Any) -> None:
            self.threads -= 1

        call.add_done_callback(ended)
        return call


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """As asyncio.run, on a clock of its own; what the product measures with the `time` module goes by it as well."""

    async def whole() -> Result:
        try:
            return await main
        finally:  # asyncio.wait_for of Python 3.11 may lose a cancellation: so more than once
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in others:
                    task.cancel()
                await asyncio.wait(others, timeout=0.1)

    with asyncio.Runner(loop_factory=FakeTimeLoop) as runner:
        clock = functools.partial(FakeTimeLoop.time, runner.get_loop())  # type: ignore[arg-type]
        with mock.patch("time.monotonic", clock), mock.patch("time.perf_counter", clock):
            return runner.run(whole())
