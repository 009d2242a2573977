"""Second answers: another model answers a client's request in the background, and the judge grades both answers.

One model's answer says nothing about the others. A choice that explores would, but the client might get a worse
answer. In a pair the client gets the answer of the best estimate, and the second model is drawn among the others for
what its answer teaches. A hash of the decision's id picks the requests, before their decision. The
second model is asked when the first answer is complete, and only while it is idle (dispatch/background.py).

A second answer is a decision of its own (events.PAIR). It is no traffic.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import replace
from enum import StrEnum

from ray.serve.exceptions import BackPressureError

from deployments.dispatch.admission import FullError
from deployments.dispatch.background import BackgroundCalls, ModelFailedError
from deployments.dispatch.dispatcher import Call
from deployments.dispatch.router_client import RouterClient
from deployments.journal.ids import sampled
from deployments.judging.judge import Judge
from deployments.models.handle import Body
from deployments.observability import logs
from policies.capabilities import MEDIA
from policies.constraints import Exclusion, candidates
from policies.events import Decision, Outcome, visible_flaw
from policies.types import Arm, Objective, Request

# fields of a body that concern the delivery to the client; one choice is enough to be graded
LEFT_OUT = ("stream", "stream_options", "n")
log = logging.getLogger(__name__)


class PairResult(StrEnum):
    """What becomes of a request that was picked for a second answer.

    ASKED: a second model was asked. Then GRADED: both answers have a grade; FAILED: the second answer failed, has a
    visible flaw or no text. One that is neither has not been graded yet, or the judge gave no grade.
    The others were skipped. BUSY: no other model is idle. BUDGET: the judge has no calls left, or too many answers wait
    for it. NO_OTHER_SIZE: the request's limits allow no other model. NO_ANSWER: the first answer has a visible flaw or
    no text, or comes from a second attempt.
    """

    ASKED = "asked"
    GRADED = "graded"
    FAILED = "failed"
    BUSY = "busy"
    BUDGET = "budget"
    NO_OTHER_SIZE = "no_other_size"
    NO_ANSWER = "no_answer"


class Pairs:
    """The second answers of one ingress replica.

    Args:
        judge: grades the answers, and has the settings.
        router_client: makes the decisions about second answers, and reports their outcomes.
        calls: asks the models, and says which of them are idle.
        arms: all arms by name.
        flaw_of: the visible flaw of an answer, from the request's body, the bytes and the finish reason.
        count: counts a PairResult.
    """

    def __init__(
        self,
        judge: Judge,
        router_client: RouterClient,
        calls: BackgroundCalls,
        arms: Mapping[str, Arm],
        flaw_of: Callable[[Body, bytes, str], str],
        count: Callable[[str], None],
    ):
        self._judge = judge
        self._router_client = router_client
        self._calls = calls
        self._arms = arms
        self._flaw_of = flaw_of
        self._count = count
        self._running: set[asyncio.Task[None]] = set()

    def announce(self, request: Request, constrained: bool) -> Request:
        """The request as it is served if it will get a second answer: by the best estimate, without exploration.

        Args:
            request: before its decision.
            constrained: see dispatcher.Call; such a request is not asked again.

        Returns:
            The request with `pair` set; unchanged if it will not get a second answer.
        """
        settings = self._judge.settings
        if (
            settings is None
            or not settings.pair_rate
            or request.forced
            or not MEDIA.isdisjoint(request.profile.needs)  # the judge reads text alone
            or constrained
            # the judge's own sample is a hash of the id itself, so this one needs another hash
            or not sampled(f"{request.id} pair", settings.pair_rate)
        ):
            return request
        allowed = self._allowed(request)
        skipped = self._skipped(allowed) if len(allowed) > 1 else None
        if len(allowed) < 2:
            skipped = PairResult.NO_OTHER_SIZE
        if skipped is not None:
            self._count(skipped)
            return request
        pair = self._router_client.new_id()
        return replace(request, pair=pair, score_chance=0.0, explore=0.0)

    def _allowed(self, request: Request) -> list[str]:
        """The arms that do the request's task and that the client allows."""
        may_answer = candidates(
            self._arms.values(), request.profile.task, request.objective
        )
        return [arm.name for arm in may_answer]

    def _skipped(self, arms: list[str]) -> PairResult | None:
        """Why none of these arms can give a second answer now; None if one can."""
        if not any(self._calls.is_idle(arm) for arm in arms):
            return PairResult.BUSY
        return None if self._judge.has_budget(2) else PairResult.BUDGET

    def begin(
        self, decision: Decision, call: Call, outcome: Outcome, text: str
    ) -> None:
        """Ask a second model, without waiting, if the request was announced.

        Args:
            decision: about the first answer.
            call: the request.
            outcome: of the first answer, which is complete.
            text: of the first answer.
        """
        if not decision.pair or self._judge.settings is None:
            return
        try:
            skipped = self._begin(decision, call, outcome, text)
        except Exception as error:  # the first answer must reach its client
            log.error("no second answer was begun (%s)", type(error).__name__)
            return
        self._count(skipped or PairResult.ASKED)

    def _begin(
        self, first: Decision, call: Call, outcome: Outcome, text: str
    ) -> PairResult | None:
        """Ask a second model. Returns why not, or None."""
        flawed = outcome.status != "ok" or visible_flaw(first, outcome) != ""
        if flawed or not text.strip() or first.retry_of:
            return PairResult.NO_ANSWER
        others = [arm for arm in self._allowed(call.asked) if arm != first.arm]
        if not others:
            return PairResult.NO_OTHER_SIZE
        skipped = self._skipped(others)
        if skipped is not None:
            return skipped
        second = self._router_client.pair_decision(
            first, self._request(first, call.asked)
        )
        if not second.arm:
            return PairResult.NO_OTHER_SIZE
        if not self._judge.reserve(2):
            return PairResult.BUDGET
        grades = _Grades(lambda: self._count(PairResult.GRADED))
        self._judge.offer_reserved(first, call.body, text, grades.add)
        # a context of its own: a call of a model must not end with the client's request
        context = Context()
        context.run(logs.REQUEST_ID.set, call.request_id)
        task = asyncio.get_running_loop().create_task(
            self._run(second, call, grades), context=context
        )
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return None

    def _request(self, first: Decision, asked: Request) -> Request:
        """The request to decide about: with the client's limits, and without the arms that cannot be asked now."""
        unavailable = {first.arm: Exclusion.ANSWERED.sentence()}
        for name in self._arms:
            if name != first.arm and not self._calls.is_idle(name):
                unavailable[name] = Exclusion.NOT_IDLE.sentence()
        for name, why in asked.objective.unavailable:
            if Exclusion.of(why) is Exclusion.VARIANT:
                unavailable[name] = why
        objective: Objective = replace(
            asked.objective, unavailable=tuple(unavailable.items())
        )
        return replace(asked, objective=objective)

    async def _run(self, second: Decision, call: Call, grades: "_Grades") -> None:
        """Get the second answer, report its outcome, and have it graded."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        body = {name: call.body[name] for name in call.body if name not in LEFT_OUT}
        outcome = Outcome(second.id, "disconnected")
        text = ""
        try:
            async with asyncio.timeout(self._router_client.tuning.answer_timeout_s):
                answer = await self._calls.ask(second.arm, body, call.task)
            text = answer.text
            outcome = answer.outcome(
                second,
                self._arms[second.arm],
                self._flaw_of(body, answer.payload, answer.report.finish_reason),
                self._router_client.store_text,
            )
        except asyncio.CancelledError:
            outcome = _ended(second, "disconnected", loop.time() - began_s)
            raise
        except Exception as error:
            log.warning("a second answer failed (%s)", type(error).__name__)
            refused = isinstance(error, FullError | BackPressureError) or (
                isinstance(error, ModelFailedError) and error.status < 500
            )
            status = "rejected" if refused else "error"
            outcome = _ended(second, status, loop.time() - began_s)
        finally:
            self._router_client.report(second, outcome)
            useful = outcome.status == "ok" and not visible_flaw(second, outcome)
            if not useful or not text.strip():
                self._judge.release()
                self._count(PairResult.FAILED)
            else:
                self._judge.offer_reserved(second, body, text, grades.add)

    async def close(self) -> None:
        """Cancel the second answers that are under way; their outcomes are reported."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


class _Grades:
    """Counts the grades of a pair.

    Args:
        on_both: called when both answers have one.
    """

    def __init__(self, on_both: Callable[[], None]):
        self._missing = 2
        self._on_both = on_both

    def add(self) -> None:
        """One more answer has a grade."""
        self._missing -= 1
        if not self._missing:
            self._on_both()


def _ended(decision: Decision, status: str, took_s: float) -> Outcome:
    """The outcome of a call without an answer."""
    return Outcome(decision.id, status, latency_s=took_s)
