"""Serves the OpenAI-compatible API: each request is profiled, decided, dispatched and answered, in this order."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from fastapi import Request as HttpRequest

from deployments import errors, runtime
from deployments.access.api_keys import PRIORITY, ApiKeyStore
from deployments.access.cors import CrossOriginMiddleware
from deployments.access.edge import REQUEST_ID
from deployments.access.middleware import AccessMiddleware, identity_of
from deployments.access.rate_limits import RateLimiter
from deployments.dispatch.admission import HIGH, RANKS
from deployments.dispatch.calibration_worker import CalibrationWorker
from deployments.dispatch.dispatcher import (
    WAITED_S,
    Call,
    Dispatcher,
    too_busy,
)
from deployments.dispatch.router_client import RouterClient
from deployments.dispatch.variants import Variants
from deployments.documentation import openapi
from deployments.documentation.page import add_docs_routes
from deployments.errors import ApiError
from deployments.gateway.answer import AnswerRelay
from deployments.gateway.answer_checks import flaw_of
from deployments.gateway.calibration_routes import add_calibration_routes
from deployments.gateway.direct_route import BoundedRoute, DirectRoute
from deployments.gateway.eligibility import AnyRequest, Eligibility
from deployments.gateway.feedback_routes import add_router_routes
from deployments.gateway.variant_rules import VariantRules
from deployments.gateway.version_routes import TrackerHandle, add_version_routes
from deployments.grammars.bounds import is_constrained
from deployments.judging.judge import Judge
from deployments.judging.pairs import Pairs
from deployments.models import context_length
from deployments.models.handle import Body, ModelHandle
from deployments.observability import logs
from deployments.observability.gateway_metrics import GatewayTelemetry, RequestCounter
from deployments.observability.metrics import PairTelemetry
from deployments.parameters.chat import ChatRequest
from deployments.parameters.completion import CompletionRequest
from deployments.parameters.embedding import EmbeddingRequest
from deployments.parameters.needs import Need
from deployments.parameters.wishes import Wishes
from deployments.privacy.routes import add_privacy_routes
from deployments.profiler.deployment import ProfilerHandle
from deployments.profiler.reader import ProfileItem
from deployments.router.interface import RouterHandle
from deployments.settings import AUTO, GatewaySettings, KeySettings, Tuning
from policies.capabilities import Capability
from policies.constraints import Exclusion
from policies.events import ArmEstimate, Decision
from policies.types import Arm, Objective, Request

# of a model whose thinking the judge switches off
THINKS = frozenset({Capability.THINKING, Capability.VLLM_PARAMETERS})
REPORT_TIMEOUT_S = 5.0  # for the last outcomes to reach the router


class Ingress:
    """The gateway's HTTP application. A plain class: app.py makes a deployment of it.

    Args:
        settings: of the gateway.
        profiler: handle of the profiler deployment.
        connect_model: returns the handle of an application.
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
        models = settings.models
        self.dispatcher = Dispatcher(
            self.router_client, self._arms, connect_model, Variants(models.values())
        )
        self._variant_rules = VariantRules(models, self._arms)
        self.telemetry = GatewayTelemetry(
            self.dispatcher.admission.queues, self.dispatcher.breakers, RANKS
        )
        chat_models = [name for name in models if "chat" in self._arms[name].tasks]
        largest = chat_models[-1] if chat_models else ""
        background = self.dispatcher.background
        self.judge = Judge(
            background.text,
            largest,
            lambda items: self.router_client.router.feedback.remote(items, ""),
            lambda: self.router_client.scored,
            lambda name: not self.router_client.lacks(name) & THINKS,
        )
        self.pairs = Pairs(
            self.judge,
            self.router_client,
            background,
            self._arms,
            flaw_of,
            PairTelemetry().count,
        )
        self._eligibility = Eligibility(
            self.router_client, self._arms, settings.media_hosts
        )
        self.relay = AnswerRelay(
            self.dispatcher, self.router_client, self.judge, self.pairs, self._arms
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
        self.telemetry.flush()
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
        """Serve awaits this after the last answer. Second answers are cancelled, and outcomes that are queued get some
        time to reach the router.
        """
        if hasattr(self, "pairs"):
            await self.pairs.close()
        if hasattr(self, "router_client"):
            await self.router_client.outcomes.drain(REPORT_TIMEOUT_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(
            title="Adaptive LLM router",
            docs_url=None,
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
        )
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
            origins=self._settings.cors_origins,
        )
        if self._settings.cors_origins:
            # in front of the access check, because a preflight has no key
            app.add_middleware(
                CrossOriginMiddleware, origins=self._settings.cors_origins
            )
        app.add_middleware(RequestCounter, telemetry=self.telemetry)

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

        @app.get("/v1/models/{model:path}")  # ids of the hub have a slash
        async def model(model: str) -> dict[str, object]:
            if model not in self._names():
                raise self._no_such_model(model)
            return self._card(model)

        app.include_router(hot)
        add_router_routes(app, self.router_client)
        add_version_routes(app, lambda: self.tracker, lambda: self.router_client.router)
        add_privacy_routes(
            app,
            lambda: self.router_client.router,
            lambda user: self.router_client.identity.user_hash(user),
        )
        add_calibration_routes(
            app, self.router_client, self._arms, self.calibration.start
        )
        add_docs_routes(app)
        openapi.install(app, keyed=keys is not None)
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
        card: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": int(self._started),
            "owned_by": owner,
        }
        if name in self._arms and self._arms[name].variant_of:
            card["parent"] = self._arms[name].variant_of
        return card

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
        if rank == HIGH:
            _check_priority(request, http)
        objective, forced = self._objective(task, request)
        objective = self._variant_rules.bounded(task, objective, request)
        objective = self.dispatcher.check(task, objective, rank)
        needs = request.needs()
        if needs:
            self._eligibility.check_needs(task, needs, objective)
            self._eligibility.check_media(request)
        body = request.body()
        constrained = is_constrained(body)
        with self.dispatcher.admission.deciding():
            owner = identity_of(http).name
            asked = await self._profiled(task, request, needs, objective, forced, owner)
            self._eligibility.check_length(asked, body)
            asked = self.pairs.announce(asked, constrained)
            if not asked.pair:
                asked = self.judge.announce(asked)
            decision = await self.router_client.decide(asked, rank)
        if not decision.arm:
            raise self._no_model(decision, body)
        call = Call(task, asked, body, rank, request_id, constrained)
        answer = await self.dispatcher.ask(decision, call)
        return self.relay.respond(answer, call)

    async def _profiled(
        self,
        task: str,
        request: AnyRequest,
        needs: Sequence[Need],
        objective: Objective,
        forced: bool,
        owner: str,
    ) -> Request:
        """The request as the policy sees it."""
        read = request.texts()
        item = ProfileItem(
            read.last,
            read.context,
            read.messages,
            task,
            request.limit(),
            read.parts,
            read.token_counts,
        )
        profile, fallback = await self.router_client.profile(item)
        profile = self._eligibility.adjusted(profile, request, read, needs, objective)
        prompt_hash, prompt = self.router_client.prompt_fields(read.context)
        return Request(
            id=self.router_client.new_id(),
            profile=profile,
            objective=objective,
            forced=forced,
            fallback=fallback,
            prompt_hash=prompt_hash,
            prompt=prompt,
            owner=owner,
            users=self.router_client.user_hashes(request.users()),
            score_chance=self.router_client.scoring_rate(owner),
            pays_price=request.rank() != HIGH,
        )

    def _objective(self, task: str, request: AnyRequest) -> tuple[Objective, bool]:
        """The objective of a request, and whether the client named the model itself."""
        name = request.model
        tuning = self.router_client.tuning
        wishes = request.router or Wishes()
        self._check_models(wishes)
        if wishes.models is not None:
            resolved = [
                self._variant_rules.resolved(one, request) for one in wishes.models
            ]
            wishes = wishes.model_copy(update={"models": resolved})
        if name in self._arms:
            self._check_task(name, task)
            arm = self._variant_rules.resolved(name, request)
            return self._of_one(arm, wishes), True
        auto, colon, preset = name.partition(":")
        if auto != AUTO or (colon and preset not in tuning.presets):
            raise self._no_such_model(name)
        where = request.token_list
        if where is not None and len(wishes.models or ()) != 1:
            raise ApiError(
                400,
                f"{where}: token ids belong to the tokenizer of one model; name that model, or send text",
                where,
            )
        if task == "embed":
            return self._of_one(self._embedding_model(wishes), wishes), True
        base = tuning.presets[preset] if preset else tuning.objective
        return wishes.objective(base.objective()), False

    def _check_models(self, wishes: Wishes) -> None:
        """Refuse unknown names among the models that a request allows."""
        for wanted in wishes.models or ():
            if wanted not in self._arms:
                known = ", ".join(self._arms)
                raise ApiError(
                    400,
                    f"unknown model '{wanted[:100]}'; choose from: {known}",
                    "router.models",
                )

    def _of_one(self, name: str, wishes: Wishes) -> Objective:
        """The objective of a request for one model; hard limits hold for it as for a choice."""
        if wishes.models is not None and name not in wishes.models:
            raise ApiError(
                400,
                f"router.models does not have '{name}', the model that this request is for; add it, or leave it out",
                "router.models",
            )
        return replace(wishes.objective(Objective()), models=(name,))

    def _check_task(self, name: str, task: str) -> None:
        """Refuse a task that the model which the client named does not do."""
        tasks = self._arms[name].tasks
        if task not in tasks:
            raise ApiError(
                400,
                f"model '{name}' does not do the task '{task}', only: {', '.join(tasks)}",
                "model",
            )

    def _embedding_model(self, wishes: Wishes) -> str:
        """The model for all embeddings that name none; embeddings of different models cannot be compared."""
        names = [arm.name for arm in self._arms.values() if "embed" in arm.tasks]
        if not names:
            raise ApiError(
                404, "no model here makes embeddings", "model", "model_not_found"
            )
        wanted = [name for name in names if name in (wishes.models or names)]
        if not wanted:
            raise ApiError(
                400,
                f"router.models has no model that makes embeddings; add one of: {', '.join(names)}",
                "router.models",
            )
        return wanted[0]

    def _no_model(self, decision: Decision, body: Body) -> ApiError:
        """The error of a request for which no arm was eligible: 429 or 503 if waiting helps, otherwise 400."""
        reasons = "; ".join(f"{e.arm}: {e.removed_by}" for e in decision.estimates)
        never = {
            Exclusion.NOT_ALLOWED,
            Exclusion.TASK,
            Exclusion.CAPABILITY,
            Exclusion.VARIANT,
        }
        allowed = [
            e for e in decision.estimates if Exclusion.of(e.removed_by) not in never
        ]
        found = {Exclusion.of(e.removed_by) for e in allowed}
        if Exclusion.QUEUE_FULL in found or any(
            _late_only_by_queue(e) for e in allowed
        ):
            return too_busy(1.0)
        if found & {Exclusion.NO_REPLICA, Exclusion.CIRCUIT_OPEN}:
            return ApiError.later(
                503,
                f"no model can take this request now ({reasons})",
                5.0,
                "model_unavailable",
            )
        if found == {Exclusion.CONTEXT}:
            profile = decision.profile
            largest = max(self._arms[e.arm].context_tokens for e in allowed)
            prompt = profile.longest_prompt_tokens or profile.prompt_tokens
            return context_length.refusal(largest, prompt, body)
        return ApiError(
            400,
            f"no model can keep the limits of this request; relax them ({reasons})",
            "router",
        )


def _check_priority(request: AnyRequest, http: HttpRequest) -> None:
    """Refuse a high priority to a key without the scope for it; without keys everyone has it."""
    if PRIORITY not in identity_of(http).scopes:
        by_router = request.router is not None and request.router.priority is not None
        raise ApiError(
            403,
            f"this API key has no scope '{PRIORITY}', which a high priority needs; leave the priority out, or ask the "
            "operator for the scope",
            "router.priority" if by_router else "service_tier",
            "insufficient_scope",
        )


def _request_id(http: HttpRequest) -> str:
    """The request's id for the log: the client's, or the one that Serve made and answers with; "-" if it is unsafe."""
    request_id = http.headers.get("x-request-id", "")
    return request_id if REQUEST_ID.fullmatch(request_id) else "-"


def _late_only_by_queue(estimate: ArmEstimate) -> bool:
    """Whether an arm was removed for its expected latency, and a shorter queue could bring it below the limit."""
    return (
        Exclusion.of(estimate.removed_by) is Exclusion.LATENCY
        and estimate.latency_s > estimate.answer_s + WAITED_S
    )
