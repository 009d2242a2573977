"""The router's part of calibrations: starts, continues and ends them, and finds their answers in the journal.

The journal has the answers (memory.py), and its metadata have the state. The prompts are kept in memory only: if the
router restarts, the same prompts must be sent again to go on.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from deployments.calibration.memory import ATTEMPTS, AnswerMemory, Pair, is_complete
from deployments.calibration.records import (
    Prompt,
    RunOrder,
    RunState,
    RunStatus,
    RunView,
    SizeProgress,
    TaskResult,
    UngradedAnswer,
    Work,
)
from deployments.calibration.run import CalibrationRun, Job
from deployments.journal.ids import IdFactory
from deployments.journal.journal import Journal
from policies.evaluation.size_comparison import SizeAnswer, answer_of
from policies.events import ANY_OWNER, CALIBRATION, Decision, Feedback, Outcome, Record
from policies.types import Arm, Objective

# names of the stored state and of the keys of the prompts in the journal's metadata
STATE_METADATA = "calibration"
PROMPTS_METADATA = "calibration_prompts"
EPOCHS = 10  # latest ones that are searched for answers
DAY_S = 86_400.0
log = logging.getLogger(__name__)


class RefusedError(ValueError):
    """A calibration is refused; the message says why and what would help."""


class StoredModel(msgspec.Struct, frozen=True):
    """The stored part of a SizeProgress."""

    prompts: int
    answered: int
    failed: int


class StoredRun(msgspec.Struct, frozen=True):
    """The last calibration, as the journal's metadata store it.

    epochs: times of which the ids of decisions are made, oldest first; the last one is used for new decisions.
    The other fields are those of RunStatus and RunOrder.
    """

    epochs: list[float] = []
    run_id: str = ""
    state: str = RunState.NONE.value
    reason: str = ""
    calls: int = 0
    spent_usd: float = 0.0
    reused: int = 0
    models: dict[str, StoredModel] = {}
    latency_weight: float = 0.0
    cost_weight: float = 0.0
    mlflow_run: str = ""


class CalibrationService:
    """The calibrations of one router.

    Args:
        journal: stores the state, and has the answers.
        ids: makes the ids of decisions.
        find: finds the records of decisions in the journal; blocking.
        observe: records finished decisions and scores, and returns their records when all of it is durable.
    """

    def __init__(
        self,
        journal: Journal,
        ids: IdFactory,
        find: Callable[[Sequence[str]], dict[str, Record]],
        observe: Callable[
            [Sequence[tuple[Decision, Outcome]], Sequence[Feedback]],
            Awaitable[dict[str, Record]],
        ],
    ):
        self._journal = journal
        self._ids = ids
        self._memory = AnswerMemory(ids, find)
        self._observe = observe
        self._run: CalibrationRun | None = None
        self._answers: dict[Pair, SizeAnswer] | None = {}
        self._key_of: dict[str, str] = {}  # by decision id, of the run's tasks
        prompts = journal.metadata(PROMPTS_METADATA)
        self._keys: list[str] = (
            msgspec.msgpack.decode(prompts, type=list[str]) if prompts else []
        )
        self._starting = asyncio.Lock()
        stored = journal.metadata(STATE_METADATA)
        self._stored = StoredRun()
        if stored is not None:
            self._stored = msgspec.msgpack.decode(stored, type=StoredRun)
            self._answers = None  # to be looked up when they are needed
        if self._stored.state == RunState.RUNNING.value:
            self._stored = msgspec.structs.replace(
                self._stored,
                state=RunState.INTERRUPTED.value,
                reason="the router restarted, and stores no prompts; send the same prompts again to go on",
            )

    @property
    def active(self) -> bool:
        """Whether a calibration runs."""
        return self._run is not None and self._run.state is RunState.RUNNING

    # --- start and end ------------------------------------------------------------------------------------------

    async def start(
        self,
        order: RunOrder,
        arms: Mapping[str, Arm],
        weights: Mapping[str, str],
        keep_days: float,
    ) -> RunStatus:
        """Start a calibration, or return the one that runs if it has the same prompts.

        Args:
            order: what was ordered.
            arms: all arms by name.
            weights: digest of the weights behind each arm.
            keep_days: for how long feedback for a decision is accepted.

        Raises:
            RefusedError: another calibration runs, or a model cannot be calibrated.
        """
        for name in order.models:
            if name not in arms or "chat" not in arms[name].tasks:
                known = ", ".join(n for n, arm in arms.items() if "chat" in arm.tasks)
                raise RefusedError(f"'{name}' does not chat; choose from: {known}")
        keys = {self._memory.key(prompt): prompt for prompt in order.prompts}
        async with self._starting:
            if self._run is not None and self.active:
                same = list(keys) == self._keys
                if same and order.models == self._run.order.models:
                    return self.status()
                raise RefusedError(
                    "another calibration runs; wait for its end, or cancel it "
                    "(DELETE /v1/router/calibrations)"
                )
            await self._start(order, keys, arms, weights, keep_days)
            await self._journal.flush()
        return self.status()

    async def _start(
        self,
        order: RunOrder,
        keys: Mapping[str, Prompt],
        arms: Mapping[str, Arm],
        weights: Mapping[str, str],
        keep_days: float,
    ) -> None:
        epochs = self._epochs(order.fresh, keep_days)
        await self._journal.flush()  # the answers of a run that has just ended
        # the other sizes' answers belong to the report as well
        names = [name for name, arm in arms.items() if "chat" in arm.tasks]
        search = epochs[-1:] if order.fresh else epochs
        answers, attempts = await asyncio.to_thread(
            self._memory.find, list(keys), names, weights, search
        )
        answered: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        jobs = []
        made = {}
        for key, prompt in keys.items():
            for name in order.models:
                answer = answers.get((key, name))
                attempt = attempts.get((key, name), 0)
                if is_complete(answer) or attempt >= ATTEMPTS:
                    answered[name] += 1
                    failed[name] += bool(answer and answer.failed)
                    continue
                decision_id = self._memory.decision_id(
                    epochs[-1], (key, name), weights, attempt
                )
                made[decision_id] = key
                jobs.append(Job(decision_id, arms[name], prompt))
        self._answers = answers
        self._key_of = made
        self._keys = list(keys)
        self._run = CalibrationRun(order, jobs, answered, failed)
        now_s = time.time()
        self._stored = StoredRun(
            epochs=epochs,
            run_id=self._ids.hash(f"{now_s}/{'/'.join(keys)}")[:16],
            reused=answered.total(),
            latency_weight=order.objective.latency_weight,
            cost_weight=order.objective.cost_weight,
        )
        self._journal.put_metadata(PROMPTS_METADATA, msgspec.msgpack.encode(self._keys))
        self._save()
        log.info(
            "a calibration of %s with %d prompts starts; %d answers exist",
            ", ".join(order.models),
            len(keys),
            answered.total(),
        )

    def _epochs(self, fresh: bool, keep_days: float) -> list[float]:
        """The times for the ids of decisions. A new one begins long before feedback for the last one expires."""
        now_s = time.time()
        oldest_s = max(
            self._journal.retention.deleted_before_s, now_s - keep_days * DAY_S
        )
        epochs = [e for e in self._stored.epochs if e > oldest_s][-EPOCHS + 1 :]
        if fresh or not epochs or now_s - epochs[-1] > keep_days * DAY_S / 2:
            epochs.append(now_s)
        return epochs

    def cancel(self, reason: str) -> RunStatus:
        """End the calibration that runs; what was answered is kept."""
        if self._run is not None:
            self._run.cancel(reason)
            self._save()
        return self.status()

    # --- work ---------------------------------------------------------------------------------------------------

    async def exchange(
        self,
        ingress: str,
        idle: Sequence[str],
        held: Sequence[str],
        results: Sequence[TaskResult],
    ) -> Work:
        """Take in an ingress's results, and give it new tasks.

        Args:
            ingress: the ingress.
            idle: the sizes that are idle there.
            held: the tasks that it has, those of `results` included.
            results: how its tasks ended.
        """
        finished = [result.finished for result in results if result.finished]
        scores = [
            Feedback(
                result.decision_id, result.score, CALIBRATION, time.time(), ANY_OWNER
            )
            for result in results
            if result.finished and result.score is not None
        ]
        records = await self._observe(finished, scores) if finished else {}
        run = self._run
        if run is None:
            return Work(active=False)
        for result in results:
            answer = self._note(result.decision_id, records.get(result.decision_id))
            run.record(result, failed=answer is None or answer.failed)
        tasks = run.tasks(ingress, idle, held, time.monotonic())
        if results:
            self._save()
        if not self.active and results:
            log.info("the calibration is over: %s %s", run.state, run.reason)
            await self._journal.flush()
        return Work(self.active, tuple(tasks))

    def _note(self, decision_id: str, record: Record | None) -> SizeAnswer | None:
        """Keep the answer of a decision of this run."""
        key = self._key_of.get(decision_id)
        if key is None or record is None:
            return None
        answer = answer_of(record, key)
        if answer is not None and self._answers is not None:
            self._answers[key, answer.arm] = answer
        return answer

    async def grade(self, scores: Mapping[str, float]) -> int:
        """Take the scores of the command's program; returns how many of them belong to answers that waited for one."""
        run = self._run
        if run is None:
            return 0
        waiting = {answer.decision_id for answer in run.ungraded}
        known = {key: value for key, value in scores.items() if key in waiting}
        items = [
            Feedback(decision_id, score, CALIBRATION, time.time(), ANY_OWNER)
            for decision_id, score in known.items()
        ]
        records = await self._observe((), items)
        for decision_id in known:
            self._note(decision_id, records.get(decision_id))
        run.graded(known)
        self._save()
        await self._journal.flush()
        return len(known)

    def ungraded(self) -> tuple[UngradedAnswer, ...]:
        """The answers that wait for the command's program."""
        return self._run.ungraded if self._run is not None else ()

    # --- what operators see -------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """Where the calibration stands."""
        stored = self._stored
        models = {
            name: SizeProgress(model.prompts, model.answered, model.failed, False)
            for name, model in stored.models.items()
        }
        if self._run is not None:
            models = self._run.progress()
        return RunStatus(
            run_id=stored.run_id,
            state=RunState(stored.state),
            reason=stored.reason,
            calls=stored.calls,
            spent_usd=stored.spent_usd,
            reused=stored.reused,
            ungraded=len(self.ungraded()),
            models=models,
            mlflow_run=stored.mlflow_run,
        )

    async def view(self, names: Sequence[str], weights: Mapping[str, str]) -> RunView:
        """The calibration with all answers to its prompts, also those of earlier runs."""
        if self._answers is None:
            answers, _ = await asyncio.to_thread(
                self._memory.find, self._keys, names, weights, self._stored.epochs
            )
            self._answers = answers
        objective = Objective(self._stored.latency_weight, self._stored.cost_weight)
        return RunView(self.status(), tuple(self._answers.values()), objective)

    async def logged(self, run_id: str, mlflow_run: str) -> None:
        """The tracker has logged the report of a calibration."""
        if run_id == self._stored.run_id:
            self._stored = msgspec.structs.replace(self._stored, mlflow_run=mlflow_run)
            self._put()
            await self._journal.flush()

    # --- memory -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Store the state of the run; it is durable with the journal's next write."""
        run = self._run
        if run is None:
            return
        models = {
            name: StoredModel(model.prompts, model.answered, model.failed)
            for name, model in run.progress().items()
        }
        self._stored = msgspec.structs.replace(
            self._stored,
            state=run.state.value,
            reason=run.reason,
            calls=run.calls,
            spent_usd=run.spent_usd,
            models=models,
        )
        self._put()

    def _put(self) -> None:
        encoded = msgspec.msgpack.encode(self._stored)
        self._journal.put_metadata(STATE_METADATA, encoded)
