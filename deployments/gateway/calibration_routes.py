"""Calibration over HTTP, for operators: start, watch, cancel, and grade by a program of the command's."""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from pydantic import AfterValidator, Field, StringConstraints

from deployments.access.middleware import identity_of
from deployments.calibration.prompts import MAX_PROMPTS, PromptLine
from deployments.calibration.records import RunOrder
from deployments.dispatch.router_client import RouterClient
from deployments.errors import ApiError
from deployments.gateway.version_routes import result_of
from deployments.model_settings import StrictModel
from deployments.parameters.values import DECISION_ID, Listed, Name
from policies.evaluation.size_comparison import compare_sizes
from policies.types import Arm

PATH = "/v1/router/calibrations"
MAX_PATTERNS_S = 0.5  # of CPU, for all regular expressions of a calibration


def _distinct(names: list[str]) -> list[str]:
    """Refuse a list that has a name twice."""
    if len(set(names)) < len(names):
        raise ValueError("a model is named twice; name each once")
    return names


Models = Annotated[
    Listed[Name], Field(min_length=1, max_length=64), AfterValidator(_distinct)
]


class CalibrationRequest(StrictModel):
    """POST /v1/router/calibrations: which prompts the sizes shall answer. Answers that exist are not asked again."""

    prompts: Annotated[Listed[PromptLine], Field(min_length=1, max_length=MAX_PROMPTS)]
    models: Models | None = Field(None, description="Default: all that chat.")
    by_program: bool = Field(
        False, description="The client grades: see /v1/router/calibrations/answers."
    )
    max_calls: int | None = Field(
        None, ge=1, description="Those of the judge included."
    )
    max_usd: float | None = Field(None, gt=0, description="Cost of the answers.")
    concurrency: int = Field(2, ge=1, le=64, description="Calls at once, of each size.")
    fresh: bool = Field(False, description="Ask again what was answered before.")


class Grade(StrictModel):
    """One score of the command's program."""

    decision_id: Annotated[str, StringConstraints(pattern=DECISION_ID)]
    score: float = Field(ge=0, le=1, strict=True)


class GradesRequest(StrictModel):
    """POST /v1/router/calibrations/scores."""

    scores: Annotated[Listed[Grade], Field(min_length=1, max_length=1000)]


def _check_patterns(prompts: list[PromptLine]) -> None:
    """Refuse a reference that is no regular expression, and patterns that take long to compile together."""
    spent_s = 0.0
    for number, line in enumerate(prompts):
        began_s = time.thread_time()
        try:
            line.check_pattern()
            took_s = time.thread_time() - began_s
            time.sleep(took_s)  # the event loop needs the interpreter's lock
            spent_s += took_s
            if spent_s > MAX_PATTERNS_S:
                raise ValueError(
                    "the patterns of these prompts take too long to compile; use fewer groups and counts"
                )
        except ValueError as error:
            path = f"prompts.{number}.reference"
            raise ApiError(400, f"{path}: {error}", path) from None


def add_calibration_routes(
    app: FastAPI,
    router_client: RouterClient,
    arms: dict[str, Arm],
    start_worker: Callable[[], None],
) -> None:
    """Add the routes to the gateway's application."""
    checking = asyncio.Lock()

    @app.post(PATH, status_code=202)
    async def start(request: CalibrationRequest) -> dict[str, object]:
        """Start a calibration, or go on with it. 409 while another one runs."""
        # in a thread, because many patterns take a second; one calibration at a time
        async with checking:
            await asyncio.to_thread(_check_patterns, request.prompts)
        chat = tuple(arm.name for arm in arms.values() if "chat" in arm.tasks)
        order = RunOrder(
            prompts=tuple(dict.fromkeys(line.record() for line in request.prompts)),
            models=tuple(request.models or chat),
            by_program=request.by_program,
            max_calls=request.max_calls,
            max_usd=request.max_usd,
            concurrency=request.concurrency,
            fresh=request.fresh,
            objective=router_client.tuning.objective.objective(),
        )
        status = await result_of(router_client.router.start_calibration.remote(order))
        start_worker()
        return status.plain()

    @app.get(PATH)
    async def show(report: bool = True) -> dict[str, object]:
        """State and progress of the last calibration, and its report so far."""
        if not report:
            call = router_client.router.calibration_status.remote()
            return (await result_of(call)).plain()
        view = await result_of(router_client.router.calibration_view.remote())
        found = None
        if view.answers:
            # in a thread: thousands of answers take a moment
            compared = await asyncio.to_thread(
                compare_sizes, view.answers, view.objective
            )
            found = compared.plain()
        return {**view.status.plain(), "report": found}

    @app.delete(PATH)
    async def cancel(http: HttpRequest) -> dict[str, object]:
        """Cancel the calibration that runs; its answers are kept, and the same prompts go on from there."""
        reason = f"by {identity_of(http).name or 'an operator'}"
        call = router_client.router.cancel_calibration.remote(reason)
        return (await result_of(call)).plain()

    @app.get(f"{PATH}/answers")
    async def answers() -> dict[str, object]:
        """The answers that wait for a score of the client's program."""
        found = await result_of(router_client.router.ungraded_answers.remote())
        return {
            "answers": [
                {
                    "decision_id": answer.decision_id,
                    "model": answer.model,
                    "prompt": answer.prompt,
                    "reference": answer.reference or None,
                    "answer": answer.answer,
                }
                for answer in found
            ]
        }

    @app.post(f"{PATH}/scores")
    async def scores(request: GradesRequest) -> dict[str, object]:
        """Scores for answers of /v1/router/calibrations/answers; others are ignored."""
        given = {grade.decision_id: grade.score for grade in request.scores}
        call = router_client.router.grade_answers.remote(given)
        return {"graded": await result_of(call)}
