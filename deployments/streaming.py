"""An answer as a stream of events: within a deadline, and over once, however it ends."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from deployments import errors

LAST_S = 1.0  # after the deadline, for the event that says so
log = logging.getLogger(__name__)


class Streamed(StreamingResponse):
    """A stream that says so when it is over, also when it never began because the client was gone before.

    Args:
        content: events; ends by itself within `limit_s`, as long as they are taken.
        headers: of the response.
        limit_s: a client that has not taken all of it by then is hung up on.
        over: called when it has ended, whoever ended it.
    """

    def __init__(
        self, content: AsyncGenerator[bytes], headers: dict[str, str], limit_s: float, over: Callable[[], None]
    ):
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._content, self._limit_s, self._over = content, limit_s + LAST_S, over

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See StreamingResponse."""
        try:
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # the server closes the connection of a response that is not whole
            log.warning("a client did not read its stream within %g s", self._limit_s)
        finally:
            await self._content.aclose()  # it knows how far it came
            self._over()


def event(content: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + bytes(JSONResponse(content).body) + b"\n\n"


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """An engine's error as the client may see it: a refusal says why, a failure is our affair."""
    if report["status"] < 500:
        return {"error": report["error"]}
    return broken()


def broken() -> dict[str, Any]:
    """The error of an answer that ended before its end."""
    return errors.body(502, "the model failed while it answered; send the request again")
