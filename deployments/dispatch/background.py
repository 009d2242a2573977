"""Calls of models that no client asked for: by the judge, by a calibration, for a second answer.

They have batch priority, and the policy does not learn from them unless the caller reports them. Calls that can wait
are made only while their arm is idle: no request is queued at it, and requests of clients have fewer than half of its
slots, for the last IDLE_S seconds. The other ingresses' requests count as well, as far as the last snapshot shows them.
"""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from math import inf

from deployments.dispatch.admission import BATCH, ModelQueue
from deployments.dispatch.circuit_breaker import Breaker
from deployments.dispatch.router_client import RouterClient
from deployments.dispatch.variants import Variants
from deployments.models.capabilities import without_hints
from deployments.models.handle import Body, CompleteMethod
from deployments.models.report import ModelError, ModelReport
from policies.events import Decision, Outcome
from policies.types import Arm

IDLE_S = 2.0


@dataclass(frozen=True, eq=False)
class BackgroundAnswer:
    """A complete answer.

    Attributes:
        payload: the bytes that a client would have got.
        text: of the first choice.
        report: tokens and the reason why the model stopped.
        latency_s: seconds from the call to the answer, including `waited_s` in the queue.
    """

    payload: bytes
    text: str
    report: ModelReport
    latency_s: float
    waited_s: float

    def outcome(
        self, decision: Decision, arm: Arm, flaw: str, keep_text: bool
    ) -> Outcome:
        """The outcome of the decision that this answers.

        Args:
            decision: about this answer.
            arm: the arm that answered, with its prices.
            flaw: the answer's visible flaw; "" for none.
            keep_text: whether the text may be stored.
        """
        report = self.report
        cost_usd = (
            report.prompt_tokens * arm.prompt_price_usd
            + report.output_tokens * arm.output_price_usd
        )
        return Outcome(
            decision_id=decision.id,
            latency_s=self.latency_s,
            waited_s=self.waited_s,
            prompt_tokens=report.prompt_tokens,
            output_tokens=report.output_tokens,
            cost_usd=cost_usd,
            finish_reason=report.finish_reason,
            flaw=flaw,
            answer=self.text if keep_text else "",
        )


class ModelFailedError(Exception):
    """The model answered with an error."""

    def __init__(self, error: ModelError):
        super().__init__(error.message)
        self.status = error.status


class BackgroundCalls:
    """The background calls of one ingress replica.

    Args:
        router_client: counts requests in flight, and knows the other ingresses' requests and the replicas.
        queues, breakers: by application.
        method: gives the handle's method that asks an application for an answer in one piece.
        arms: all arms by name.
        variants: what an application gets in place of a request.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        router_client: RouterClient,
        queues: Mapping[str, ModelQueue],
        breakers: Mapping[str, Breaker],
        method: Callable[[str], Awaitable[CompleteMethod]],
        arms: Mapping[str, Arm],
        variants: Variants,
        clock: Callable[[], float] | None = None,
    ):
        self._router_client = router_client
        self._queues = queues
        self._breakers = breakers
        self._method = method
        self._arms = arms
        self._variants = variants
        self._clock = clock or (lambda: time.monotonic())
        # when the requests of all ingresses together last had half of an application's slots
        self._last_busy_s = dict.fromkeys(queues, -inf)

    def is_idle(self, arm: str) -> bool:
        """Whether an arm has had capacity to spare for the last IDLE_S seconds, and can answer now."""
        self.observe_load()
        application = self._arms[arm].application
        queue = self._queues[application]
        if not self._router_client.replicas(arm):
            return False
        if not self._breakers[application].admits:
            return False
        elsewhere_s = self._clock() - self._last_busy_s[application]
        return min(queue.idle_s, elsewhere_s) >= IDLE_S

    def observe_load(self) -> None:
        """Note what is busy by the requests of all ingresses; call it with each new snapshot."""
        for application, queue in self._queues.items():
            queue.replicas = self._router_client.replicas(application)
            own = queue.running - queue.background
            total = own + self._router_client.others_in_flight(application)
            if 2 * total >= queue.slots:
                self._last_busy_s[application] = self._clock()

    async def text(self, arm: str, body: Body) -> str:
        """The text of an answer; see `ask`."""
        return (await self.ask(arm, body)).text

    async def ask(self, arm: str, body: Body, task: str = "chat") -> BackgroundAnswer:
        """Ask an arm for one answer in one piece, with batch priority. Its outcome is not reported.

        Args:
            arm: which to ask.
            body: a request in OpenAI's shape that asks for no stream.
            task: "chat" or "completion".

        Raises:
            FullError: there is no room in the arm's queue.
            ModelFailedError: the model answered with an error.
            Exception: the call failed.
        """
        application = self._arms[arm].application
        queue = self._queues[application]
        began = time.perf_counter()
        await queue.enter(BATCH, background=True)
        waited_s = time.perf_counter() - began
        self._router_client.in_flight[application] += 1
        reply = None
        try:
            body = without_hints(body, self._router_client.lacks(arm))
            body = self._variants.body(arm, body)
            reply = (await self._method(application)).remote(task, body)
            payload, report = await reply
            if report is not None and report.error is not None:
                raise ModelFailedError(report.error)
            choice = json.loads(payload)["choices"][0]
            content = choice["message"]["content"] if task == "chat" else choice["text"]
            return BackgroundAnswer(
                payload=payload,
                text=str(content or ""),
                report=report or ModelReport(),
                latency_s=time.perf_counter() - began,
                waited_s=waited_s,
            )
        except BaseException:
            if reply is not None:
                reply.cancel()
            raise
        finally:
            self._router_client.in_flight[application] -= 1
            queue.leave(None, background=True)
