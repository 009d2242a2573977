"""Routes that bound a body's shape before it is validated, and one for the hot path that pydantic reads by itself."""

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from deployments.body import check_shape
from deployments.errors import ApiError

NO_JSON = [{"type": "missing", "loc": ("body",), "msg": "no JSON", "input": None}]
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class BoundedRoute(APIRoute):
    """An ordinary route that refuses a body with too many parts before FastAPI validates it."""

    def get_route_handler(self) -> Handler:
        """See FastAPI, "Custom Request and APIRoute class"."""
        validated = super().get_route_handler()
        if self.body_field is None:
            return validated

        async def handle(http: Request) -> Response:
            raw = await http.body()
            if raw:
                bound_shape(raw)
            return await validated(http)

        return handle


class DirectRoute(APIRoute):
    """For endpoints of the form (request: a model of pydantic's, http: Request) -> Response; nothing is injected.

    Pydantic reads the body's bytes itself, in half of FastAPI's time for a request. The documentation (/openapi.json)
    and the errors are those of an ordinary route. As there, a body counts only with a JSON content type: a web page
    cannot send one to another site without asking.
    """

    def get_route_handler(self) -> Handler:
        """See FastAPI, "Custom Request and APIRoute class"."""
        model: type[BaseModel] = get_type_hints(self.endpoint)["request"]
        endpoint = self.endpoint

        async def handle(http: Request) -> Response:
            raw = await http.body()
            kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
            is_json = kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
            if not raw or not is_json:
                raise RequestValidationError(NO_JSON)
            bound_shape(raw)
            try:
                request = model.model_validate_json(raw)
            except ValidationError as error:
                found = error.errors(include_url=False, include_input=False)
                raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None
            response: Response = await endpoint(request, http)
            return response

        return handle


def bound_shape(raw: bytes) -> None:
    """See check_shape.

    Raises:
        ApiError: 400.
    """
    try:
        check_shape(raw)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
