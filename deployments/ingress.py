"""HTTP in, HTTP out: the steps of one request, in order."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse

from deployments import errors, logs
from deployments.api import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest
from deployments.decider import Decider
from deployments.errors import ApiError
from deployments.feedback import add_router_routes
from deployments.settings import GatewaySettings, Tuning
from policies.types import FORCED, Arm, Decision, Objective, Outcome, Request

AUTO = "auto"
log = logging.getLogger(__name__)


class Ingress:
    """The one URL. A plain class: app.py wraps it.

    Args:
        settings: of the gateway.
        profiler: handle of the profiler deployment.
        connect_model: gives the streaming handle of an arm's application.
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
        logs.configure("ingress")
        self._arms: dict[str, Arm] = {arm.name: arm for arm in settings.arms()}
        self._handles: dict[str, Any] = {}
        self._connect_model, self._started = connect_model, time.time()
        self.decider = Decider(settings, profiler, lambda: connect_router(settings))
        await self.decider.start()
        self.tracker = connect_tracker(settings)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over changed tuning; the next request uses it."""
        self.decider.tuning = Tuning.model_validate(user_config)

    async def check_health(self) -> None:
        """Serve asks every few seconds; a tracker that died and came back is set to work again."""
        if self.tracker is not None:
            self.tracker.start.remote()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(title="Adaptive LLM router", docs_url="/docs", redoc_url=None)
        errors.install(app)

        @app.post("/v1/chat/completions")
        async def chat(request: ChatRequest, http: HttpRequest) -> Response:
            return await self.answer("chat", request, http)

        @app.post("/v1/completions")
        async def completions(request: CompletionRequest, http: HttpRequest) -> Response:
            return await self.answer("completion", request, http)

        @app.post("/v1/embeddings")
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

        add_router_routes(app, self.decider, lambda: self.tracker)
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
        logs.REQUEST_ID.set(request_id)
        objective, forced = self._objective(task, request)
        asked, context, messages = request.texts()
        item = {
            "text": asked,
            "context": context,
            "messages": messages,
            "task": task,
            "max_output_tokens": request.limit(),
        }
        profile, fallback = await self.decider.profile(item)
        decision = await self.decider.decide(Request(_new_id(), profile, objective, forced, fallback))
        if not decision.arm:
            raise _nobody_can(decision)
        body = request.body()
        for message in body.get("messages", ()):
            message["role"] = "system" if message["role"] == "developer" else message["role"]
        decision, started, first, rest = await self._first_item(decision, task, body, request_id)
        headers = {
            "x-router-decision-id": decision.id,
            "x-router-model": decision.arm,
            "x-router-policy-version": decision.policy_version,
            "x-router-fallback": "none" if decision.fallback in ("", FORCED) else decision.fallback,
        }
        payload, report = first
        if report is not None and "error" in report:
            self._finish(decision, Outcome(decision.id, _status(report["status"])))
            return JSONResponse({"error": report["error"]}, report["status"], headers)
        if request.stream:
            stream = self._stream(decision, started, first, rest)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        async for _, more in rest:
            report = more or report
        self._finish(decision, self._outcome(decision, report or {}, started, 0.0))
        return Response(payload, media_type="application/json", headers=headers)

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

    async def _first_item(
        self, decision: Decision, task: str, body: dict[str, Any], request_id: str
    ) -> tuple[Decision, float, tuple[bytes, Any], Any]:
        """Ask the chosen arm; if it fails before its first byte, the next best, once."""
        tuning = self.decider.tuning
        patience_s = tuning.first_byte_timeout_s if body.get("stream") else tuning.answer_timeout_s
        for attempt in (0, 1):
            started = time.perf_counter()
            self.decider.in_flight[decision.arm] += 1
            stream = None
            try:
                stream = self._handle(decision.arm).generate.remote(task, body)
                rest = aiter(stream)
                first = await asyncio.wait_for(anext(rest), patience_s)
                if first[1] is not None and first[1].get("status", 0) >= 500:
                    raise RuntimeError("the model answered with a server error")
                return decision, started, first, rest
            except Exception as error:
                log.warning("%s: %s failed before its first byte (%s)", request_id, decision.arm, type(error).__name__)
                if stream is not None:
                    stream.cancel()
                busy = type(error).__name__ == "BackPressureError"
                self._finish(decision, Outcome(decision.id, "rejected" if busy else "error"))
                other = None if attempt else self._next_best(decision)
                if other is None:
                    raise _failed(decision.arm, busy) from None
                decision = other
            except asyncio.CancelledError:  # the client left: let the engine go on to others
                if stream is not None:
                    stream.cancel()
                self._finish(decision, Outcome(decision.id, "disconnected"))
                raise
        raise AssertionError("unreachable")

    def _next_best(self, failed: Decision) -> Decision | None:
        """A decision for the best of the other arms; none if the client allows none."""
        others = tuple(e.arm for e in failed.estimates if e.arm != failed.arm and not e.removed_by)
        if not others:
            return None
        objective = replace(failed.objective, models=others)
        again = self.decider.decide_here(Request(_new_id(), failed.profile, objective), "model")
        return again if again.arm else None

    def _handle(self, arm: str) -> Any:
        if arm not in self._handles:
            self._handles[arm] = self._connect_model(arm)
        return self._handles[arm]

    async def _stream(
        self, decision: Decision, started: float, first: tuple[bytes, Any], rest: Any
    ) -> AsyncIterator[bytes]:
        """Pass the bytes on, and report how it ended."""
        ttft_s = time.perf_counter() - started
        outcome = Outcome(decision.id, "disconnected", ttft_s)
        try:
            payload, report = first
            while True:
                if payload:
                    yield payload
                if report is not None:
                    break
                payload, report = await anext(rest)
            if "error" in report:
                outcome = Outcome(decision.id, _status(report["status"]), ttft_s)
                yield _event({"error": report["error"]})
            else:
                outcome = self._outcome(decision, report, started, ttft_s)
        except Exception:
            log.exception("the answer of %s broke off", decision.arm)
            outcome = Outcome(decision.id, "error", ttft_s)
            yield _event(errors.body(502, "the model failed while it answered; send the request again"))
        finally:
            if outcome.status == "disconnected":
                rest.cancel()
            self._finish(decision, replace(outcome, latency_s=time.perf_counter() - started))

    def _outcome(self, decision: Decision, report: dict[str, Any], started: float, ttft_s: float) -> Outcome:
        arm = self._arms[decision.arm]
        prompt, output = int(report.get("prompt_tokens", 0)), int(report.get("output_tokens", 0))
        return Outcome(
            decision_id=decision.id,
            ttft_s=ttft_s,
            latency_s=time.perf_counter() - started,
            prompt_tokens=prompt,
            output_tokens=output,
            cost_usd=prompt * arm.prompt_price_usd + output * arm.output_price_usd,
            finish_reason=report.get("finish_reason") or "",
        )

    def _finish(self, decision: Decision, outcome: Outcome) -> None:
        self.decider.in_flight[decision.arm] -= 1
        self.decider.report(decision, outcome)
        logs.finished(decision, outcome)


def _new_id() -> str:
    return f"dec-{uuid.uuid4().hex}"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + bytes(JSONResponse(content).body) + b"\n\n"


def _status(http_status: int) -> str:
    return "rejected" if http_status < 500 else "error"


def _failed(arm: str, busy: bool) -> ApiError:
    if busy:
        error = ApiError(429, "all models that may answer are full; try again shortly", code="rate_limit_exceeded")
        error.headers["retry-after"] = "1"
        return error
    return ApiError(503, f"the model '{arm}' failed and no other could take over; try again", code="model_failed")


def _nobody_can(decision: Decision) -> ApiError:
    reasons = "; ".join(f"{e.arm}: {e.removed_by}" for e in decision.estimates)
    allowed = [e for e in decision.estimates if not e.removed_by.startswith(("not among", "does not do"))]
    if any(e.removed_by == "no healthy replica" for e in allowed):
        error = ApiError(503, f"no model can take this request now ({reasons})", code="model_unavailable")
        error.headers["retry-after"] = "5"
        return error
    if allowed and all("does not fit" in e.removed_by for e in allowed):
        return ApiError(400, f"the prompt is too long; shorten it ({reasons})", code="context_length_exceeded")
    return ApiError(400, f"no model can keep the limits of this request; relax them ({reasons})", "router")
