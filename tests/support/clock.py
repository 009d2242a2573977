"""An event loop with a fake clock: when every task waits, the clock jumps to the next timer."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

Result = TypeVar("Result")
POLL_S = 0.001  # real seconds between two checks of whether a thread has ended
START_S = 1000.0  # first time of the clock
MAX_S = 7200.0  # a test that takes longer on the fake clock has failed


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    loop: "FakeTimeLoop"

    def select(self, timeout: float | None = None) -> Any:
        if events := super().select(0):
            return events
        if self.loop.threads or timeout is None:
            # Only a thread can continue the loop. That takes real time, and the fake clock stands still.
            return super().select(POLL_S if self.loop.threads else None)
        # Data that is in transit through a socket comes before the timer.
        if timeout > 0 and (events := super().select(POLL_S)):
            return events
        self.loop.now += timeout
        assert self.loop.now < START_S + MAX_S, f"waited in vain for {MAX_S:g} s"
        return events


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in which sleeps and timeouts take no real time and keep their order.

    now: seconds of the fake clock.
    threads: number of running calls in threads; the clock stands still while there are any.
    """

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = START_S
        self.threads = 0
        super().__init__(selector)

    def time(self) -> float:
        """Seconds of the fake clock, which every timer of the loop uses."""
        return self.now

    def run_in_executor(
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Run a call in a thread and count it in `threads`; asyncio.to_thread uses this."""
        self.threads += 1
        call = super().run_in_executor(executor, func, *args)

        def ended(_: Any) -> None:
            self.threads -= 1

        call.add_done_callback(ended)
        return call

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads without the limit of Python 3.12, which would pass at once on this clock."""
        await super().shutdown_default_executor()


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine like asyncio.run, with the fake clock for the loop and for the `time` module."""

    async def whole() -> Result:
        try:
            return await main
        finally:
            # repeated, since asyncio.wait_for of Python 3.11 may lose a cancellation
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in others:
                    task.cancel()
                await asyncio.wait(others, timeout=0.1)

    with asyncio.Runner(loop_factory=FakeTimeLoop) as runner:
        clock = functools.partial(FakeTimeLoop.time, runner.get_loop())  # type: ignore[arg-type]
        with (
            mock.patch("time.monotonic", clock),
            mock.patch("time.perf_counter", clock),
        ):
            return runner.run(whole())
