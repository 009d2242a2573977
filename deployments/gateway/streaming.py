"""Server-sent events, and a streaming response with a deadline."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments import errors
from deployments.models.report import ModelError

LAST_EVENT_S = 1.0  # after the deadline, for the event that reports it
log = logging.getLogger(__name__)


class DeadlineStreamingResponse(StreamingResponse):
    """A stream of events that always calls `on_end`, even if the client left before the stream began.

    Args:
        content: the events; the generator ends by itself within `limit_s`, as long as the client reads.
        headers: of the response.
        limit_s: the connection of a client that has not read everything by then is closed.
        on_end: called when the stream has ended, for whatever reason.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes],
        headers: dict[str, str],
        limit_s: float,
        on_end: Callable[[], None],
    ):
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._content = content
        self._limit_s = limit_s + LAST_EVENT_S
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See StreamingResponse."""
        try:
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            # the server closes the connection of an incomplete response
            log.warning("a client did not read its stream within %g s", self._limit_s)
        finally:
            # the generator's own `finally` reports how far it came
            await self._content.aclose()
            self._on_end()


def event(content: dict[str, object]) -> bytes:
    """One server-sent event."""
    return b"data: " + bytes(JSONResponse(content).body) + b"\n\n"


def public_error(error: ModelError) -> dict[str, object]:
    """The part of a model's error that the client may see: the reason of a refusal, but nothing of a failure."""
    return error.body() if error.status < 500 else stream_error()


def stream_error() -> dict[str, object]:
    """The error of a stream that broke off."""
    return errors.body(
        502, "the model failed while it answered; send the request again"
    )
