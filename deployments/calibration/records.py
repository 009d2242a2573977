"""The records of a calibration that cross between the command, the ingresses and the router."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import NamedTuple

from policies.evaluation.size_comparison import SizeAnswer
from policies.events import Decision, Outcome
from policies.types import Objective


class RunState(StrEnum):
    """Where a calibration stands.

    NONE: there was none. INTERRUPTED: the router restarted; it does not store prompts, so they must be sent again.
    """

    NONE = "none"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    OVER_BUDGET = "over budget"
    INTERRUPTED = "interrupted"


class Message(NamedTuple):
    """One message of a prompt."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    messages: of a chat; the last user message is what is asked.
    reference: the right answer; "" for none, and then a judge or the user's program grades.
    rule: one of grading.RULES, which compares an answer with the reference.
    max_tokens: limit of the answer; 0 for none.
    """

    messages: tuple[Message, ...]
    reference: str = ""
    rule: str = "exact"
    max_tokens: int = 0

    @property
    def question(self) -> str:
        """The last user message, or the last message."""
        asked = [m.content for m in self.messages if m.role == "user"]
        return asked[-1] if asked else self.messages[-1].content

    @property
    def context(self) -> str:
        """All that the model reads."""
        return "".join(message.content for message in self.messages)

    def body(self) -> dict[str, object]:
        """The request in OpenAI's shape."""
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        body: dict[str, object] = {"messages": messages, "temperature": 0.0}
        return body | ({"max_tokens": self.max_tokens} if self.max_tokens else {})


@dataclass(frozen=True)
class RunOrder:
    """What an operator orders.

    prompts: in the order in which they are asked.
    models: the sizes that answer.
    by_program: the command grades by the user's program, and not by references or the judge.
    max_calls: largest number of calls, those of the judge included; None for no limit.
    max_usd: largest cost of the answers, by the sizes' prices; None for no limit.
    concurrency: calls under way to each size.
    fresh: ask again what was answered before.
    objective: what the report compares the sizes by.
    """

    prompts: tuple[Prompt, ...]
    models: tuple[str, ...]
    by_program: bool = False
    max_calls: int | None = None
    max_usd: float | None = None
    concurrency: int = 2
    fresh: bool = False
    objective: Objective = field(default_factory=Objective)


@dataclass(frozen=True)
class Task:
    """One prompt that one size shall answer.

    decision_id: of the decision; the same prompt, size, weights and attempt have the same id.
    arm: the size. models: all sizes of the calibration.
    to_judge: the judge grades the answer. to_program: the command does.
    """

    decision_id: str
    arm: str
    models: tuple[str, ...]
    prompt: Prompt
    to_judge: bool
    to_program: bool


@dataclass(frozen=True, eq=False)
class TaskResult:
    """How a task ended.

    finished: the decision with its outcome; None if the size was not asked, so the task is put back.
    score: in [0, 1]; None if the answer has no grade yet, or shows that it is flawed.
    answer: the text, only where the command grades it.
    """

    decision_id: str
    finished: tuple[Decision, Outcome] | None
    score: float | None = None
    answer: str = ""


@dataclass(frozen=True, eq=False)
class Work:
    """What an ingress shall do. active: a calibration runs."""

    active: bool
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True)
class UngradedAnswer:
    """An answer that the command shall grade by the user's program."""

    decision_id: str
    model: str
    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class SizeProgress:
    """How far a size is: answers of `prompts`, failed ones among them; `waiting` while it has no idle capacity."""

    prompts: int
    answered: int
    failed: int
    waiting: bool


@dataclass(frozen=True)
class RunStatus:
    """A calibration for operators.

    run_id: "" if there was none.
    state: see RunState.
    reason: why it ended, or what it waits for.
    calls: made in this run, those of the judge included.
    spent_usd: cost of the answers of this run.
    reused: answers of earlier runs.
    ungraded: answers that wait for the command's program.
    models: progress by size.
    mlflow_run: id of the run in MLflow; "" before there is one.
    """

    run_id: str = ""
    state: RunState = RunState.NONE
    reason: str = ""
    calls: int = 0
    spent_usd: float = 0.0
    reused: int = 0
    ungraded: int = 0
    models: Mapping[str, SizeProgress] = field(default_factory=dict)
    mlflow_run: str = ""

    def plain(self) -> dict[str, object]:
        """Plain data."""
        return {**asdict(self), "state": self.state.value}


@dataclass(frozen=True)
class RunView:
    """A calibration with its answers, and the objective by which its report compares the sizes."""

    status: RunStatus
    answers: tuple[SizeAnswer, ...]
    objective: Objective
