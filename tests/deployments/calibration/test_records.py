"""The records of a calibration cross processes, so each of them is pickled."""

import json
import pickle

import pytest

from deployments.calibration.records import (
    Message,
    Prompt,
    RunOrder,
    RunState,
    RunStatus,
    RunView,
    SizeProgress,
    Task,
    TaskResult,
    UngradedAnswer,
    Work,
)
from policies.evaluation.size_comparison import SizeAnswer
from policies.events import Decision, Outcome
from policies.types import Objective
from tests.support.requests import make_profile

PROMPT = Prompt((Message("system", "Be short."), Message("user", "Why?")), "a", "exact")
TASK = Task("d", "small", ("small",), PROMPT, True, False)
STATUS = RunStatus("r", RunState.RUNNING, models={"small": SizeProgress(2, 1, 0, True)})
ANSWER = SizeAnswer("p", "small", "question", False, 1.0, 0.5, 3, 4, 1e-6)


@pytest.mark.parametrize(
    "record",
    [
        RunOrder((PROMPT,), ("small",), max_usd=1.0, objective=Objective(0.1, 2.0)),
        Work(True, (TASK,)),
        STATUS,
        RunView(STATUS, (ANSWER,), Objective()),
        UngradedAnswer("d", "small", "Why?", "", "Because."),
    ],
)
def test_a_record_is_the_same_in_another_process(record: object) -> None:
    """As Ray sends it."""
    other = pickle.loads(pickle.dumps(record))
    if isinstance(record, Work):
        assert isinstance(other, Work)
        assert (other.active, other.tasks) == (record.active, record.tasks)
    else:
        assert other == record


def test_a_result_carries_its_decision() -> None:
    """With the outcome and the score."""
    decision = Decision("d", "small", 0, "v", make_profile(), Objective())
    result = TaskResult("d", (decision, Outcome("d", latency_s=2.0)), 0.5)
    other = pickle.loads(pickle.dumps(result))
    assert other.finished[0].id == "d" and other.finished[1].latency_s == 2.0


def test_the_status_is_plain_data() -> None:
    """As the HTTP interface returns it."""
    plain = STATUS.plain()
    assert json.loads(json.dumps(plain)) == plain and plain["state"] == "running"
