"""Sends a request to its arm: queue, circuit breaker, deadline, and one failover to the next best arm."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from msgspec import structs
from ray.serve.exceptions import BackPressureError

from deployments.dispatch.admission import AdmissionControl, FullError, ModelQueue
from deployments.dispatch.arm_check import ArmCheck
from deployments.dispatch.background import BackgroundCalls
from deployments.dispatch.circuit_breaker import Breaker
from deployments.dispatch.failover import StrandedRequests
from deployments.dispatch.router_client import RouterClient
from deployments.dispatch.variants import Variants
from deployments.errors import ApiError
from deployments.models import capabilities, context_length
from deployments.models.handle import (
    Body,
    Cancellable,
    CompleteMethod,
    GenerateMethod,
    Item,
    ModelHandle,
    ModelStream,
)
from deployments.observability.tracing import Tracer
from deployments.runtime import accepted_by_replica
from deployments.settings import Tuning
from policies.constraints import Exclusion, candidates
from policies.events import Decision, Outcome
from policies.types import Arm, Objective, Request

# of refusals by one arm that another may not share
CAPABILITY_CODES = (context_length.CODE, capabilities.CODE)
WAITED_S = 0.002  # a shorter wait for a slot is the event loop's own delay
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Call:
    """One request on its way to an arm.

    Attributes:
        task: see ModelServer.
        asked: the request as it was decided.
        body: see ModelServer.
        rank: priority (admission.py).
        request_id: for the log.
        constrained: whether the engine compiles a grammar of the client's for it. A compilation that breaks one engine
            breaks the next one as well, so such a request gets no second arm once a replica has accepted it.
    """

    task: str
    asked: Request
    body: Body
    rank: int
    request_id: str
    constrained: bool = False


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer whose first item has arrived.

    Attributes:
        decision: of the arm that answers.
        started: when the arm was asked.
        first: the first item; if the answer is no stream, the only one.
        call: the call that answers.
        rest: the other items; None if the answer is no stream.
    """

    decision: Decision
    started: float
    first: Item
    call: Cancellable
    rest: ModelStream | None


@dataclass(frozen=True, eq=False)
class _Methods:
    """The methods of an arm's handle, bound once: each `handle.method` makes a new handle."""

    complete: CompleteMethod
    generate: GenerateMethod


@dataclass
class _Slot:
    """The place of one decision in its arm's queue.

    Attributes:
        entered: when the slot was assigned; None while the request waits for it.
        waited_s: how long the request waited for it.
        asked: whether the arm was asked.
        probe: whether the request is the probe of the arm's circuit breaker, and its result is not known yet.
    """

    entered: float | None = None
    waited_s: float = 0.0
    asked: bool = False
    probe: bool = False


class _FailedError(Exception):
    """An arm did not begin to answer.

    Attributes:
        decision: of the arm.
        retry_after_s: set if the arm was busy and was not asked.
        final: no other arm may be asked.
    """

    def __init__(self, decision: Decision, retry_after_s: float | None, final: bool):
        super().__init__(decision.arm)
        self.decision = decision
        self.retry_after_s = retry_after_s
        self.final = final

    def api_error(self) -> ApiError:
        if self.retry_after_s is not None:
            return too_busy(self.retry_after_s)
        if self.final:
            message = (
                f"the model '{self.decision.arm}' failed, and a request with a schema is not given to a second one; "
                "simplify the schema, or try again"
            )
            return ApiError.later(503, message, 1.0, "model_failed")
        message = f"the model '{self.decision.arm}' failed and no other could take over; try again"
        return ApiError.later(503, message, 1.0, "model_failed")


class Dispatcher:
    """Sends the requests of one ingress replica to their arms.

    Args:
        router_client: decides again, counts requests in flight, and reports outcomes.
        arms: all arms. Those of one application share a queue, a circuit breaker and a handle, which go by the
            application's name.
        connect: gives the handle of an application; blocking.
        variants: what an application gets in place of a client's request.

    Attributes:
        breakers: by application.
        background: calls that no client asked for, and the rule by which an arm is idle.
    """

    def __init__(
        self,
        router_client: RouterClient,
        arms: dict[str, Arm],
        connect: Callable[[str], ModelHandle],
        variants: Variants,
    ):
        self._router_client = router_client
        self._arms = arms
        self._connect = connect
        self._variants = variants
        self._methods: dict[str, _Methods] = {}  # by application
        self._slots: dict[str, _Slot] = {}  # by decision id
        models = {name: arm for name, arm in arms.items() if not arm.variant_of}
        self.admission = AdmissionControl(tuple(models))
        router_client.wait_s = self.admission.wait_s
        self.breakers = {name: self._breaker(arm) for name, arm in models.items()}
        self._stranded = StrandedRequests(router_client.replicas)
        self.background = BackgroundCalls(
            router_client,
            self.admission.queues,
            self.breakers,
            self._complete_method,
            arms,
            variants,
        )
        self.spans = Tracer.from_env()

    def _breaker(self, arm: Arm) -> Breaker:
        """A circuit breaker that opens only if the arm also fails a check."""
        breaker = Breaker(check=lambda: check.start())
        check = ArmCheck(
            arm.tasks[0],
            lambda: self._complete_method(arm.name),
            breaker.on_check,
        )
        return breaker

    def configure(self, tuning: Tuning) -> None:
        """Take over changed settings."""
        self.admission.configure(tuning.admission)
        for breaker in self.breakers.values():
            breaker.settings = tuning.breaker

    def check(self, task: str, objective: Objective, rank: int) -> Objective:
        """Refuse a request that no arm can take now, before any work is done for it.

        Args:
            task: of the request.
            objective: of the request. Variants that it leaves out do not count.
            rank: priority of the request.

        Returns:
            The objective, with the arms that cannot take the request now as `unavailable`, too.

        Raises:
            ApiError: 429, all queues are full; 503, the circuit breakers of all arms that may answer are open.
        """
        try:
            self.admission.check(rank)
        except FullError as error:
            raise too_busy(error.retry_after_s) from None
        may_answer = candidates(self._arms.values(), task, objective)
        unavailable: dict[str, Exclusion] = {}
        for arm in may_answer:
            reason = self._unavailable_reason(arm.name, rank)
            if reason is not None:
                unavailable[arm.name] = reason
        if not unavailable:
            return objective
        if len(unavailable) == len(may_answer):
            raise self._all_unavailable(unavailable, rank)
        sentences = [(arm, reason.sentence()) for arm, reason in unavailable.items()]
        return replace(objective, unavailable=(*objective.unavailable, *sentences))

    def _all_unavailable(self, reasons: dict[str, Exclusion], rank: int) -> ApiError:
        waits_s = [
            self._queue(arm).wait_s(rank)
            for arm, reason in reasons.items()
            if reason is Exclusion.QUEUE_FULL
        ]
        if waits_s:
            return too_busy(min(waits_s))
        applications = dict.fromkeys(self._arms[arm].application for arm in reasons)
        wait_s = min(self.breakers[name].retry_after_s for name in applications)
        message = f"{', '.join(applications)} failed several times in a row and will be tried again shortly"
        return ApiError.later(503, message, wait_s, "model_unavailable")

    def _unavailable_reason(self, arm: str, rank: int) -> Exclusion | None:
        """Why an arm cannot take a request of this rank now; None if it can."""
        queue = self._queue(arm)
        queue.replicas = self._router_client.replicas(arm)
        if not self.breakers[self._arms[arm].application].admits:
            return Exclusion.CIRCUIT_OPEN
        return Exclusion.QUEUE_FULL if queue.full(rank) else None

    def _queue(self, arm: str) -> ModelQueue:
        return self.admission.queues[self._arms[arm].application]

    async def ask(self, decision: Decision, call: Call) -> Answer:
        """The beginning of an answer, by the decision's arm or, after a failure, by the next best arm.

        Raises:
            ApiError: 429 if there was no room, 503 if there was a failure.
        """
        limit_s = decision.objective.max_latency_s
        fraction = self._router_client.tuning.hedge_after_fraction
        has_limit = limit_s < float("inf")
        try:
            if fraction is not None and has_limit and not call.constrained:
                return await self._hedged(decision, call, fraction * limit_s)
            return await self._with_failover(decision, call)
        except _FailedError as failure:
            raise failure.api_error() from None

    async def _with_failover(self, decision: Decision, call: Call) -> Answer:
        try:
            answer = await self._attempt(decision, call)
            other = self._more_capable(answer, call)
            if other is None:
                return answer
            took_s = time.perf_counter() - answer.started
            self.finish(decision, Outcome(decision.id, "rejected", latency_s=took_s))
        except _FailedError as failure:
            if failure.final:
                raise
            other = self._next_best(decision, call, "model")
            if other is None:
                raise
        return await self._attempt(other, call)

    def _more_capable(self, answer: Answer, call: Call) -> Decision | None:
        """A decision for another arm, if the arm refused the request because it cannot do what another may do."""
        report = answer.first[1]
        error = report.error if report is not None else None
        if error is None or error.code not in CAPABILITY_CODES:
            return None
        least = 0
        if error.code == context_length.CODE:
            least = self._arms[answer.decision.arm].context_tokens + 1
        return self._next_best(answer.decision, call, "model", least)

    async def _hedged(
        self, decision: Decision, call: Call, hedge_after_s: float
    ) -> Answer:
        """Ask a second arm when the first fails or is slow to begin (Dean and Barroso, The Tail at Scale, 2013).

        The first arm to begin answers, and the other is cancelled. A second arm that had no room does not count as
        asked.
        """
        attempts = [asyncio.create_task(self._attempt(decision, call))]
        pending = set(attempts)
        fallback = ""
        winner = None
        try:
            while pending and winner is None:
                done, pending = await asyncio.wait(
                    pending,
                    timeout=None if fallback else hedge_after_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                winner = next((task for task in done if task.exception() is None), None)
                second_asked = fallback == "model" or any(map(_asked, attempts[1:]))
                if winner is None and not second_asked and (not done or not pending):
                    fallback = "model" if done else "hedge"
                    other = self._next_best(decision, call, fallback)
                    if other is not None:
                        attempts.append(asyncio.create_task(self._attempt(other, call)))
                        pending.add(attempts[-1])
            if winner is not None:
                return winner.result()
            return attempts[-1].result()  # raises its error
        finally:
            for task in attempts:
                if task is not winner:
                    self._cancel_attempt(task)

    def _cancel_attempt(self, attempt: asyncio.Task[Answer]) -> None:
        if attempt.cancel() or attempt.cancelled() or attempt.exception() is not None:
            return
        answer = attempt.result()  # it began at the same moment as the winner
        answer.call.cancel()
        took_s = time.perf_counter() - answer.started
        self.finish(
            answer.decision,
            Outcome(
                answer.decision.id,
                "disconnected",
                latency_s=took_s,
                streamed=answer.rest is not None,
            ),
        )

    async def _attempt(self, decision: Decision, call: Call) -> Answer:
        """Ask one arm and wait for the first item of its answer.

        Raises:
            _FailedError: the arm was busy or failed. The decision is finished.
        """
        arm = decision.arm
        application = self._arms[arm].application
        tuning = self._router_client.tuning
        streams = bool(call.body.get("stream"))
        timeout_s = tuning.first_byte_timeout_s if streams else tuning.answer_timeout_s
        breaker = self.breakers[application]
        started = time.perf_counter()
        slot = self._slots[decision.id] = _Slot()
        self._router_client.in_flight[application] += 1
        running: Cancellable | None = None
        stream: ModelStream | None = None
        try:
            slot.entered = await self._queue(arm).enter(call.rank)
            slot.waited_s = time.perf_counter() - started
            # while the request waited, the breaker may have opened, or another request may have become its probe
            if not breaker.admits:
                raise FullError(breaker.retry_after_s)
            slot.asked = True
            slot.probe = breaker.begin()
            async with asyncio.timeout(timeout_s) as deadline:
                self._stranded.register(
                    application, deadline, lambda: accepted_by_replica(running)
                )
                try:
                    methods = await self._methods_of(application)
                    lacks = self._router_client.lacks(arm)
                    body = capabilities.without_hints(call.body, lacks)
                    body = self._variants.body(arm, body)
                    if streams:
                        running = stream = methods.generate.remote(call.task, body)
                        first = await anext(stream)
                    else:
                        running = reply = methods.complete.remote(call.task, body)
                        first = await reply
                finally:
                    self._stranded.unregister(application, deadline)
            reported = first[1].error if first[1] is not None else None
            if reported is not None and reported.status >= 500:
                raise RuntimeError("the model answered with a server error")
            # the probe is answered: the breaker admits other requests before the answer ends
            if slot.probe and reported is None:
                breaker.end("ok", slot.probe)
                slot.probe = False
            return Answer(decision, started, first, running, stream)
        except Exception as error:
            busy = isinstance(error, FullError | BackPressureError)
            if not busy:
                log.warning(
                    "%s: %s failed before its first byte (%s)",
                    call.request_id,
                    arm,
                    type(error).__name__,
                )
            final = call.constrained and accepted_by_replica(running) and not busy
            if running is not None:
                running.cancel()
            status = "rejected" if busy or final else "error"
            took_s = time.perf_counter() - started
            self.finish(decision, Outcome(decision.id, status, latency_s=took_s))
            retry_after_s = 1.0 if busy else None
            if isinstance(error, FullError):
                retry_after_s = error.retry_after_s
            raise _FailedError(decision, retry_after_s, final) from None
        except asyncio.CancelledError:
            # the client left: the engine should go on to other requests
            if running is not None:
                running.cancel()
            took_s = time.perf_counter() - started
            if slot.entered is None:  # it left the queue, so the arm is not to blame
                slot.waited_s = took_s
            outcome = Outcome(
                decision.id, "disconnected", latency_s=took_s, streamed=streams
            )
            self.finish(decision, outcome)
            raise

    def _next_best(
        self, failed: Decision, call: Call, fallback: str, least_context: int = 0
    ) -> Decision | None:
        """A decision for the best of the arms of other applications; None if the client's limits allow none of them.

        Args:
            failed: the decision for the arm that did not answer.
            call: the request.
            fallback: see Decision.fallback.
            least_context: tokens of context that the other arm needs.
        """
        others = []
        for estimate in failed.estimates:
            arm = estimate.arm
            if arm not in self._arms or estimate.removed_by:
                continue
            if self._arms[arm].application == self._arms[failed.arm].application:
                continue
            if self._arms[arm].context_tokens < least_context:
                continue
            if not self._unavailable_reason(arm, call.rank):
                others.append(arm)
        if not others:
            return None
        # from the request's objective: that of the first decision was adjusted to the text already
        objective = replace(call.asked.objective, models=tuple(others))
        request = replace(
            call.asked, id=self._router_client.new_id(), objective=objective
        )
        decision = self._router_client.decide_locally(request, fallback, call.rank)
        if not decision.arm:
            return None
        return structs.replace(decision, retry_of=failed.id)

    async def _methods_of(self, application: str) -> _Methods:
        if application not in self._methods:
            # in a thread: it asks Serve's controller, which may be away
            handle = await asyncio.to_thread(self._connect, application)
            # bound here and not in the thread: in throughput mode a handle belongs to the event loop that it begins in
            # pickle instead of cloudpickle: no code is sent
            plain = handle.options(
                request_serialization="pickle", response_serialization="pickle"
            )
            self._methods[application] = _Methods(
                plain.complete, plain.options(stream=True).generate
            )
        return self._methods[application]

    async def _complete_method(self, application: str) -> CompleteMethod:
        return (await self._methods_of(application)).complete

    def running(self, decision: Decision) -> bool:
        """Whether the decision is not finished."""
        return decision.id in self._slots

    def finish(self, decision: Decision, outcome: Outcome) -> None:
        """Free the slot of a decision and report its outcome. Further calls for the same decision have no effect."""
        slot = self._slots.pop(decision.id, None)
        if slot is None:
            return
        application = self._arms[decision.arm].application
        self._router_client.in_flight[application] -= 1
        if slot.entered is not None:
            entered = slot.entered if slot.asked else None
            self.admission.queues[application].leave(entered)
        if slot.asked:
            self.breakers[application].end(outcome.status, slot.probe)
        if slot.waited_s > WAITED_S:
            outcome = structs.replace(outcome, waited_s=slot.waited_s)
        self._router_client.report(decision, outcome)
        if self.spans is not None:
            self.spans.finish(decision, outcome)


def _asked(attempt: asyncio.Task[Answer]) -> bool:
    """Whether the attempt's arm was asked or may still be asked, and did not just have no room."""
    error = attempt.exception() if attempt.done() else None
    return not isinstance(error, _FailedError) or error.retry_after_s is None


def too_busy(wait_s: float) -> ApiError:
    """The error for a client that should come back later."""
    return ApiError.later(
        429,
        "the models that may answer are busy; try again shortly",
        max(1.0, wait_s),
        "rate_limit_exceeded",
    )
