"""HTTP in, HTTP out: the steps of one request, in order."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from msgspec import structs

from deployments import collector, dataplane, errors, logs
from deployments.api import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest
from deployments.decider import Decider
from deployments.direct import BoundedRoute, DirectRoute
from deployments.dispatch import FULL, RESTING, WAITED_S, Answer, Call, Dispatcher, full
from deployments.errors import ApiError
from deployments.feedback import add_router_routes
from deployments.grammar import is_constrained
from deployments.guard import Guard, caller
from deployments.judge import Judge
from deployments.keys import Keyring
from deployments.limits import Limits
from deployments.listener import Listener
from deployments.settings import GatewaySettings, KeySettings, Tuning
from deployments.streaming import Streamed, broken, event, shown
from deployments.version_routes import add_version_routes
from policies.types import FORCED, Arm, ArmEstimate, Decision, Objective, Outcome, Request

AUTO = "auto"
TOLD_S = 5.0  # that the router has to take the last outcomes
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
log = logging.getLogger(__name__)


class Ingress:
    """The one URL. A plain class: app.py wraps it.

    Args:
        settings: of the gateway.
        profiler: handle of the profiler deployment.
        connect_model: gives the handle of an arm's application.
        connect_router, connect_tracker: give handles of the two actors, making them if there are none.
    """

    async def __init__(  # type: ignore[misc]
        self,
        settings: GatewaySettings,
        profiler: Any,
        connect_model: Callable[[str], Any],
        connect_router: Callable[[GatewaySettings], Any],
        connect_tracker: Callable[[GatewaySettings], Any],
    ) -> None:
        dataplane.on_loopback()
        logs.configure("ingress")
        self._arms: dict[str, Arm] = {arm.name: arm for arm in settings.arms()}
        self._settings, self._started = settings, time.time()
        self.decider = Decider(settings, profiler, lambda: connect_router(settings))
        self.dispatcher = Dispatcher(self.decider, self._arms, connect_model)
        largest = next((arm for arm in reversed(self._arms) if "chat" in self._arms[arm].tasks), "")
        self.judge = Judge(self.dispatcher.aside, largest, lambda items: self.decider.router.feedback.remote(items))
        await self.decider.start()
        self.tracker = connect_tracker(settings)
        collector.relax()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over changed tuning; the next request uses it."""
        self.decider.tuning = Tuning.model_validate(user_config)
        self.dispatcher.configure(self.decider.tuning)
        self.judge.configure(self.decider.tuning.judge)

    async def check_health(self) -> None:
        """Serve asks every few seconds; a tracker that died and came back is set to work again."""
        if self.tracker is not None:
            self.tracker.start.remote()

    async def __del__(self) -> None:
        """Serve awaits it when the last answer is out: outcomes travel a little later."""
        if hasattr(self, "decider") and self.decider._telling is not None:
            await asyncio.wait([self.decider._telling], timeout=TOLD_S)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(title="Adaptive LLM router", docs_url="/docs", redoc_url=None)
        app.router.route_class = BoundedRoute
        errors.install(app)
        keys = self._settings.keys
        keyring, limits = Keyring(Path(keys.file)) if keys else None, Limits(keys or KeySettings())
        app.add_middleware(Guard, keyring=keyring, limits=limits, max_body_bytes=self._settings.max_body_bytes)

        hot = APIRouter(route_class=DirectRoute)

        @hot.post("/v1/chat/completions")
        async def chat(request: ChatRequest, http: HttpRequest) -> Response:
            return await self.answer("chat", request, http)

        @hot.post("/v1/completions")
        async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
            return await self.answer("completion", request, http)

        @hot.post("/v1/embeddings")
        async def embeddings(request: EmbeddingRequest, http: HttpRequest) -> Response:
            return await self.answer("embed", request, http)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [self._card(name) for name in self._names()]}

        @app.get("/v1/models/{model}")
        async def model(model: str) -> dict[str, Any]:
            if model not in self._names():
                raise self._no_such_model(model)
            return self._card(model)

        app.include_router(hot)
        add_router_routes(app, self.decider)
        add_version_routes(app, lambda: self.tracker, lambda: self.decider.router)
        return app

    def _names(self) -> list[str]:
        return [AUTO, *(f"{AUTO}:{preset}" for preset in self.decider.tuning.presets), *self._arms]

    def _card(self, name: str) -> dict[str, Any]:
        owner = "router" if name.startswith(AUTO) else "models"
        return {"id": name, "object": "model", "created": int(self._started), "owned_by": owner}

    def _no_such_model(self, name: str) -> ApiError:
        known = ", ".join(self._names())
        return ApiError(404, f"unknown model '{name[:100]}'; choose one of: {known}", "model", "model_not_found")

    # --- one request --------------------------------------------------------------------------------------------

    async def answer(self, task: str, request: AnyRequest, http: HttpRequest) -> Response:
        """Profile, decide, generate, and report."""
        request_id = http.headers.get("x-request-id", "")  # Serve takes the client's or makes one, and answers with it
        request_id = request_id if REQUEST_ID.fullmatch(request_id) else "-"  # it goes into the log
        logs.REQUEST_ID.set(request_id)
        if self.dispatcher.spans is not None:
            self.dispatcher.spans.arrived(http.headers)
        objective, forced = self._objective(task, request)
        objective = self.dispatcher.check(task, objective, request.rank())
        with self.dispatcher.admission.deciding():
            asked = await self._profiled(task, request, objective, forced, caller(http).name)
            decision = await self.decider.decide(asked, request.rank())
        if not decision.arm:
            raise _nobody_can(decision)
        body = request.body()
        for message in body.get("messages", ()):
            message["role"] = "system" if message["role"] == "developer" else message["role"]
        call = Call(task, asked, body, request.rank(), request_id, is_constrained(body))
        answer = await self.dispatcher.ask(decision, call)
        decision = answer.decision
        headers = {
            "x-router-decision-id": decision.id,
            "x-router-model": decision.arm,
            "x-router-policy-version": decision.policy_version,
            "x-router-fallback": "none" if decision.fallback in ("", FORCED) else decision.fallback,
        }
        try:
            payload, report = answer.first
            if report is not None and "error" in report:
                self.dispatcher.finish(decision, Outcome(decision.id, _status(report["status"])))
                return JSONResponse({"error": report["error"]}, report["status"], headers)
            listener = Listener(task, body, self.decider.store_text or self.judge.picks(decision))
            if request.stream:
                limit_s, stream = self.decider.tuning.answer_timeout_s, self._stream(answer, listener)
                return Streamed(stream, headers, limit_s, lambda: self._gone(answer))
            listener.hear(payload)
            self.dispatcher.finish(decision, self._outcome(answer, report or {}, 0.0, listener))
            return Response(payload, media_type="application/json", headers=headers)
        except BaseException as error:
            self._gone(answer, "disconnected" if isinstance(error, asyncio.CancelledError) else "error")
            raise

    async def _profiled(
        self, task: str, request: AnyRequest, objective: Objective, forced: bool, owner: str
    ) -> Request:
        text, context, messages = request.texts()
        item = {"text": text, "context": context, "messages": messages, "task": task}
        profile, fallback = await self.decider.profile(item | {"max_output_tokens": request.limit()})
        traces = self.decider.traces(context)
        return Request(self.decider.new_id(), profile, objective, forced, fallback, *traces, owner)

    def _objective(self, task: str, request: AnyRequest) -> tuple[Objective, bool]:
        """What this request wants, and whether the client named the model itself."""
        name, tuning = request.model, self.decider.tuning
        if name in self._arms:
            if task not in self._arms[name].tasks:
                does = ", ".join(self._arms[name].tasks)
                raise ApiError(400, f"model '{name}' does not do the task '{task}', only: {does}", "model")
            return Objective(models=(name,)), True
        auto, _, preset = name.partition(":")
        if auto != AUTO or (preset and preset not in tuning.presets):
            raise self._no_such_model(name)
        if task == "embed":  # embeddings of different models don't mix: always the same one
            home = next((arm.name for arm in self._arms.values() if task in arm.tasks), None)
            if home is None:
                raise ApiError(404, "no model here makes embeddings", "model", "model_not_found")
            return Objective(models=(home,)), True
        objective = (tuning.presets[preset] if preset else tuning.objective).objective()
        if request.router is None:
            return objective, False
        for wanted in request.router.models or ():
            if wanted not in self._arms:
                known = ", ".join(self._arms)
                raise ApiError(400, f"unknown model '{wanted[:100]}'; choose from: {known}", "router.models")
        return request.router.objective(objective), False

    async def _stream(self, answer: Answer, listener: Listener) -> AsyncGenerator[bytes]:
        """Pass the bytes on, and report how it ended."""
        decision, tuning, ends = answer.decision, self.decider.tuning, asyncio.get_running_loop().time()
        ends += tuning.answer_timeout_s
        ttft_s, events = time.perf_counter() - answer.started, 0
        outcome = Outcome(decision.id, "disconnected", ttft_s)
        try:
            payload, report = answer.first
            while True:
                if payload:
                    events += payload.count(b"\n\n")
                    listener.hear(payload)
                    yield payload
                if report is not None:
                    break
                async with asyncio.timeout_at(min(ends, asyncio.get_running_loop().time() + tuning.chunk_timeout_s)):
                    payload, report = await anext(answer.rest)
            if "error" in report:
                outcome = Outcome(decision.id, _status(report["status"]), ttft_s)
                yield event(shown(report))
            else:
                outcome = self._outcome(answer, report, ttft_s, listener)
        except Exception as error:
            log.error("the answer of %s broke off (%s)", decision.arm, type(error).__name__)
            outcome = Outcome(decision.id, "error", ttft_s)
            answer.rest.cancel()
            yield event(broken())
        finally:
            if outcome.status == "disconnected":
                answer.rest.cancel()
                outcome = structs.replace(outcome, **self._used(decision, decision.profile.prompt_tokens, events))
            self.dispatcher.finish(decision, structs.replace(outcome, latency_s=time.perf_counter() - answer.started))

    def _used(self, decision: Decision, prompt: int, output: int) -> dict[str, Any]:
        """Tokens and their price, as an outcome has them; of a stream that was left, about a token an event."""
        arm = self._arms[decision.arm]
        cost_usd = prompt * arm.prompt_price_usd + output * arm.output_price_usd
        return {"prompt_tokens": prompt, "output_tokens": output, "cost_usd": cost_usd}

    def _gone(self, answer: Answer, status: str = "disconnected") -> None:
        """Let go of an answer that nobody will hear to its end; nothing if it has ended."""
        if self.dispatcher.running(answer.decision):
            answer.rest.cancel()
            took_s = time.perf_counter() - answer.started
            self.dispatcher.finish(answer.decision, Outcome(answer.decision.id, status, latency_s=took_s))

    def _outcome(self, answer: Answer, report: dict[str, Any], ttft_s: float, listener: Listener) -> Outcome:
        finish_reason = report.get("finish_reason") or ""
        prompt, output = int(report.get("prompt_tokens", 0)), int(report.get("output_tokens", 0))
        if listener.whole and self.judge.picks(answer.decision):  # it may have been switched on meanwhile
            self.judge.offer(answer.decision, listener.body, listener.text)
        return Outcome(
            decision_id=answer.decision.id,
            ttft_s=ttft_s,
            latency_s=time.perf_counter() - answer.started,
            **self._used(answer.decision, prompt, output),
            finish_reason=finish_reason,
            flaw=listener.flaw(finish_reason),
            answer=listener.text if self.decider.store_text else "",
        )


def _status(http_status: int) -> str:
    return "rejected" if http_status < 500 else "error"


def _late_by_a_line(estimate: ArmEstimate) -> bool:
    """Whether an arm would be late now that there is a line in front of it, and may not be when that is gone."""
    answer_s = estimate.ttft_s + max(estimate.output_tokens - 1, 0) * estimate.tpot_s
    return estimate.removed_by.startswith("expected latency") and estimate.latency_s > answer_s + WAITED_S


def _nobody_can(decision: Decision) -> ApiError:
    reasons = "; ".join(f"{e.arm}: {e.removed_by}" for e in decision.estimates)
    allowed = [e for e in decision.estimates if not e.removed_by.startswith(("not among", "does not do"))]
    if any(e.removed_by == FULL or _late_by_a_line(e) for e in allowed):
        return full(1.0)
    if any(e.removed_by in ("no healthy replica", RESTING) for e in allowed):
        return ApiError.later(503, f"no model can take this request now ({reasons})", 5.0, "model_unavailable")
    if allowed and all("does not fit" in e.removed_by for e in allowed):
        return ApiError(400, f"the prompt is too long; shorten it ({reasons})", code="context_length_exceeded")
    return ApiError(400, f"no model can keep the limits of this request; relax them ({reasons})", "router")
