"""Cross-origin requests (CORS): which web pages may read the gateway's answers. By default none."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from deployments.errors import ApiError, respond

METHODS = ("GET", "HEAD", "POST", "DELETE")
# headers of answers that a page may read, apart from those that every page may
EXPOSED = (
    "x-request-id",
    "x-router-decision-id",
    "x-router-model",
    "x-router-policy-version",
    "x-router-fallback",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "retry-after",
)
MAX_AGE_S = 600


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's middleware with the gateway's methods and headers. A preflight needs no API key; it cannot have one.

    Args:
        app: the application behind the middleware.
        origins: of the pages, as `https://chat.example.com`; "*" for all.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]):
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            expose_headers=EXPOSED,
            max_age=MAX_AGE_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight; a refusal has OpenAI's shape."""
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        message = f"a web page may not send this request: {bytes(answer.body).decode()}"
        error = ApiError(400, message, code="cross_origin")
        return respond(error, {"vary": answer.headers.get("vary", "Origin")})
