"""One calibration: which prompts each size still has to answer, which ingress is at which, and what it may cost.

The router owns the run. Every ingress asks it for work, and says which sizes are idle there. A task is leased to an
ingress, which renews the lease with each call; the tasks of an ingress that is gone are given to another.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from deployments.calibration.records import (
    Prompt,
    RunOrder,
    RunState,
    SizeProgress,
    Task,
    TaskResult,
    UngradedAnswer,
)
from policies.events import Decision, Outcome
from policies.types import Arm

LEASE_S = 30.0
FAILURES = 5  # of a size in a row, after which this run does not ask it again
MAX_UNGRADED = 100  # answers that wait for the command's program
USUAL_TOKENS = 500  # of an answer without a limit, for the bound of its cost
CHARS_PER_TOKEN = 3  # a low guess, for the bound of a prompt's cost


@dataclass(frozen=True)
class Job:
    """One prompt for one size, under the id of its decision."""

    decision_id: str
    arm: Arm
    prompt: Prompt

    @property
    def most_usd(self) -> float:
        """An upper bound of the answer's cost, unless it is much longer than usual."""
        prompt_tokens = len(self.prompt.context) / CHARS_PER_TOKEN
        output_tokens = self.prompt.max_tokens or USUAL_TOKENS
        return (
            prompt_tokens * self.arm.prompt_price_usd
            + output_tokens * self.arm.output_price_usd
        )


@dataclass
class _Lease:
    job: Job
    ingress: str
    until_s: float


class CalibrationRun:
    """The state of one run; times are arguments.

    Attributes:
        order: what was ordered.
        state: see RunState; only RUNNING hands out tasks.
        reason: why the run ended.
        calls: made, those of the judge included.
        spent_usd: cost of the answers.

    Args:
        order: what was ordered.
        jobs: what is to be asked, in this order for each size.
        answered, failed: by size, the number of answers that exist already, and of failed ones among them.
    """

    def __init__(
        self,
        order: RunOrder,
        jobs: Iterable[Job],
        answered: Mapping[str, int],
        failed: Mapping[str, int],
    ):
        self.order = order
        self.state = RunState.RUNNING
        self.reason = ""
        self.calls = 0
        self.spent_usd = 0.0
        self._pending: dict[str, deque[Job]] = {arm: deque() for arm in order.models}
        for job in jobs:
            self._pending[job.arm.name].append(job)
        self._answered = Counter(answered)
        self._failed = Counter(failed)
        self._leases: dict[str, _Lease] = {}  # by decision id
        self._ungraded: dict[str, UngradedAnswer] = {}  # by decision id
        self._failures_in_a_row: Counter[str] = Counter()
        self._given_up: list[str] = []
        self._idle: set[str] = set(order.models)
        self._end_if_done()

    @property
    def ungraded(self) -> tuple[UngradedAnswer, ...]:
        """The answers that wait for the command's program, oldest first."""
        return tuple(self._ungraded.values())

    def tasks(
        self, ingress: str, idle: Collection[str], held: Collection[str], now_s: float
    ) -> list[Task]:
        """New tasks for an ingress.

        Args:
            ingress: the ingress that asks.
            idle: the sizes that are idle there.
            held: the tasks that it has; their leases are renewed.
            now_s: seconds, monotonic.
        """
        self._renew(ingress, held, now_s)
        tasks: list[Task] = []
        if self.state is not RunState.RUNNING:
            return tasks
        self._idle = set(idle)
        under_way = Counter(lease.job.arm.name for lease in self._leases.values())
        for arm, pending in self._pending.items():
            while arm in idle and pending and under_way[arm] < self.order.concurrency:
                if len(self._ungraded) + len(self._leases) >= MAX_UNGRADED:
                    return tasks
                task = self._task(pending[0])
                if not self._affordable(pending[0], task):
                    self._end_if_done()
                    return tasks
                job = pending.popleft()
                self.calls += 1 + task.to_judge
                under_way[arm] += 1
                self._leases[job.decision_id] = _Lease(job, ingress, now_s + LEASE_S)
                tasks.append(task)
        return tasks

    def _task(self, job: Job) -> Task:
        by_program = self.order.by_program
        return Task(
            decision_id=job.decision_id,
            arm=job.arm.name,
            models=self.order.models,
            prompt=job.prompt,
            to_judge=not by_program and not job.prompt.reference,
            to_program=by_program,
        )

    def _renew(self, ingress: str, held: Collection[str], now_s: float) -> None:
        for decision_id, lease in list(self._leases.items()):
            if lease.ingress == ingress and decision_id in held:
                lease.until_s = now_s + LEASE_S
            elif lease.until_s < now_s:
                self._put_back(decision_id)

    def _put_back(self, decision_id: str) -> None:
        """Take a task from its ingress; it is the next one of its size."""
        lease = self._leases.pop(decision_id)
        self.calls -= 1 + self._task(lease.job).to_judge
        self._pending[lease.job.arm.name].appendleft(lease.job)

    def _affordable(self, job: Job, task: Task) -> bool:
        """Whether the budget allows a task; if not, and nothing is under way, the run is over."""
        order = self.order
        calls = self.calls + 1 + task.to_judge
        reserved = sum(lease.job.most_usd for lease in self._leases.values())
        over = ""
        if order.max_calls is not None and calls > order.max_calls:
            over = f"the {order.max_calls} calls are used up"
        elif (
            order.max_usd is not None
            and self.spent_usd + reserved + job.most_usd > order.max_usd
        ):
            over = f"one more answer may exceed {order.max_usd:g} USD"
        if over and not self._leases and not self._ungraded:
            self.state = RunState.OVER_BUDGET
            self.reason = over
        return not over

    def record(self, result: TaskResult, failed: bool) -> None:
        """Take in how a task ended; `failed`: it has no answer, or a flawed one. Unknown tasks are ignored."""
        lease = self._leases.get(result.decision_id)
        if lease is None:
            return
        if result.finished is None:
            self._put_back(result.decision_id)
            return
        del self._leases[result.decision_id]
        job = lease.job
        self._count(job, result.finished, failed)
        if self.order.by_program and not failed:
            self._ungraded[result.decision_id] = UngradedAnswer(
                decision_id=result.decision_id,
                model=job.arm.name,
                prompt=job.prompt.question,
                reference=job.prompt.reference,
                answer=result.answer,
            )
        self._end_if_done()

    def _count(
        self, job: Job, finished: tuple[Decision, Outcome], failed: bool
    ) -> None:
        arm = job.arm.name
        outcome = finished[1]
        self.spent_usd += outcome.cost_usd
        self._answered[arm] += 1
        self._failed[arm] += failed
        in_a_row = self._failures_in_a_row
        in_a_row[arm] = in_a_row[arm] + 1 if outcome.status == "error" else 0
        if in_a_row[arm] >= FAILURES and arm not in self._given_up:
            self._given_up.append(arm)
            self._pending[arm].clear()

    def graded(self, decision_ids: Collection[str]) -> None:
        """The command has graded these answers."""
        for decision_id in decision_ids:
            self._ungraded.pop(decision_id, None)
        self._end_if_done()

    def cancel(self, reason: str) -> None:
        """End the run. Answers that are under way are still recorded by the router, but not counted here."""
        if self.state is RunState.RUNNING:
            self.state = RunState.CANCELLED
            self.reason = reason

    def _end_if_done(self) -> None:
        if self.state is not RunState.RUNNING or self._leases or self._ungraded:
            return
        if not any(self._pending.values()):
            self.state = RunState.FINISHED
            if self._given_up:
                names = ", ".join(self._given_up)
                self.reason = (
                    f"{names} failed {FAILURES} times in a row and was not asked again"
                )

    def progress(self) -> dict[str, SizeProgress]:
        """How far each size is."""
        under_way = {lease.job.arm.name for lease in self._leases.values()}
        running = self.state is RunState.RUNNING
        return {
            arm: SizeProgress(
                prompts=len(self.order.prompts),
                answered=self._answered[arm],
                failed=self._failed[arm],
                waiting=running
                and bool(pending)
                and arm not in under_way
                and arm not in self._idle,
            )
            for arm, pending in self._pending.items()
        }
