"""Fakes of Ray's handles, which call the real classes in this process, and a fake model."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from deployments.models.report import ModelReport


class Remote:
    """Makes `thing.method.remote(...)` call the method, as a handle would; `broken` makes every call fail."""

    def __init__(self, thing: Any):
        self.thing = thing
        self.broken = False
        self.delay_s = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.thing, name)

        class Call:
            @staticmethod
            async def remote(*args: Any) -> Any:
                await asyncio.sleep(self.delay_s)
                if self.broken:
                    raise ConnectionError("the actor is gone")
                return await method(*args)

        return Call


class FakeModel:
    """A model that answers with its own name, or with what `script` yields."""

    def __init__(self, name: str):
        self.name = name
        self.script: (
            Callable[[str, dict[str, Any]], AsyncIterator[tuple[bytes, Any]]] | None
        ) = None
        self.calls: list[dict[str, Any]] = []
        self.cancelled = 0
        self.replica: Any = (
            None  # a future that is done when a replica has accepted the call
        )

    async def _say_name(
        self, task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        report = ModelReport(7, 2, "stop")
        if body.get("stream"):
            for word in ("I am ", self.name):
                yield (
                    f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n".encode(),
                    None,
                )
            yield b"data: [DONE]\n\n", report
        else:
            yield (
                json.dumps(
                    {
                        "model": self.name,
                        "choices": [{"message": {"content": self.name}}],
                    }
                ).encode(),
                report,
            )

    def options(self, **_: Any) -> "FakeModel":
        """Like `options` of a handle in throughput mode, which works inside an event loop only."""
        asyncio.get_running_loop()
        return self

    @property
    def complete(self) -> Any:
        """Like the method of a handle: the call returns the only item of a whole answer."""
        model = self

        class Whole:
            def __init__(self, task: str, body: dict[str, Any]):
                model.calls.append(body)
                self._replica_result_future = model.replica
                self._items = (model.script or model._say_name)(task, body)

            def __await__(self) -> Any:
                return anext(self._items).__await__()

            def cancel(self) -> None:
                model.cancelled += 1

        class Call:
            @staticmethod
            def remote(task: str, body: dict[str, Any]) -> Whole:
                return Whole(task, body)

        return Call

    @property
    def generate(self) -> Any:
        """Like the method of a streaming handle."""
        model = self

        class Stream:
            def __init__(self, task: str, body: dict[str, Any]):
                model.calls.append(body)
                self._replica_result_future = model.replica
                self._items = (model.script or model._say_name)(task, body)

            def __aiter__(self) -> Any:
                return self

            async def __anext__(self) -> Any:
                return await anext(self._items)

            def cancel(self) -> None:
                model.cancelled += 1

        class Call:
            @staticmethod
            def remote(task: str, body: dict[str, Any]) -> Stream:
                return Stream(task, body)

        return Call


def failing(
    error: BaseException, after: int = 0
) -> Callable[[str, dict[str, Any]], AsyncIterator[tuple[bytes, Any]]]:
    """A script that raises an error after so many chunks."""

    async def script(
        task: str, body: dict[str, Any]
    ) -> AsyncIterator[tuple[bytes, Any]]:
        for i in range(after):
            yield f"data: {i}\n\n".encode(), None
        raise error
        yield b"", None

    return script
