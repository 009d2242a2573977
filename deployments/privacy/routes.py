"""Erasures and exports over HTTP, for operators."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from pydantic import Field, model_validator

from deployments.access.api_keys import NAME
from deployments.errors import ApiError
from deployments.journal.personal_data import Person
from deployments.model_settings import StrictModel
from deployments.privacy.records import ErasureState, PrivacyHandle

log = logging.getLogger(__name__)
CALL_TIMEOUT_S = 300.0  # the whole journal is read
PAGE = 200  # decisions of an export that are read at once
ERASURES = "/v1/router/erasures"
EXPORTS = "/v1/router/exports"
Result = TypeVar("Result")


class PersonRequest(StrictModel):
    """Whose data: of an API key by its name, or of a user by the client's `user` or `safety_identifier`."""

    key: str | None = Field(None, pattern=f"^{NAME.pattern}$")
    user: str | None = Field(None, min_length=1, max_length=512)

    @model_validator(mode="after")
    def _check_one(self) -> "PersonRequest":
        if (self.key is None) == (self.user is None):
            raise ValueError("say whose data: give either `key` or `user`")
        return self

    def person(self, user_hash: Callable[[str], str]) -> Person:
        """The person, with the user's name as the salted hash that is stored."""
        if self.key is not None:
            return Person(key=self.key)
        assert self.user is not None
        return Person(user=user_hash(self.user))


def add_privacy_routes(
    app: FastAPI,
    router: Callable[[], PrivacyHandle],
    user_hash: Callable[[str], str],
) -> None:
    """Add the routes to the gateway's application.

    Args:
        app: the application.
        router: returns the router's handle.
        user_hash: the salted hash of a client's name for its user.
    """

    @app.post(ERASURES)
    async def erase(request: PersonRequest, response: Response) -> dict[str, object]:
        """Erase everything that is stored of a key or a user; what was learned remains as sums over all requests.

        202 while a part is not done: ask for its `state` under its `id`.
        """
        call = router().erase.remote(request.person(user_hash))
        erasure = await _result(call)
        if erasure.state is not ErasureState.DONE:
            response.status_code = 202
        return erasure.plain()

    @app.get(ERASURES)
    async def erasures() -> dict[str, object]:
        """The latest erasures, newest first; none says whose data were erased."""
        known = await _result(router().erasures.remote())
        return {"erasures": [erasure.plain() for erasure in reversed(known)]}

    @app.get(f"{ERASURES}/{{erasure_id}}")
    async def erasure(erasure_id: str) -> dict[str, object]:
        """How far an erasure has come."""
        known = await _result(router().erasures.remote())
        for one in known:
            if one.id == erasure_id:
                return one.plain()
        raise ApiError(
            404, f"unknown erasure '{erasure_id[:64]}'; {ERASURES} lists them"
        )

    @app.post(EXPORTS)
    async def export(request: PersonRequest) -> StreamingResponse:
        """Everything that is stored of a key or a user: a JSON object a line, for each decision or score."""
        handle = router()
        ids, others = await _result(
            handle.personal_ids.remote(request.person(user_hash))
        )
        return StreamingResponse(
            _lines(handle, ids, others), media_type="application/x-ndjson"
        )


async def _lines(
    handle: PrivacyHandle, ids: list[str], others: list[str]
) -> AsyncIterator[str]:
    for start in range(0, len(ids), PAGE):
        for line in await handle.personal_lines.remote(ids[start : start + PAGE]):
            yield f"{line}\n"
    for line in others:
        yield f"{line}\n"


async def _result(call: Awaitable[Result]) -> Result:
    """The result of a method of the router; its refusal becomes a 409, any other failure a 503."""
    try:
        return await asyncio.wait_for(call, CALL_TIMEOUT_S)
    except ValueError as error:
        raise ApiError(
            409, str(getattr(error, "cause", error)), code="refused"
        ) from None
    except Exception:
        log.exception("an erasure or an export failed")
        message = "the router is not available at the moment; GET /v1/router/erasures says what is done"
        raise ApiError.later(503, message, 5.0, "unavailable") from None
