"""Policy versions over HTTP, for operators: list, show, evaluate, promote, roll back, diff; stages of the first day."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal, Protocol, TypeVar

from fastapi import FastAPI, Path, Query
from fastapi import Request as HttpRequest
from pydantic import Field

from deployments.access.middleware import identity_of
from deployments.errors import (
    GATE_REFUSED,
    ApiError,
    GateRefusedError,
    UnknownVersionError,
)
from deployments.journal.rollout_state import OPERATOR
from deployments.model_settings import StrictModel
from deployments.remote import Method
from deployments.router.interface import RouterHandle

log = logging.getLogger(__name__)

Result = TypeVar("Result")
CALL_TIMEOUT_S = 300.0  # an evaluation reads thousands of rows
NO_MLFLOW = "no MLflow is configured; set mlflow_uri in serve_config.yaml"
Version = Annotated[int, Path(ge=1, lt=2**31)]
Other = Annotated[int, Query(ge=0, lt=2**31, description="0 for the champion.")]


class PublishRequest(StrictModel):
    """Without a body: the champion as it is now. With: another policy, that learns from the whole journal first."""

    policy: str = Field("", max_length=32)
    options: dict[str, float | str] | None = None


class PromoteRequest(StrictModel):
    """What role a version gets; see promotion.PromotionService.promote."""

    to: Literal["champion", "challenger", "shadow"] = "champion"
    share: float | None = Field(
        None, ge=0, le=1, description="Of the traffic, for a challenger."
    )
    override_gate: str = Field(
        "", max_length=1000, description="Promote without proof, for this reason."
    )


class RestoreRequest(StrictModel):
    """Which scores are forgotten while the router goes back to a version."""

    forget_since: datetime | Annotated[float, Field(ge=0, lt=1e11)] = Field(
        description="Scores that arrived at the gateway at this time or later: ISO 8601 (UTC without a zone), or "
        "seconds since the epoch."
    )
    key: str | None = Field(
        None,
        max_length=32,
        description="Only scores that the API key of this name gave.",
    )
    reason: str = Field("", max_length=1000)

    @property
    def since_s(self) -> float:
        """The time in seconds since the epoch."""
        since = self.forget_since
        if isinstance(since, float):
            return since
        return (since if since.tzinfo else since.replace(tzinfo=UTC)).timestamp()


class AdvanceRequest(StrictModel):
    """The next stage of the first day begins if the gate agrees; see policies/rollout/first_day.py."""

    override_gate: str = Field(
        "", max_length=1000, description="Begin without proof, for this reason."
    )


class RollbackRequest(StrictModel):
    """The champion is rolled back to its predecessor, or on the first day to the rule; other roles are taken away."""

    role: Literal["champion", "challenger", "shadow"] = "champion"
    reason: str = Field("", max_length=1000)


Reply = dict[str, object] | None  # None if no MLflow is configured


class TrackerHandle(Protocol):
    """What the gateway needs of a handle of the tracker actor; the methods are those of tracker.Tracker."""

    start: Method[[], bool]
    list_versions: Method[[], Reply]
    publish: Method[[str, Mapping[str, float | str] | None, str], Reply]
    show_version: Method[[int], Reply]
    diff: Method[[int, int], Reply]
    evaluate: Method[[int], Reply]
    promote: Method[[int, str, float | None, str, str], Reply]
    restore: Method[[int, float, str | None, str, str], Reply]


def add_version_routes(
    app: FastAPI,
    tracker: Callable[[], TrackerHandle | None],
    router: Callable[[], RouterHandle],
) -> None:
    """Add the routes to the gateway's application."""

    def connected() -> TrackerHandle:
        """Handle of the tracker actor."""
        handle = tracker()
        if handle is None:
            raise ApiError(409, NO_MLFLOW)
        return handle

    async def reply(call: Awaitable[Reply]) -> dict[str, object]:
        """The reply of a method of the tracker."""
        found = await result_of(call)
        if found is None:
            raise ApiError(409, NO_MLFLOW)
        return found

    @app.get("/v1/router/versions")
    async def versions() -> dict[str, object]:
        return await reply(connected().list_versions.remote())

    @app.post("/v1/router/versions")
    async def publish(
        http: HttpRequest, request: PublishRequest | None = None
    ) -> dict[str, object]:
        """Register what is learned by now as a new policy version in MLflow."""
        given = request or PublishRequest()
        by = operator_of(http)
        return await reply(connected().publish.remote(given.policy, given.options, by))

    @app.get("/v1/router/versions/{version}")
    async def show(version: Version) -> dict[str, object]:
        return await reply(connected().show_version.remote(version))

    @app.get("/v1/router/versions/{version}/diff")
    async def diff(version: Version, other: Other = 0) -> dict[str, object]:
        """Beside another version; by default the champion."""
        return await reply(connected().diff.remote(version, other))

    @app.post("/v1/router/versions/{version}/evaluate")
    async def evaluate(version: Version) -> dict[str, object]:
        """Beside the champion, on the log; the report is attached to the version."""
        return await reply(connected().evaluate.remote(version))

    @app.post("/v1/router/versions/{version}/promote")
    async def promote(
        version: Version, request: PromoteRequest, http: HttpRequest
    ) -> dict[str, object]:
        """409 where the log does not show that it is better than the champion."""
        by = operator_of(http)
        return await reply(
            connected().promote.remote(
                version, request.to, request.share, request.override_gate, by
            )
        )

    @app.post("/v1/router/versions/{version}/restore")
    async def restore(
        version: Version, request: RestoreRequest, http: HttpRequest
    ) -> dict[str, object]:
        """Go back to a version, and learn all that happened since then again without some scores.

        The result is the champion; a rollback undoes it.
        """
        by = identity_of(http).name
        if request.since_s > time.time():
            raise ApiError(
                400, "forget_since: this time is still to come", "forget_since"
            )
        return await reply(
            connected().restore.remote(
                version, request.since_s, request.key, request.reason, by
            )
        )

    @app.post("/v1/router/versions/rollback")
    async def rollback(
        http: HttpRequest, request: RollbackRequest
    ) -> dict[str, object]:
        """At once, and without MLflow: the predecessor is still alive in the router."""
        by = operator_of(http)
        reason = request.reason or "no reason given"
        if request.role == "champion":
            change = router().roll_back.remote(reason, by)
        else:
            change = router().remove_role.remote(request.role, reason, by)
        return (await result_of(change)).plain()

    @app.get("/v1/router/rollout")
    async def rollout() -> dict[str, object]:
        """The roles, and on the first day its stage, what the policy would have done, and what comes next."""
        return (await result_of(router().summary.remote())).rollout.plain()

    @app.post("/v1/router/rollout/advance")
    async def advance(
        http: HttpRequest, request: AdvanceRequest | None = None
    ) -> dict[str, object]:
        """Begin the next stage of the first day; 409 where the gate refuses, with what it waits for."""
        given = request or AdvanceRequest()
        override = given.override_gate
        reason = f"overriding the gate: {override}" if override else ""
        by = operator_of(http)
        change = router().advance.remote(reason, bool(override), by)
        return (await result_of(change)).plain()


def operator_of(http: HttpRequest) -> str:
    """Who asks for an operation: the name of the key, or OPERATOR if the gateway has no keys."""
    return identity_of(http).name or OPERATOR


async def result_of(call: Awaitable[Result]) -> Result:
    """The result of an actor's method; its refusal becomes a 409 with the reason, any other failure a 503."""
    try:
        return await asyncio.wait_for(call, CALL_TIMEOUT_S)
    except UnknownVersionError as error:
        raise ApiError(404, _words(error), "version") from None
    except GateRefusedError as error:
        raise ApiError(409, _words(error), code=GATE_REFUSED) from None
    except ValueError as error:
        code = getattr(getattr(error, "cause", error), "code", "refused")
        raise ApiError(409, _words(error), code=str(code)) from None
    except Exception:
        log.exception("a command of an operator failed")
        message = "the registry is not available at the moment; try again"
        raise ApiError.later(503, message, 2.0, "unavailable") from None


def _words(error: Exception) -> str:
    return str(
        getattr(error, "cause", error)
    )  # Ray raises a copy with a traceback in its text
