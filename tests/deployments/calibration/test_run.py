"""A calibration's tasks: order, leases, limits and budget."""

from typing import Any

import pytest

from deployments.calibration.records import (
    Message,
    Prompt,
    RunOrder,
    RunState,
    Task,
    TaskResult,
)
from deployments.calibration.run import FAILURES, LEASE_S, CalibrationRun, Job
from policies.events import CALIBRATION, Decision, Outcome
from policies.types import Arm, Objective
from tests.support.requests import make_profile

SMALL = Arm("small", prompt_price_usd=1e-6, output_price_usd=1e-6)
LARGE = Arm("large", prompt_price_usd=1e-5, output_price_usd=1e-5)


def make_run(prompts: int = 3, reference: str = "4", **options: Any) -> CalibrationRun:
    made = tuple(
        Prompt((Message("user", f"{i}?"),), reference, max_tokens=100)
        for i in range(prompts)
    )
    order = RunOrder(made, ("small", "large"), **options)
    jobs = [
        Job(f"{arm.name}-{i}", arm, prompt)
        for i, prompt in enumerate(made)
        for arm in (SMALL, LARGE)
    ]
    return CalibrationRun(order, jobs, {}, {})


BOTH = ("small", "large")


def ids(tasks: list[Task]) -> list[str]:
    return [task.decision_id for task in tasks]


def answer(
    run: CalibrationRun, task_id: str, status: str = "ok", cost_usd: float = 0.0
) -> None:
    arm = task_id.partition("-")[0]
    decision = Decision(
        task_id, arm, 0, "v", make_profile(), Objective(), fallback=CALIBRATION
    )
    outcome = Outcome(task_id, status, cost_usd=cost_usd)
    run.record(
        TaskResult(task_id, (decision, outcome), 1.0, "text"), failed=status != "ok"
    )


def test_each_size_gets_its_prompts_in_order_while_it_is_idle() -> None:
    """At most `concurrency` calls of a size are under way, over all ingresses."""
    run = make_run(concurrency=2)
    assert ids(run.tasks("a", ("small",), (), 0.0)) == ["small-0", "small-1"]
    assert run.progress()["large"].waiting and not run.progress()["small"].waiting
    assert ids(run.tasks("b", BOTH, (), 0.0)) == ["large-0", "large-1"]
    answer(run, "small-0")
    assert ids(run.tasks("b", BOTH, (), 0.0)) == ["small-2"]
    for task in ("small-1", "small-2", "large-0", "large-1"):
        answer(run, task)
    assert run.state is RunState.RUNNING
    assert ids(run.tasks("a", BOTH, (), 0.0)) == ["large-2"]
    answer(run, "large-2")
    assert run.state is RunState.FINISHED and run.calls == 6
    assert run.progress()["large"].answered == 3


def test_the_tasks_of_an_ingress_that_is_gone_are_given_to_another() -> None:
    """An ingress keeps a task as long as it reports it; a late answer of the first one is ignored here."""
    run = make_run(prompts=1)
    assert ids(run.tasks("a", BOTH, (), 0.0)) == ["small-0", "large-0"]
    late = LEASE_S + 1
    assert run.tasks("a", BOTH, ("small-0",), late - 2) == []
    assert ids(run.tasks("b", BOTH, (), late)) == ["large-0"]
    answer(run, "large-0")
    answer(run, "large-0")
    assert run.progress()["large"].answered == 1 and run.calls == 2


def test_a_task_without_room_is_put_back() -> None:
    """It is the next one, and costs no call."""
    run = make_run(prompts=2, concurrency=1)
    run.tasks("a", ("small",), (), 0.0)
    run.record(TaskResult("small-0", None), failed=True)
    assert run.calls == 0 and run.progress()["small"].answered == 0
    assert ids(run.tasks("a", ("small",), (), 0.0)) == ["small-0"]


@pytest.mark.parametrize(("reference", "each"), [("4", 1), ("", 2)])
def test_the_number_of_calls_is_kept(reference: str, each: int) -> None:
    """A call of the judge counts as well."""
    run = make_run(prompts=10, reference=reference, max_calls=5, concurrency=3)
    tasks = ids(run.tasks("a", BOTH, (), 0.0))
    assert len(tasks) == 5 // each and run.state is RunState.RUNNING
    for task in tasks:
        answer(run, task)
    assert run.tasks("a", BOTH, (), 0.0) == []
    assert run.state is RunState.OVER_BUDGET and "5 calls" in run.reason
    assert run.calls == each * (5 // each)


def test_the_cost_is_kept_below_the_limit_by_what_the_next_answers_may_cost() -> None:
    """An answer of large may cost 0.001 USD, so with 0.0025 USD no third one is asked while two are under way."""
    run = make_run(prompts=10, max_usd=0.0025, concurrency=4)
    assert ids(run.tasks("a", ("large",), (), 0.0)) == ["large-0", "large-1"]
    answer(run, "large-0", cost_usd=0.0001)
    assert ids(run.tasks("a", ("large",), (), 0.0)) == ["large-2"]
    answer(run, "large-1", cost_usd=0.0009)
    answer(run, "large-2", cost_usd=0.0009)
    assert run.tasks("a", ("large",), (), 0.0) == []
    assert run.state is RunState.OVER_BUDGET and run.spent_usd <= 0.0025


def test_a_size_that_fails_again_and_again_is_not_asked_any_more() -> None:
    """The other sizes go on, and the run says which one failed."""
    run = make_run(prompts=20, concurrency=1)
    for _ in range(FAILURES):
        (task,) = run.tasks("a", ("large",), (), 0.0)
        answer(run, task.decision_id, status="error")
    assert run.tasks("a", ("large",), (), 0.0) == []
    while tasks := run.tasks("a", BOTH, (), 0.0):
        answer(run, tasks[0].decision_id)
    assert run.state is RunState.FINISHED and run.reason.startswith("large failed")
    assert run.progress()["large"].failed == FAILURES


def test_answers_wait_for_the_program_and_end_the_run_when_they_are_graded() -> None:
    """A failed answer needs no grade."""
    run = make_run(prompts=1, by_program=True)
    run.tasks("a", BOTH, (), 0.0)
    answer(run, "small-0")
    answer(run, "large-0", status="error")
    assert [waiting.decision_id for waiting in run.ungraded] == ["small-0"]
    assert run.state is RunState.RUNNING
    run.graded(["small-0", "unknown"])
    assert run.state is RunState.FINISHED


def test_a_cancelled_run_gives_no_tasks() -> None:
    """Its first reason stays."""
    run = make_run()
    run.cancel("by me")
    run.cancel("by you")
    assert run.tasks("a", BOTH, (), 0.0) == []
    assert run.state is RunState.CANCELLED and run.reason == "by me"
