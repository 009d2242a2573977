"""A route for the hot path: pydantic reads the body's bytes itself, in half of FastAPI's time for a request."""

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

NO_JSON = [{"type": "missing", "loc": ("body",), "msg": "no JSON", "input": None}]


class DirectRoute(APIRoute):
    """For endpoints of the form (request: a model of pydantic's, http: Request) -> Response; nothing is injected.

    The documentation (/openapi.json) and the errors are those of an ordinary route. As there, a body counts only with
    a JSON content type: a web page can send no such thing to another site unasked.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI, "Custom Request and APIRoute class"."""
        model: type[BaseModel] = get_type_hints(self.endpoint)["request"]
        endpoint = self.endpoint

        async def handle(http: Request) -> Response:
            raw = await http.body()
            kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
            is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
            if not raw or not is_json:
                raise RequestValidationError(NO_JSON)
            try:
                request = model.model_validate_json(raw)
            except ValidationError as error:
                found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
                raise RequestValidationError(found) from None
            response: Response = await endpoint(request, http)
            return response

        return handle
