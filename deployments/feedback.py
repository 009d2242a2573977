"""The router's own HTTP surface: feedback, explanations, state, health; version_routes.py has the versions."""

import asyncio
import re
import time
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Response
from fastapi import Request as HttpRequest

from deployments.admission import NORMAL
from deployments.api import DECISION_ID, FeedbackRequest
from deployments.decider import OBSERVE_EVERY_S, PATIENCE_S, Decider
from deployments.errors import ApiError
from deployments.guard import caller
from deployments.memory import BUSY, EXPIRED, REUSED
from policies.explain import explain
from policies.ledger import ANYBODY, CROWDED, HELD, MAX_SOURCES, UNKNOWN
from policies.types import Feedback

ANSWER_S = 10.0
LOOKS = 20  # at the router for a decision that must be on its way there
Key = Annotated[str, Header(max_length=255, description="One effect and one reply for each key.")]
REFUSALS = {  # status of the router: of HTTP, message, parameter, code
    EXPIRED: (410, "this decision is too old for feedback; nothing was changed", "decision_id", "feedback_expired"),
    BUSY: (409, "a request with this Idempotency-Key is being answered now; try again", None, "idempotency_in_flight"),
    REUSED: (422, "this Idempotency-Key was used for another score; use a new key", None, "idempotency_key_reused"),
    CROWDED: (
        409,
        f"this decision has scores of {MAX_SOURCES} sources; use one of them",
        "source",
        "too_many_sources",
    ),
}


async def _ask(what: str, call: Any) -> Any:
    """The answer of an actor, or a 503 that says what did not work."""
    try:
        return await asyncio.wait_for(call, ANSWER_S)
    except Exception:
        raise ApiError.later(503, f"{what} is not available at the moment; try again", 2.0, "unavailable") from None


def add_router_routes(app: FastAPI, decider: Decider) -> None:
    """Add the routes to the gateway's application."""

    @app.post("/v1/feedback")
    async def feedback(
        request: FeedbackRequest, http: HttpRequest, response: Response, idempotency_key: Key = ""
    ) -> dict[str, Any]:
        """A score; `held` means that the decision is still on its way here, and the score counts when it arrives."""
        who = caller(http)
        who.count_score()
        given = request.decision_id, request.score, request.source
        item = Feedback(*given, time.time(), who.scorer, who.trusted)
        once = f"{who.name}/{idempotency_key}" if idempotency_key else ""
        (status,) = await _ask("the router", decider.router.feedback.remote([item], once))
        if status in REFUSALS:
            raise ApiError(*REFUSALS[status])
        if status == UNKNOWN:
            raise _no_such_decision(request.decision_id)
        response.status_code = 202 if status == HELD else 200
        return {"decision_id": request.decision_id, "status": status}

    @app.get("/v1/router/decisions/{decision_id}")
    async def decision(decision_id: str, http: HttpRequest) -> dict[str, Any]:
        if not re.fullmatch(DECISION_ID, decision_id):
            raise _no_such_decision(decision_id)
        record = await _ask("the router", decider.router.record.remote(decision_id))
        coming = time.time() - (decider.identity.made_at(decision_id) or 0.0) < PATIENCE_S
        for _ in range(LOOKS if coming and record is None else 0):  # on its way, from whichever ingress made it
            await asyncio.sleep(OBSERVE_EVERY_S)
            if (record := await _ask("the router", decider.router.record.remote(decision_id))) is not None:
                break
        if record is None and coming:  # the request goes on, or the router was away when it ended
            raise ApiError.later(503, "this decision is still on its way to the router; try again", 2.0, "unavailable")
        if record is None or caller(http).scorer not in (record.decision.owner, ANYBODY):
            raise _no_such_decision(decision_id)
        return explain(record)

    @app.get("/v1/router/state")
    async def state() -> dict[str, Any]:
        summary: dict[str, Any] = await _ask("the router", decider.router.summary.remote())
        for arm, model in summary["models"].items():
            model["wait_s"] = decider.wait_s(arm, NORMAL)  # in the line of this ingress, which is all that it knows
        return {**summary, "objective": decider.tuning.objective.model_dump()}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(models: Literal["any", "all"] = "any") -> Response:
        """For load balancers; with `models=all` only when every model is ready. While the router is away requests are
        answered, so it is not asked.
        """
        healthy, arms = decider.healthy()
        if healthy < (arms if models == "all" else 1):
            raise ApiError.later(503, "not ready yet", 2.0, "not_ready")
        return Response("ready\n", media_type="text/plain")


def _no_such_decision(decision_id: str) -> ApiError:
    shown = decision_id[:64]
    return ApiError(404, f"unknown decision '{shown}'; use the x-router-decision-id of an answer", "decision_id")
