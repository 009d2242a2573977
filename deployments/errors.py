"""API errors in OpenAI's shape. They say what is wrong and what to change, and reveal no internals."""

import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

GATE_REFUSED = "gate_refused"  # code of the error that a GateRefusedError becomes
UNION_BRANCH = re.compile(r"(constrained|function)-.*|(list|dict)\[.*\]|str")
MAX_ECHO = 100  # characters of a client's key or value in an error
MAX_PATH = 200  # characters of the path of a wrong value in an error
MAX_MESSAGE = 4_000
FIELD_ERROR = "wrong_field"  # pydantic's type of the errors that field_error makes
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


# of OpenAI's API, and what to use instead
UNSUPPORTED_ROUTES = {
    "/v1/responses": "the Responses API is not supported; use /v1/chat/completions",
    "/v1/messages": "Anthropic's API is not supported; use /v1/chat/completions",
    "/v1/assistants": "the Assistants API is not supported; use /v1/chat/completions",
    "/v1/threads": "the Assistants API is not supported; use /v1/chat/completions",
    "/v1/conversations": "conversations are not stored; use /v1/chat/completions",
    "/v1/batches": "batches are not supported; use /v1/chat/completions with router.priority batch",
    "/v1/edits": "edits are not supported; use /v1/chat/completions",
    "/v1/chat/completions/": "answers are not stored; the client keeps them",
    "/v1/files": "files are not supported; send texts, images, audio and videos to /v1/chat/completions",
    "/v1/images": "no model here makes images; models that read them take image_url parts at /v1/chat/completions",
    "/v1/audio": "audio is not written here; models that listen to it take input_audio parts at /v1/chat/completions",
    "/v1/realtime": "the Realtime API is not supported; use /v1/chat/completions with stream: true",
    "/v1/moderations": "moderations are not supported; ask a model at /v1/chat/completions",
    "/v1/fine_tuning": "fine-tuning is not supported; the operator deploys the models",
}


class ApiError(Exception):
    """An error for the client, with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}

    @classmethod
    def later(cls, status: int, message: str, wait_s: float, code: str) -> "ApiError":
        """An error with a header `retry-after`: `wait_s` as whole seconds, rounded up, between 1 and 60."""
        error = cls(status, message, code=code)
        error.headers["retry-after"] = str(min(60, max(1, ceil(wait_s))))
        return error


def body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """The error object of OpenAI's API."""
    message = message[:MAX_MESSAGE]
    kind = TYPES.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An ApiError as a response."""
    content = body(error.status, error.message, error.param, error.code)
    return JSONResponse(
        content, error.status, headers={**error.headers, **(headers or {})}
    )


def is_branch(part: Any) -> bool:
    """Whether this part of an error's location is pydantic's name for a branch of a union, which no client knows."""
    return UNION_BRANCH.fullmatch(str(part)) is not None


def _most_specific(found: Sequence[Any]) -> Any:
    """The first error; if it belongs to a union, the error of the branch that matched best."""
    first = found[0]
    if first["type"] == "extra_forbidden" or not is_branch(first["loc"][-1]):
        return first
    same = [
        error
        for error in found
        if error["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]
    ]
    return max(
        same, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"]))
    )


def _validation_error(error: RequestValidationError) -> ApiError:
    """The most specific of FastAPI's validation errors."""
    first = _most_specific(error.errors())
    kind = first["type"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not valid JSON: {reason}")
    where = _location(first)
    if kind == "extra_forbidden":
        message = f"unknown key '{where}'; remove it or correct its name"
        return ApiError(400, message, where)
    if where is None:
        return ApiError(
            400,
            "send a JSON object as the body, with the header content-type: application/json",
        )
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where}: {message}", where)


def _location(error: Any) -> str | None:
    """The path of the wrong value, with dots and of bounded length; None for the body itself."""
    parts = [str(part) for part in error["loc"]]
    own: list[str] = []
    if error["type"] == FIELD_ERROR:
        own = [error["ctx"]["field"]]
    if error["type"] == "extra_forbidden":
        # an unknown key is the client's own word, even if it looks like a branch of a union
        own = [parts.pop()]
    kept = [part for part in parts if part != "body" and not is_branch(part)]
    path = ".".join(_cut(part) for part in kept + own)
    if len(path) > MAX_PATH:
        path = path[:MAX_PATH] + "…"
    return path or None


def _cut(word: str) -> str:
    """A client's own word, cut to a length at which it may come back in an error."""
    return word if len(word) <= MAX_ECHO else f"{word[:MAX_ECHO]}…"


def _hint(request: Request, error: HTTPException) -> str:
    """What a client that asked for an unknown path or method should use instead."""
    if error.status_code not in (404, 405):
        return ""
    for path, hint in UNSUPPORTED_ROUTES.items():
        if request.url.path == path or request.url.path.startswith(
            f"{path.rstrip('/')}/"
        ):
            return f"; {hint}"
    return "; see /docs for what there is"


def field_error(field: str, message: str) -> PydanticCustomError:
    """An error of a validator about a field of the value that it validates.

    Args:
        field: the path of the field within the value, with dots.
        message: what is wrong with it, and what to change.
    """
    return PydanticCustomError(
        FIELD_ERROR, "{reason}", {"reason": message, "field": field}
    )


def install(app: FastAPI) -> None:
    """Give every error of this application OpenAI's shape."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return respond(error)

    async def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return respond(_validation_error(error))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"  # AccessMiddleware answers HEAD as GET
        message = f"{error.detail}{_hint(request, error)}"
        return respond(ApiError(error.status_code, message), headers)

    async def on_anything(_: Request, __: Exception) -> JSONResponse:
        return respond(
            ApiError(
                500, "the server failed to handle this request; it has been logged"
            )
        )

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_anything)


class UnknownVersionError(ValueError):
    """No policy version has this number."""


class GateRefusedError(ValueError):
    """A version, or a stage of the first day, is refused, because the log does not prove that it is good enough."""


class NoAnswerError(SystemExit):
    """A command ends with this message, because the system, or a part of it, does not run or does not answer."""
