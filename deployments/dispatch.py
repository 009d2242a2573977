"""Gives a request to its arm: a place in its line, a deadline, and once the next best arm if it fails."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from deployments.admission import BATCH, Admission, FullError
from deployments.arm_check import ArmCheck
from deployments.breaker import Breaker
from deployments.decider import Decider
from deployments.errors import ApiError
from deployments.patience import Patience, taken
from deployments.settings import Tuning
from deployments.spans import Spans
from deployments.waker import Waker
from policies.types import Arm, Decision, Objective, Outcome, Request

FULL, RESTING = "its line is full", "its circuit breaker is open after failures in a row"
WAITED_S = 0.002  # for a place: less is the event loop's own
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Call:
    """One request on its way to an arm.

    task, body: see ModelServer. asked: what was to be decided. rank: see admission.py. request_id: for the log.
    constrained: whether the engine compiles a grammar of the client's for it. What a compilation does to one engine it
        does to the next: such a request gets no second arm once a replica has taken it.
    """

    task: str
    asked: Request
    body: dict[str, Any]
    rank: int
    request_id: str
    constrained: bool = False


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer that has begun.

    decision: of the arm that gives it. started: when it was asked.
    first: its first item; if it is no stream, the only one. rest: the others; can be cancelled.
    """

    decision: Decision
    started: float
    first: tuple[bytes, Any]
    rest: Any


@dataclass
class _Place:
    """entered: when it was got, None while it is waited for. waited_s: for it. asked: whether the arm was, too.
    probe: whether the arm's breaker waits to hear of this one.
    """

    entered: float | None = None
    waited_s: float = 0.0
    asked: bool = False
    probe: bool = False


class _FailedError(Exception):
    """An arm did not begin to answer.

    final: no other arm may be asked.
    """

    def __init__(self, decision: Decision, retry_after_s: float | None, final: bool):
        super().__init__(decision.arm)
        self.decision = decision
        self.retry_after_s = retry_after_s
        self.final = final

    def api_error(self) -> ApiError:
        if self.retry_after_s is not None:
            return full(self.retry_after_s)
        if self.final:
            message = (
                f"the model '{self.decision.arm}' failed, and a request with a schema is not given to a second one; "
                "simplify the schema, or try again"
            )
            return ApiError.later(503, message, 1.0, "model_failed")
        message = f"the model '{self.decision.arm}' failed and no other could take over; try again"
        return ApiError.later(503, message, 1.0, "model_failed")


class Dispatcher:
    """Of one ingress replica.

    Args:
        decider: to choose again, to count what is in flight, and to report.
        arms: all there are.
        connect: blocking; gives the handle of an arm's application.
    """

    def __init__(self, decider: Decider, arms: dict[str, Arm], connect: Callable[[str], Any]):
        self._decider, self._arms, self._connect = decider, arms, connect
        self._methods: dict[tuple[str, bool], Any] = {}  # by arm, and whether it streams
        self._places: dict[str, _Place] = {}  # by decision
        self.admission = Admission(tuple(arms))
        decider.wait_s = lambda arm, rank: self.admission.lines[arm].wait_s(rank)
        self.breakers = {name: self._breaker(arm) for name, arm in arms.items()}
        self._patience = Patience(decider.replicas)
        self.spans, self._waker = Spans.wanted(), Waker(lambda arm: self._method(arm, False))

    def _breaker(self, arm: Arm) -> Breaker:
        """One that opens when the arm fails a check, too."""
        breaker = Breaker(check=lambda: check.start())
        check = ArmCheck(arm.tasks[0], lambda: self._method(arm.name, streams=False), breaker.checked)
        return breaker

    def configure(self, tuning: Tuning) -> None:
        """Take over changed settings."""
        self.admission.configure(tuning.admission)
        for breaker in self.breakers.values():
            breaker.settings = tuning.breaker

    def check(self, task: str, objective: Objective, rank: int) -> Objective:
        """Refuse what nobody can take now before any work is done for it; otherwise say who cannot.

        Raises:
            ApiError: 429, all lines are full; 503, the breakers of all models that may answer are open.
        """
        try:
            self.admission.check(rank)
        except FullError as error:
            raise full(error.retry_after_s) from None
        may = [a.name for a in self._arms.values() if task in a.tasks and a.name in (objective.models or self._arms)]
        for arm in may:
            if not self._decider.replicas(arm):
                self._waker.wake(arm, task)
        unavailable = {arm: why for arm in may if (why := self._why_not(arm, rank))}
        if may and len(unavailable) == len(may):
            if FULL in unavailable.values():
                raise full(min(self.admission.lines[arm].wait_s(rank) for arm in may if unavailable[arm] == FULL))
            wait_s = min(self.breakers[arm].retry_after_s for arm in may)
            message = f"{', '.join(may)} failed several times in a row and will be tried again shortly"
            raise ApiError.later(503, message, wait_s, "model_unavailable")
        return replace(objective, unavailable=tuple(unavailable.items())) if unavailable else objective

    def _why_not(self, arm: str, rank: int) -> str:
        line = self.admission.lines[arm]
        line.replicas = self._decider.replicas(arm)
        if not self.breakers[arm].admits:
            return RESTING
        return FULL if line.full(rank) else ""

    async def ask(self, decision: Decision, call: Call) -> Answer:
        """The beginning of an answer, by the decision's arm or, once, by the next best.

        Raises:
            ApiError: 429 if there was no room, 503 if there was a failure.
        """
        limit_s, share = decision.objective.max_latency_s, self._decider.tuning.hedge_after
        try:
            if share is not None and limit_s < float("inf") and not call.constrained:
                return await self._hedged(decision, call, share * limit_s)
            try:
                return await self._attempt(decision, call)
            except _FailedError as failure:
                if failure.final or (other := self._next_best(decision, call, "model")) is None:
                    raise
            return await self._attempt(other, call)
        except _FailedError as failure:
            raise failure.api_error() from None

    async def _hedged(self, decision: Decision, call: Call, patience_s: float) -> Answer:
        """Ask a second arm when the first fails or is silent for too long (Dean and Barroso, The Tail at Scale, 2013);
        whoever begins first answers, the other is cancelled. A second arm that had no room was not asked.
        """
        attempts = [asyncio.create_task(self._attempt(decision, call))]
        pending, fallback, winner = set(attempts), "", None
        try:
            while pending and winner is None:
                limit_s = None if fallback else patience_s
                done, pending = await asyncio.wait(pending, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                winner = next((task for task in done if task.exception() is None), None)
                asked = fallback == "model" or any(_asked(task) for task in attempts[1:])
                if winner is None and not asked and (not done or not pending):
                    fallback = "model" if done else "hedge"
                    if (other := self._next_best(decision, call, fallback)) is not None:
                        attempts.append(asyncio.create_task(self._attempt(other, call)))
                        pending.add(attempts[-1])
            return (winner or attempts[-1]).result()  # or raises why
        finally:
            for task in attempts:
                if task is not winner and not task.cancel() and not task.cancelled() and task.exception() is None:
                    answer = task.result()  # began in the same moment
                    answer.rest.cancel()
                    took_s = time.perf_counter() - answer.started
                    self.finish(answer.decision, Outcome(answer.decision.id, "disconnected", latency_s=took_s))

    async def _attempt(self, decision: Decision, call: Call) -> Answer:
        arm, tuning = decision.arm, self._decider.tuning
        streams = bool(call.body.get("stream"))
        patience_s = tuning.first_byte_timeout_s if streams else tuning.answer_timeout_s
        line, breaker, started = self.admission.lines[arm], self.breakers[arm], time.perf_counter()
        place = self._places[decision.id] = _Place()
        self._decider.in_flight[arm] += 1
        answer = None
        try:
            place.entered = await line.enter(call.rank)
            place.waited_s = time.perf_counter() - started
            if not breaker.admits:  # it opened while this one waited, or somebody else is its probe
                raise FullError(breaker.retry_after_s)
            place.asked, place.probe = True, breaker.begin()
            async with asyncio.timeout(patience_s) as deadline:
                self._patience.begin(arm, deadline, lambda: taken(answer))
                try:
                    answer = (await self._method(arm, streams)).remote(call.task, call.body)
                    first = await (anext(answer) if streams else answer)
                finally:
                    self._patience.end(arm, deadline)
            if first[1] is not None and first[1].get("status", 0) >= 500:
                raise RuntimeError("the model answered with a server error")
            if place.probe and (first[1] is None or "error" not in first[1]):  # it answers: others need not wait
                breaker.end("ok", place.probe)
                place.probe = False
            return Answer(decision, started, first, answer)
        except Exception as error:
            name = type(error).__name__
            busy = isinstance(error, FullError) or name == "BackPressureError"
            if not busy:
                log.warning("%s: %s failed before its first byte (%s)", call.request_id, arm, name)
            final = call.constrained and answer is not None and taken(answer) and not busy
            if answer is not None:
                answer.cancel()
            self.finish(decision, Outcome(decision.id, "rejected" if busy or final else "error"))
            wait_s = error.retry_after_s if isinstance(error, FullError) else 1.0
            raise _FailedError(decision, wait_s if busy else None, final) from None
        except asyncio.CancelledError:  # the client left: let the engine go on to others
            if answer is not None:
                answer.cancel()
            took_s = time.perf_counter() - started
            if place.entered is None:  # it left the line: that says nothing of the model
                place.waited_s = took_s
            self.finish(decision, Outcome(decision.id, "disconnected", latency_s=took_s))
            raise

    def _next_best(self, failed: Decision, call: Call, fallback: str) -> Decision | None:
        """A decision for the best of the other arms; none if the client allows none."""
        others = tuple(
            e.arm
            for e in failed.estimates
            if e.arm != failed.arm and e.arm in self._arms and not e.removed_by and not self._why_not(e.arm, call.rank)
        )
        if not others:
            return None
        objective = replace(call.asked.objective, models=others)  # not the first decision's, which moved it already
        request = replace(call.asked, id=self._decider.new_id(), objective=objective)
        again = self._decider.decide_here(request, fallback, call.rank)
        return again if again.arm else None

    async def _method(self, arm: str, streams: bool) -> Any:
        """The handle's method, bound once: each `handle.method` would be a new handle."""
        if (arm, streams) not in self._methods:
            handle = await asyncio.to_thread(self._connect, arm)  # asks Serve's controller, which may be away
            # bound here and not in the thread: in throughput mode a handle belongs to the event loop that it begins in
            plain = handle.options(request_serialization="pickle", response_serialization="pickle")  # no code to send
            self._methods[arm, True] = plain.options(stream=True).generate
            self._methods[arm, False] = plain.complete
        return self._methods[arm, streams]

    async def aside(self, arm: str, body: dict[str, Any]) -> str:
        """The text of an answer that no client asked for: it waits like batch work, and nobody learns from it."""
        line, answer = self.admission.lines[arm], None
        await line.enter(BATCH)
        self._decider.in_flight[arm] += 1
        try:
            answer = (await self._method(arm, streams=False)).remote("chat", body)
            payload, _ = await answer
            return str(json.loads(payload)["choices"][0]["message"]["content"])
        except BaseException:
            if answer is not None:
                answer.cancel()
            raise
        finally:
            self._decider.in_flight[arm] -= 1
            line.leave(None)

    def running(self, decision: Decision) -> bool:
        """Whether it is not finished."""
        return decision.id in self._places

    def finish(self, decision: Decision, outcome: Outcome) -> None:
        """Give the place back, and report; once for each decision, further calls change nothing."""
        if (place := self._places.pop(decision.id, None)) is None:
            return
        self._decider.in_flight[decision.arm] -= 1
        if place.entered is not None:
            self.admission.lines[decision.arm].leave(place.entered if place.asked else None)
        if place.asked:
            self.breakers[decision.arm].end(outcome.status, place.probe)
        if place.waited_s > WAITED_S:
            outcome = structs.replace(outcome, waited_s=place.waited_s)
        self._decider.report(decision, outcome)
        if self.spans is not None:
            self.spans.finished(decision, outcome)


def _asked(attempt: asyncio.Task[Answer]) -> bool:
    """Whether an arm was, or is yet to be, and did not just have no room."""
    error = attempt.exception() if attempt.done() else None
    return not isinstance(error, _FailedError) or error.retry_after_s is None


def full(wait_s: float) -> ApiError:
    """Come back later."""
    return ApiError.later(
        429, "the models that may answer are busy; try again shortly", max(1.0, wait_s), "rate_limit_exceeded"
    )
