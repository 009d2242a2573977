"""Policy versions over HTTP, for operators: list, show, evaluate, promote, roll back, diff."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query
from fastapi import Request as HttpRequest
from pydantic import Field

from deployments.api import Strict
from deployments.errors import ApiError
from deployments.guard import caller
from deployments.versions import MODEL, UnknownVersionError

PATIENCE_S = 300.0  # an evaluation reads thousands of rows
Version = Annotated[int, Path(ge=1, lt=2**31)]
Other = Annotated[int, Query(ge=0, lt=2**31, description="0 for the champion.")]


class PublishRequest(Strict):
    """Without a body: the champion as it is now. With: another policy, that learns from the whole journal first."""

    policy: str = Field("", max_length=32)
    options: dict[str, float | str] | None = None


class PromoteRequest(Strict):
    """What role a version gets; see promotion.Promotions.promote."""

    to: Literal["champion", "challenger", "shadow"] = "champion"
    share: float | None = Field(None, ge=0, le=1, description="Of the traffic, for a challenger.")
    override_gate: str = Field("", max_length=1000, description="Promote without proof, for this reason.")


class RollbackRequest(Strict):
    """The champion is rolled back to its predecessor; a challenger or shadow is taken off."""

    role: Literal["champion", "challenger", "shadow"] = "champion"
    reason: str = Field("", max_length=1000)


def add_version_routes(app: FastAPI, tracker: Callable[[], Any], router: Callable[[], Any]) -> None:
    """Add the routes to the gateway's application."""

    async def ask(verb: str, **options: Any) -> Any:
        handle = tracker()
        found = await _told(handle.operate.remote(verb, options)) if handle else None
        if found is None:
            raise ApiError(409, "no MLflow is configured; set mlflow_uri in serve_config.yaml")
        return found

    @app.get("/v1/router/versions")
    async def versions() -> dict[str, Any]:
        return {"name": MODEL, "versions": await ask("list")}

    @app.post("/v1/router/versions")
    async def publish(http: HttpRequest, request: PublishRequest | None = None) -> dict[str, Any]:
        """Register what is learned by now as a new policy version in MLflow."""
        given = request.model_dump() if request else {}
        return {"name": MODEL, "version": await ask("publish", **given, by=caller(http).name)}

    @app.get("/v1/router/versions/{version}")
    async def show(version: Version) -> dict[str, Any]:
        return await ask("show", version=version)  # type: ignore[no-any-return]

    @app.get("/v1/router/versions/{version}/diff")
    async def diff(version: Version, other: Other = 0) -> dict[str, Any]:
        """Beside another version; by default the champion."""
        return await ask("diff", version=version, other=other)  # type: ignore[no-any-return]

    @app.post("/v1/router/versions/{version}/evaluate")
    async def evaluate(version: Version) -> dict[str, Any]:
        """Beside the champion, on the log; the report is attached to the version."""
        return await ask("evaluate", version=version)  # type: ignore[no-any-return]

    @app.post("/v1/router/versions/{version}/promote")
    async def promote(version: Version, request: PromoteRequest, http: HttpRequest) -> dict[str, Any]:
        """409 where the log does not show that it is better than the champion."""
        who = caller(http).name
        given = {"to": request.to, "share": request.share, "override": request.override_gate, "by": who}
        return await ask("promote", version=version, **given)  # type: ignore[no-any-return]

    @app.post("/v1/router/versions/rollback")
    async def rollback(http: HttpRequest, request: RollbackRequest) -> dict[str, Any]:
        """At once, and without MLflow: the predecessor is still alive in the router."""
        reason = f"by {caller(http).name or 'an operator'}: {request.reason or 'no reason given'}"
        verb = "rollback" if request.role == "champion" else "vacate"
        options = {} if request.role == "champion" else {"role": request.role}
        return await _told(router().rollout.remote(verb, reason, options))  # type: ignore[no-any-return]


async def _told(call: Any) -> Any:
    """The answer of an actor; a refusal is a 409 with its reason, silence a 503."""
    try:
        return await asyncio.wait_for(call, PATIENCE_S)
    except UnknownVersionError as error:
        raise ApiError(404, _words(error), "version") from None
    except ValueError as error:
        raise ApiError(409, _words(error), code="refused") from None
    except Exception:
        message = "the registry is not available at the moment; try again"
        raise ApiError.later(503, message, 2.0, "unavailable") from None


def _words(error: Exception) -> str:
    return str(getattr(error, "cause", error))  # Ray raises a copy with a traceback in its text
