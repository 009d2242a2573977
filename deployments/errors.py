"""Errors in OpenAI's shape: what is wrong and what to change, and nothing of our insides."""

import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

BRANCH = re.compile(r"(constrained|function)-.*|(list|dict)\[.*\]|str")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Something that the client should hear, with the status to say it in."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    @classmethod
    def later(cls, status: int, message: str, wait_s: float, code: str) -> "ApiError":
        """One that says when to come back: whole seconds, rounded up, between 1 and 60."""
        error = cls(status, message, code=code)
        error.headers["retry-after"] = str(min(60, max(1, ceil(wait_s))))
        return error


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object that OpenAI's clients understand."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An ApiError as a response."""
    content = body(error.status, error.message, error.param, error.code)
    return JSONResponse(content, error.status, headers={**error.headers, **(headers or {})})


def is_branch(part: Any) -> bool:
    """Whether pydantic means a branch of a union by this part of a place: no client has heard of these."""
    return BRANCH.fullmatch(str(part)) is not None


def _most_telling(found: Sequence[Any]) -> Any:
    """The first error; where it is of a union's branch, the one of the branch that came nearest."""
    first = found[0]
    if first["type"] == "extra_forbidden" or not is_branch(first["loc"][-1]):
        return first
    same = [error for error in found if error["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    return max(same, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))


def install(app: FastAPI) -> None:
    """Make every error of this app come out in OpenAI's shape."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return respond(error)

    async def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = _most_telling(error.errors())
        loc = first["loc"]
        own = len(loc) - 1 if first["type"] == "extra_forbidden" else -1  # the client's word, whatever it is
        parts = [str(p) for i, p in enumerate(loc) if i == own or (p != "body" and not is_branch(p))]
        where = ".".join(parts) or None
        if first["type"] == "json_invalid":
            return respond(ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}"))
        if first["type"] == "extra_forbidden":
            return respond(ApiError(400, f"unknown key '{where}'; remove it or correct its name", where))
        if where is None:
            return respond(
                ApiError(400, "send a JSON object as the body, with the header content-type: application/json")
            )
        message = first["msg"].removeprefix("Value error, ")
        return respond(ApiError(400, f"{where}: {message}", where))

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        hint = "; see /docs for what there is" if error.status_code in (404, 405) else ""
        return respond(ApiError(error.status_code, f"{error.detail}{hint}"), error.headers)

    async def on_anything(_: Request, __: Exception) -> JSONResponse:
        return respond(ApiError(500, "the server failed to handle this request; it has been logged"))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_anything)
