"""HTTP routes of the router: feedback, explanations of decisions, state and health."""

import asyncio
import re
import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

from fastapi import FastAPI, Header, Response
from fastapi import Request as HttpRequest
from msgspec import structs
from pydantic import Field, StringConstraints, field_validator

from deployments.access.middleware import identity_of
from deployments.dispatch.admission import NORMAL
from deployments.dispatch.outcome_reporter import GIVE_UP_AFTER_S, SEND_EVERY_S
from deployments.dispatch.router_client import RouterClient
from deployments.errors import ApiError
from deployments.model_settings import StrictModel
from deployments.parameters.values import DECISION_ID
from policies.events import (
    ANY_OWNER,
    BUSY,
    DERIVED_SOURCES,
    EXPIRED,
    MAX_SOURCES,
    PENDING,
    REUSED,
    TOO_MANY_SOURCES,
    UNANSWERED,
    UNKNOWN,
    Feedback,
    Record,
)
from policies.explain import explain

CALL_TIMEOUT_S = 10.0
Result = TypeVar("Result")

POLLS = 20  # of the router, for a recent decision that it does not know yet
Key = Annotated[
    str, Header(max_length=255, description="One effect and one reply for each key.")
]
# by the router's status: status of HTTP, message, parameter, code
REFUSALS = {
    EXPIRED: (
        410,
        "this decision is too old for feedback; nothing was changed",
        "decision_id",
        "feedback_expired",
    ),
    BUSY: (
        409,
        "a request with this Idempotency-Key is being answered now; try again",
        None,
        "idempotency_in_flight",
    ),
    REUSED: (
        422,
        "this Idempotency-Key was used for another score; use a new key",
        None,
        "idempotency_key_reused",
    ),
    UNANSWERED: (
        409,
        "this request was refused, so there is no answer to score; nothing was changed",
        "decision_id",
        "no_answer",
    ),
    TOO_MANY_SOURCES: (
        409,
        f"this decision has scores of {MAX_SOURCES} sources; use one of them",
        "source",
        "too_many_sources",
    ),
}


class FeedbackRequest(StrictModel):
    """POST /v1/feedback."""

    decision_id: Annotated[str, StringConstraints(pattern=DECISION_ID)]
    score: float = Field(ge=0, le=1, strict=True)
    source: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] = (
        "user"
    )

    @field_validator("source")
    @classmethod
    def _is_free(cls, source: str) -> str:
        """Refuse the names of what earlier releases derived, whose scores do not count."""
        if source in DERIVED_SOURCES:
            names = " and ".join(f"'{name}'" for name in DERIVED_SOURCES)
            raise ValueError(
                f"the sources {names} are reserved for the journals of earlier releases; choose another name"
            )
        return source


async def _ask(call: Awaitable[Result]) -> Result:
    """The result of a method of the router, or a 503."""
    try:
        return await asyncio.wait_for(call, CALL_TIMEOUT_S)
    except Exception:
        raise ApiError.later(
            503,
            "the router is not available at the moment; try again",
            2.0,
            "unavailable",
        ) from None


def add_router_routes(app: FastAPI, router_client: RouterClient) -> None:
    """Add the routes to the gateway's application."""

    async def find_record(decision_id: str) -> Record | None:
        return await _ask(router_client.router.record.remote(decision_id))

    @app.post("/v1/feedback")
    async def feedback(
        request: FeedbackRequest,
        http: HttpRequest,
        response: Response,
        idempotency_key: Key = "",
    ) -> dict[str, object]:
        """Score an answer.

        Status `pending`: the decision has not reached the router yet, and the score counts when it does.
        """
        identity = identity_of(http)
        identity.count_score()
        item = Feedback(
            request.decision_id,
            request.score,
            request.source,
            time.time(),
            identity.scorer,
            identity.trusted,
            identity.name,
        )
        once = f"{identity.name}/{idempotency_key}" if idempotency_key else ""
        call = router_client.router.feedback.remote([item], once)
        (status,) = await _ask(call)
        if status in REFUSALS:
            raise ApiError(*REFUSALS[status])
        if status == UNKNOWN:
            raise _no_such_decision(request.decision_id)
        response.status_code = 202 if status == PENDING else 200
        return {"decision_id": request.decision_id, "status": status}

    @app.get("/v1/router/decisions/{decision_id}")
    async def decision(decision_id: str, http: HttpRequest) -> dict[str, object]:
        """Explain a decision: the profile, the estimate of every model, the outcome and the scores.

        `figures_of_kind` is what the latest decisions of the same kind of work show of each model now.
        """
        if not re.fullmatch(DECISION_ID, decision_id):
            raise _no_such_decision(decision_id)
        record = await find_record(decision_id)
        made_at_s = router_client.identity.created_at(decision_id) or 0.0
        recent = time.time() - made_at_s < GIVE_UP_AFTER_S
        polls = POLLS if recent else 0
        while record is None and polls:
            await asyncio.sleep(SEND_EVERY_S)
            record = await find_record(decision_id)
            polls -= 1
        if record is None and recent:
            # the model still answers, or the router did not run when the answer ended
            raise ApiError.later(
                503,
                "this decision is still on its way to the router; try again",
                2.0,
                "unavailable",
            )
        if record is None:
            raise _no_such_decision(decision_id)
        if identity_of(http).scorer not in (record.decision.owner, ANY_OWNER):
            raise _no_such_decision(decision_id)
        pair = record.decision.pair
        other = await find_record(pair) if pair else None
        kind = record.decision.profile.kind
        figures = await _ask(router_client.router.kind_figures.remote(kind))
        return explain(record, figures, other)

    @app.get("/v1/router/state")
    async def state() -> dict[str, object]:
        """The router's statistics and the current objective; `wait_s` is the queue of the ingress that answers.

        `figures` of a model are those of its latest decisions, `kinds` the same by kind of work; an unknown value is
        null.
        """
        summary = await _ask(router_client.router.summary.remote())
        models = {}
        for name, arm in summary.models.items():
            wait_s = router_client.wait_s(arm.variant_of or name, NORMAL)
            live = structs.replace(arm.state, wait_s=wait_s)
            models[name] = replace(arm, state=live)
        plain = replace(summary, models=models).plain()
        return {**plain, "objective": router_client.tuning.objective.model_dump()}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """For load balancers: the gateway's process runs."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(models: Literal["any", "all"] = "any") -> Response:
        """For load balancers: a model is ready, or with `models=all` every model. One that is scaled to zero is ready.

        The router is not asked: the gateway answers requests without it.
        """
        ready, arms = router_client.ready()
        if ready < (arms if models == "all" else 1):
            raise ApiError.later(503, "not ready yet", 2.0, "not_ready")
        return Response("ready\n", media_type="text/plain")


def _no_such_decision(decision_id: str) -> ApiError:
    shown = decision_id[:64]
    return ApiError(
        404,
        f"unknown decision '{shown}'; use the x-router-decision-id of an answer",
        "decision_id",
    )
