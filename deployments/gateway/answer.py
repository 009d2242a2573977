"""Relays a model's answer to the client, whole or as a stream, and reports its outcome."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping

from fastapi import Response
from fastapi.responses import JSONResponse
from msgspec import structs

from deployments.dispatch.dispatcher import Answer, Call, Dispatcher
from deployments.dispatch.router_client import RouterClient
from deployments.gateway.answer_checks import AnswerChecker
from deployments.gateway.streaming import (
    DeadlineStreamingResponse,
    event,
    public_error,
    stream_error,
)
from deployments.judging.judge import Judge
from deployments.judging.pairs import Pairs
from deployments.models.handle import ModelStream
from deployments.models.report import ModelError, ModelReport
from policies.events import FORCED, Decision, Outcome
from policies.types import Arm

RETRY_AFTER_S = "2"  # of a request that the model can take later
log = logging.getLogger(__name__)


class AnswerRelay:
    """Turns answers that have begun into HTTP responses. Every answer's outcome is reported once, however it ends.

    Args:
        dispatcher: takes the outcomes and frees the slots of the models.
        router_client: holds the timeouts and says whether the text of answers is stored.
        judge: is offered the complete answers that it samples.
        pairs: begins a second answer when the first one is complete.
        arms: all models by name, with their prices.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        router_client: RouterClient,
        judge: Judge,
        pairs: Pairs,
        arms: Mapping[str, Arm],
    ):
        self._dispatcher = dispatcher
        self._router_client = router_client
        self._judge = judge
        self._pairs = pairs
        self._arms = arms

    def respond(self, answer: Answer, call: Call) -> Response:
        """The response to a request whose answer has begun.

        An answer in one piece is reported at once, a stream when it ends.
        """
        decision = answer.decision
        headers = _headers(decision)
        try:
            payload, report = answer.first
            if report is not None and report.error is not None:
                error = report.error
                took_s = time.perf_counter() - answer.started
                self._dispatcher.finish(
                    decision,
                    Outcome(decision.id, _outcome_status(error), latency_s=took_s),
                )
                if error.status == 429:
                    headers["retry-after"] = RETRY_AFTER_S
                return JSONResponse(error.body(), error.status, headers)
            graded = self._judge.picks(decision) or decision.pair != ""
            keep_text = self._router_client.store_text or graded
            checker = AnswerChecker(call.task, call.body, keep_text)
            if answer.rest is not None:
                return DeadlineStreamingResponse(
                    self._stream(answer, answer.rest, checker, call),
                    headers,
                    self._router_client.tuning.answer_timeout_s,
                    lambda: self._abandon(answer, "disconnected"),
                )
            checker.feed(payload)
            outcome = self._outcome(answer, report or ModelReport(), 0.0, checker)
            self._dispatcher.finish(decision, outcome)
            self._pairs.begin(decision, call, outcome, checker.text)
            return Response(payload, media_type="application/json", headers=headers)
        except BaseException:
            self._abandon(answer, "error")
            raise

    async def _stream(
        self, answer: Answer, rest: ModelStream, checker: AnswerChecker, call: Call
    ) -> AsyncGenerator[bytes]:
        """Yield the bytes of a stream for the client, and report its outcome at the end.

        Args:
            answer: the answer, which is a stream.
            rest: its items after the first one.
            checker: reads the answer as well.
            call: the request.
        """
        decision = answer.decision
        tuning = self._router_client.tuning
        now = asyncio.get_running_loop().time
        deadline = now() + tuning.answer_timeout_s
        ttft_s = time.perf_counter() - answer.started
        events = 0
        outcome = Outcome(decision.id, "disconnected", ttft_s)
        try:
            payload, report = answer.first
            while True:
                if payload:
                    events += payload.count(b"\n\n")
                    checker.feed(payload)
                    yield payload
                if report is not None:
                    break
                until = min(deadline, now() + tuning.chunk_timeout_s)
                async with asyncio.timeout_at(until):
                    payload, report = await anext(rest)
            if report.error is not None:
                status = _outcome_status(report.error)
                outcome = Outcome(decision.id, status, ttft_s)
                yield event(public_error(report.error))
            else:
                outcome = self._outcome(answer, report, ttft_s, checker)
        except Exception as error:
            log.error(
                "the answer of %s broke off (%s)", decision.arm, type(error).__name__
            )
            outcome = Outcome(decision.id, "error", ttft_s)
            answer.call.cancel()
            yield event(stream_error())
        finally:
            if outcome.status == "disconnected":
                answer.call.cancel()
                # the engine did not report any tokens: about one token an event
                outcome = self._with_usage(
                    outcome, decision, decision.profile.prompt_tokens, events
                )
            latency_s = time.perf_counter() - answer.started
            self._dispatcher.finish(
                decision, structs.replace(outcome, latency_s=latency_s)
            )
            if outcome.status == "ok":
                self._pairs.begin(decision, call, outcome, checker.text)

    def _abandon(self, answer: Answer, status: str) -> None:
        """Cancel an answer and report it with this status, unless its outcome has been reported already."""
        if self._dispatcher.running(answer.decision):
            answer.call.cancel()
            latency_s = time.perf_counter() - answer.started
            decision_id = answer.decision.id
            outcome = Outcome(
                decision_id,
                status,
                latency_s=latency_s,
                streamed=answer.rest is not None,
            )
            self._dispatcher.finish(answer.decision, outcome)

    def _outcome(
        self,
        answer: Answer,
        report: ModelReport,
        ttft_s: float,
        checker: AnswerChecker,
    ) -> Outcome:
        """The outcome of an answer that is complete; the judge may get the answer, too."""
        decision = answer.decision
        # the judge may have been switched on while the model answered
        if checker.keeps_text and self._judge.picks(decision):
            self._judge.offer(decision, checker.body, checker.text)
        outcome = Outcome(
            decision_id=decision.id,
            ttft_s=ttft_s,
            latency_s=time.perf_counter() - answer.started,
            finish_reason=report.finish_reason,
            flaw=checker.defect(report.finish_reason),
            answer=checker.text if self._router_client.store_text else "",
        )
        return self._with_usage(
            outcome, decision, report.prompt_tokens, report.output_tokens
        )

    def _with_usage(
        self,
        outcome: Outcome,
        decision: Decision,
        prompt_tokens: int,
        output_tokens: int,
    ) -> Outcome:
        """The outcome with these token counts and their price."""
        arm = self._arms[decision.arm]
        cost_usd = (
            prompt_tokens * arm.prompt_price_usd + output_tokens * arm.output_price_usd
        )
        return structs.replace(
            outcome,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            cost_usd=cost_usd,
        )


def _headers(decision: Decision) -> dict[str, str]:
    """The response headers that tell the client of the decision."""
    fallback = decision.fallback
    if fallback in ("", FORCED):
        fallback = "none"
    return {
        "x-router-decision-id": decision.id,
        "x-router-model": decision.arm,
        "x-router-policy-version": decision.policy_version,
        "x-router-fallback": fallback,
    }


def _outcome_status(error: ModelError) -> str:
    """The status of an Outcome for an error that the model reported."""
    return "rejected" if error.status < 500 else "error"
