"""One ingress's part of a calibration: it asks the sizes that are idle, and reports their answers to the router."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from ray.serve.exceptions import BackPressureError

from deployments.calibration.grading import grade
from deployments.calibration.records import Task, TaskResult
from deployments.dispatch.admission import FullError
from deployments.dispatch.background import (
    BackgroundAnswer,
    BackgroundCalls,
    ModelFailedError,
)
from deployments.dispatch.router_client import RouterClient
from deployments.models.handle import Body
from deployments.profiler.reader import ProfileItem
from policies.events import Decision, Outcome
from policies.types import Arm, Objective, Request

POLL_S = 0.25
RETRY_S = 1.0  # after a call of the router that failed
CALL_TIMEOUT_S = 30.0
log = logging.getLogger(__name__)


class CalibrationWorker:
    """Works on the router's calibration, for one ingress replica.

    Args:
        router_client: profiles prompts, makes decisions, and has the router's handle.
        calls: asks the sizes, and says which of them are idle.
        arms: all arms by name.
        flaw_of: the visible flaw of an answer, from the request's body, the bytes and the finish reason.
        judge: grades a question and its answer.
    """

    def __init__(
        self,
        router_client: RouterClient,
        calls: BackgroundCalls,
        arms: Mapping[str, Arm],
        flaw_of: Callable[[Body, bytes, str], str],
        judge: Callable[[str, str], Awaitable[float | None]],
    ):
        self._router_client = router_client
        self._calls = calls
        self._arms = arms
        self._flaw_of = flaw_of
        self._judge = judge
        self._results: list[TaskResult] = []
        self._running: dict[str, asyncio.Task[None]] = {}  # by decision id
        self._changed = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ask the router for work from now on, until there is none."""
        if self._loop is None or self._loop.done():
            self._loop = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while True:
            try:
                active = await self._exchange()
            except Exception as error:
                log.warning(
                    "the router gave no work for the calibration (%s); asking again",
                    type(error).__name__,
                )
                if not self._router_client.calibrating and not self._results:
                    return  # the router restarted, and knows of no calibration
                await asyncio.sleep(RETRY_S)
                continue
            if not active:
                for task in self._running.values():
                    task.cancel()
                if not self._running and not self._results:
                    return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), POLL_S)
            except TimeoutError:
                continue

    async def _exchange(self) -> bool:
        """Report what is finished and begin what the router gives; returns whether the calibration goes on."""
        results = self._results
        self._results = []
        held = [*self._running, *(result.decision_id for result in results)]
        idle = [name for name in self._arms if self._calls.is_idle(name)]
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                work = await self._router_client.router.calibrate.remote(
                    self._router_client.ingress_id, idle, held, results
                )
        except BaseException:
            self._results = results + self._results
            raise
        for task in work.tasks:
            if task.decision_id not in self._running:
                self._running[task.decision_id] = asyncio.create_task(self._run(task))
        return work.active

    async def _run(self, task: Task) -> None:
        result = TaskResult(task.decision_id, None)
        try:
            result = await self._answer(task)
        except Exception as error:
            log.warning(
                "a prompt of the calibration was not answered (%s)",
                type(error).__name__,
            )
        finally:
            del self._running[task.decision_id]
            self._results.append(result)
            self._changed.set()

    async def _answer(self, task: Task) -> TaskResult:
        """Ask the size for its answer, and grade it."""
        decision = await self._decide(task)
        body = task.prompt.body()
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(self._router_client.tuning.answer_timeout_s):
                answer = await self._calls.ask(task.arm, body)
        except (FullError, BackPressureError):
            return TaskResult(task.decision_id, None)
        except Exception as error:
            rejected = isinstance(error, ModelFailedError) and error.status < 500
            status = "rejected" if rejected else "error"
            outcome = Outcome(decision.id, status, latency_s=loop.time() - began_s)
            return TaskResult(task.decision_id, (decision, outcome))
        outcome = self._outcome(task, decision, body, answer)
        score = None
        if not outcome.flaw and not task.to_program:
            score = await self._score(task, answer.text)
        return TaskResult(
            task.decision_id,
            (decision, outcome),
            score,
            answer.text if task.to_program else "",
        )

    async def _decide(self, task: Task) -> Decision:
        """The record that this size answers this prompt."""
        client = self._router_client
        prompt = task.prompt
        item = ProfileItem(
            prompt.question,
            prompt.context,
            len(prompt.messages),
            "chat",
            prompt.max_tokens,
        )
        profile, _ = await client.profile(item)
        prompt_hash, text = client.prompt_fields(prompt.context)
        objective: Objective = client.tuning.objective.objective()
        request = Request(
            id=task.decision_id,
            profile=profile,
            objective=replace(objective, models=task.models),
            prompt_hash=prompt_hash,
            prompt=text,
        )
        return client.calibration_decision(request, task.arm)

    def _outcome(
        self, task: Task, decision: Decision, body: Body, answer: BackgroundAnswer
    ) -> Outcome:
        flaw = self._flaw_of(body, answer.payload, answer.report.finish_reason)
        return answer.outcome(
            decision, self._arms[task.arm], flaw, self._router_client.store_text
        )

    async def _score(self, task: Task, answer: str) -> float | None:
        """The score of an answer by its reference or by the judge; None if the judge gave none."""
        if not task.to_judge:
            return await asyncio.to_thread(grade, task.prompt, answer)
        try:
            return await self._judge(task.prompt.question, answer)
        except Exception as error:
            log.warning(
                "an answer of the calibration was not judged (%s)",
                type(error).__name__,
            )
            return None
