"""Serves the OpenAI-compatible API: each request is profiled, decided, dispatched and answered, in this order."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from fastapi import Request as HttpRequest

from deployments import errors, runtime
from deployments.access.api_keys import ApiKeyStore
from deployments.access.middleware import AccessMiddleware, identity_of
from deployments.access.rate_limits import RateLimiter
from deployments.dispatch.calibration_worker import CalibrationWorker
from deployments.dispatch.dispatcher import (
    WAITED_S,
    Call,
    Dispatcher,
    too_busy,
)
from deployments.dispatch.router_client import RouterClient
from deployments.errors import ApiError
from deployments.gateway.answer import AnswerRelay
from deployments.gateway.answer_checks import flaw_of
from deployments.gateway.calibration_routes import add_calibration_routes
from deployments.gateway.direct_route import BoundedRoute, DirectRoute
from deployments.gateway.feedback_routes import add_router_routes
from deployments.gateway.judge import Judge
from deployments.gateway.schemas import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
)
from deployments.gateway.version_routes import TrackerHandle, add_version_routes
from deployments.models.grammar import is_constrained
from deployments.models.handle import ModelHandle
from deployments.observability import logs
from deployments.profiler.deployment import ProfilerHandle
from deployments.profiler.reader import ProfileItem
from deployments.router.interface import RouterHandle
from deployments.settings import GatewaySettings, KeySettings, Tuning
from policies.constraints import Exclusion
from policies.events import ArmEstimate, Decision
from policies.types import Arm, Objective, Request

AUTO = "auto"
REPORT_TIMEOUT_S = 5.0  # for the last outcomes to reach the router
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Ingress:
    """The gateway's HTTP application. A plain class: app.py makes a deployment of it.

    Args:
        settings: of the gateway.
        profiler: handle of the profiler deployment.
        connect_model: returns the handle of an arm's application.
        connect_router, connect_tracker: return the handles of the two actors, and start an actor that does not run.
    """

    async def __init__(  # type: ignore[misc]
        self,
        settings: GatewaySettings,
        profiler: ProfilerHandle,
        connect_model: Callable[[str], ModelHandle],
        connect_router: Callable[[GatewaySettings], RouterHandle],
        connect_tracker: Callable[[GatewaySettings], TrackerHandle | None],
    ) -> None:
        runtime.bind_to_loopback()
        logs.configure("ingress")
        self._arms: dict[str, Arm] = {arm.name: arm for arm in settings.arms()}
        self._settings = settings
        self._started = time.time()
        self.router_client = RouterClient(
            settings, profiler, lambda: connect_router(settings)
        )
        self.dispatcher = Dispatcher(self.router_client, self._arms, connect_model)
        chat_models = [arm.name for arm in self._arms.values() if "chat" in arm.tasks]
        largest = chat_models[-1] if chat_models else ""
        background = self.dispatcher.background
        self.judge = Judge(
            background.text,
            largest,
            lambda items: self.router_client.router.feedback.remote(items, ""),
            lambda: self.router_client.scored,
        )
        self.relay = AnswerRelay(
            self.dispatcher, self.router_client, self.judge, self._arms
        )
        self.calibration = CalibrationWorker(
            self.router_client, background, self._arms, flaw_of, self.judge.score
        )
        self.router_client.on_refresh = self._on_refresh
        await self.router_client.start()
        self.tracker = connect_tracker(settings)
        runtime.tune_gc()

    def _on_refresh(self) -> None:
        self.dispatcher.background.observe_load()
        if self.router_client.calibrating:
            self.calibration.start()

    def reconfigure(self, user_config: dict[str, object]) -> None:
        """Apply a changed user_config; the next request uses it."""
        self.router_client.tuning = Tuning.model_validate(user_config)
        self.dispatcher.configure(self.router_client.tuning)
        self.judge.configure(self.router_client.tuning.judge)

    async def check_health(self) -> None:
        """Serve calls this every few seconds. The tracker is started again if it was restarted."""
        if self.tracker is not None:
            self.tracker.start.remote()

    async def __del__(self) -> None:
        """Serve awaits this after the last answer. Outcomes that are queued get some time to reach the router."""
        if hasattr(self, "router_client"):
            await self.router_client.outcomes.drain(REPORT_TIMEOUT_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(title="Adaptive LLM router", docs_url="/docs", redoc_url=None)
        app.router.route_class = BoundedRoute
        errors.install(app)
        keys = self._settings.keys
        key_store = ApiKeyStore(Path(keys.file)) if keys else None
        limits = RateLimiter(keys or KeySettings())
        app.add_middleware(
            AccessMiddleware,
            key_store=key_store,
            limits=limits,
            max_body_bytes=self._settings.max_body_bytes,
        )

        hot = APIRouter(route_class=DirectRoute)

        @hot.post("/v1/chat/completions")
        async def chat(request: ChatRequest, http: HttpRequest) -> Response:
            return await self.answer("chat", request, http)

        @hot.post("/v1/completions")
        async def completions(
            request: CompletionRequest, http: HttpRequest
        ) -> Response:
            return await self.answer("completion", request, http)

        @hot.post("/v1/embeddings")
        async def embeddings(request: EmbeddingRequest, http: HttpRequest) -> Response:
            return await self.answer("embed", request, http)

        @app.get("/v1/models")
        async def models() -> dict[str, object]:
            return {
                "object": "list",
                "data": [self._card(name) for name in self._names()],
            }

        @app.get("/v1/models/{model}")
        async def model(model: str) -> dict[str, object]:
            if model not in self._names():
                raise self._no_such_model(model)
            return self._card(model)

        app.include_router(hot)
        add_router_routes(app, self.router_client)
        add_version_routes(app, lambda: self.tracker, lambda: self.router_client.router)
        add_calibration_routes(
            app, self.router_client, self._arms, self.calibration.start
        )
        app.openapi()  # made and kept now: it takes 0.1 s, for which a request would hold the event loop
        return app

    def _names(self) -> list[str]:
        return [
            AUTO,
            *(f"{AUTO}:{preset}" for preset in self.router_client.tuning.presets),
            *self._arms,
        ]

    def _card(self, name: str) -> dict[str, object]:
        owner = "router" if name.startswith(AUTO) else "models"
        return {
            "id": name,
            "object": "model",
            "created": int(self._started),
            "owned_by": owner,
        }

    def _no_such_model(self, name: str) -> ApiError:
        known = ", ".join(self._names())
        return ApiError(
            404,
            f"unknown model '{name[:100]}'; choose one of: {known}",
            "model",
            "model_not_found",
        )

    # --- one request --------------------------------------------------------------------------------------------

    async def answer(
        self, task: str, request: AnyRequest, http: HttpRequest
    ) -> Response:
        """Profile a request, decide on its arm, dispatch it, and relay the answer."""
        request_id = _request_id(http)
        logs.REQUEST_ID.set(request_id)
        if self.dispatcher.spans is not None:
            self.dispatcher.spans.start(http.headers)
        rank = request.rank()
        objective, forced = self._objective(task, request)
        objective = self.dispatcher.check(task, objective, rank)
        with self.dispatcher.admission.deciding():
            owner = identity_of(http).name
            asked = await self._profiled(task, request, objective, forced, owner)
            decision = await self.router_client.decide(asked, rank)
        if not decision.arm:
            raise _no_model(decision)
        body = request.body()
        call = Call(task, asked, body, rank, request_id, is_constrained(body))
        answer = await self.dispatcher.ask(decision, call)
        return self.relay.respond(answer, call)

    async def _profiled(
        self,
        task: str,
        request: AnyRequest,
        objective: Objective,
        forced: bool,
        owner: str,
    ) -> Request:
        """The request as the policy sees it."""
        text, context, messages = request.texts()
        item = ProfileItem(text, context, messages, task, request.limit())
        profile, fallback = await self.router_client.profile(item)
        prompt_hash, prompt = self.router_client.prompt_fields(context)
        asked = Request(
            id=self.router_client.new_id(),
            profile=profile,
            objective=objective,
            forced=forced,
            fallback=fallback,
            prompt_hash=prompt_hash,
            prompt=prompt,
            owner=owner,
            score_chance=self.router_client.scoring_rate(owner),
        )
        return self.judge.announce(asked)

    def _objective(self, task: str, request: AnyRequest) -> tuple[Objective, bool]:
        """The objective of a request, and whether the client named the model itself."""
        name = request.model
        tuning = self.router_client.tuning
        if name in self._arms:
            self._check_task(name, task)
            return Objective(models=(name,)), True
        auto, _, preset = name.partition(":")
        if auto != AUTO or (preset and preset not in tuning.presets):
            raise self._no_such_model(name)
        if task == "embed":
            return Objective(models=(self._embedding_model(),)), True
        base = tuning.presets[preset] if preset else tuning.objective
        objective = base.objective()
        if request.router is None:
            return objective, False
        for wanted in request.router.models or ():
            if wanted not in self._arms:
                known = ", ".join(self._arms)
                raise ApiError(
                    400,
                    f"unknown model '{wanted[:100]}'; choose from: {known}",
                    "router.models",
                )
        return request.router.objective(objective), False

    def _check_task(self, name: str, task: str) -> None:
        """Refuse a task that the model which the client named does not do."""
        tasks = self._arms[name].tasks
        if task not in tasks:
            raise ApiError(
                400,
                f"model '{name}' does not do the task '{task}', only: {', '.join(tasks)}",
                "model",
            )

    def _embedding_model(self) -> str:
        """The model for all embeddings that name none; embeddings of different models cannot be compared."""
        for arm in self._arms.values():
            if "embed" in arm.tasks:
                return arm.name
        raise ApiError(
            404, "no model here makes embeddings", "model", "model_not_found"
        )


def _request_id(http: HttpRequest) -> str:
    """The request's id for the log: the client's, or the one that Serve made and answers with; "-" if it is unsafe."""
    request_id = http.headers.get("x-request-id", "")
    return request_id if REQUEST_ID.fullmatch(request_id) else "-"


def _late_only_by_queue(estimate: ArmEstimate) -> bool:
    """Whether an arm was removed for its expected latency, and a shorter queue could bring it below the limit."""
    answer_s = estimate.ttft_s + max(estimate.output_tokens - 1, 0) * estimate.tpot_s
    return (
        Exclusion.of(estimate.removed_by) is Exclusion.LATENCY
        and estimate.latency_s > answer_s + WAITED_S
    )


def _no_model(decision: Decision) -> ApiError:
    """The error of a request for which no arm was eligible: 429 or 503 if waiting helps, otherwise 400."""
    reasons = "; ".join(f"{e.arm}: {e.removed_by}" for e in decision.estimates)
    never = {Exclusion.NOT_ALLOWED, Exclusion.TASK}
    allowed = [e for e in decision.estimates if Exclusion.of(e.removed_by) not in never]
    found = {Exclusion.of(e.removed_by) for e in allowed}
    if Exclusion.QUEUE_FULL in found or any(_late_only_by_queue(e) for e in allowed):
        return too_busy(1.0)
    if found & {Exclusion.NO_REPLICA, Exclusion.CIRCUIT_OPEN}:
        return ApiError.later(
            503,
            f"no model can take this request now ({reasons})",
            5.0,
            "model_unavailable",
        )
    if found == {Exclusion.CONTEXT}:
        return ApiError(
            400,
            f"the prompt is too long; shorten it ({reasons})",
            code="context_length_exceeded",
        )
    return ApiError(
        400,
        f"no model can keep the limits of this request; relax them ({reasons})",
        "router",
    )
