"""Tests of the generated tasks, which measure the accuracy of the models."""

import random
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets import prompts, talk
from assets.tasks import (
    KINDS,
    SIZES,
    WISHES,
    Task,
    check,
    is_reserved,
    make_task,
    reply,
)
from deployments.calibration.grading import grade
from deployments.calibration.prompts import read_prompts
from deployments.calibration.records import Prompt
from deployments.demonstration.run import make_stream


@cache
def bundled() -> list[tuple[Task, Prompt]]:
    """The tasks of the bundled prompts, with the prompts as the gateway reads them."""
    records = [line.record() for line in read_prompts(prompts.PATH)]
    return list(zip(prompts.reserved_tasks(), records, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_reply_of_every_size_is_right(kind: str) -> None:
    """The reply that each size is trained to give ends in the right answer, with or without steps."""
    rng = random.Random(0)
    for _ in range(100):
        task = make_task(rng, kind)
        assert all(check(task, reply(task, size)) for size in SIZES)


def test_a_wrong_reply_fails_the_check() -> None:
    """Only the end of a reply counts; a right number in the steps does not."""
    task = Task("sum", "What is 347 plus 586?", "933")
    assert check(task, "7+6+0=13 4+8+1=13 3+5+1=9 so 933") and check(task, " 933. ")
    for wrong in ("933 so 934", "", "so 9330"):
        assert not check(task, wrong)


def test_the_steps_of_a_reply_are_right() -> None:
    """Every step `x+y+c=t` and `x*y=p+c=t` of a worked reply is true."""
    rng = random.Random(1)
    for _ in range(300):
        working = reply(
            make_task(rng, rng.choice(("sum", "chain", "multiply", "story"))), "large"
        )
        for step in working.split():
            if product := re.fullmatch(r"(\d)\*(\d)=(\d+)\+(\d)=(\d+)", step):
                x, y, both, carry, total = map(int, product.groups())
                assert x * y == both and both + carry == total, step
            elif addition := re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d+)", step):
                x, y, carry, total = map(int, addition.groups())
                assert x + y + carry == total, step


def test_the_same_seed_makes_the_same_tasks() -> None:
    """A seed makes the tasks of the demo and of the benchmarks repeatable."""
    one = [make_task(random.Random(5)) for _ in range(3)]
    assert one == [make_task(random.Random(5)) for _ in range(3)]


def test_no_stream_has_a_reserved_question() -> None:
    """`make_task` replaces each reserved question, and with `reserved` each other one, whatever the seed and kind."""
    for seed in range(40):
        rng = random.Random(seed)
        for kind in KINDS:
            assert not is_reserved(make_task(rng, kind, wishes=False).question)
            assert is_reserved(
                make_task(rng, kind, wishes=False, reserved=True).question
            )
            with_wish = make_task(rng, kind).question
            wish = max((w for w in WISHES if with_wish.startswith(w)), key=len)
            assert not is_reserved(with_wish.removeprefix(wish))


def test_a_replaced_task_leaves_the_tasks_after_it_as_they_were() -> None:
    """The replacement draws nothing from the stream's generator."""
    rng = random.Random(0)
    other = random.Random(0)
    for _ in range(100):
        make_task(rng, "add", wishes=False)
        make_task(other, "add", wishes=False, reserved=True)
        assert rng.random() == other.random()


def test_the_bundled_prompts_share_no_text_with_any_seed_of_the_demo() -> None:
    """Every bundled question is reserved, and no question of a stream is; fifty seeds are checked as well."""
    questions = {prompt.question for _, prompt in bundled()}
    assert len(bundled()) == len(questions) == prompts.COUNT == 150
    assert all(is_reserved(question) for question in questions)
    for seed in range(50):
        stream = make_stream(seed, 750, with_talk=True)
        assert not questions & {task.question for task in stream}
        assert not any(is_reserved(task.question) for task in stream)


def test_the_bundled_file_is_the_one_that_the_script_writes() -> None:
    """Every kind has 9 or 10 prompts."""
    assert prompts.PATH.read_text().splitlines() == prompts.lines()
    tasks = prompts.reserved_tasks()
    kinds = KINDS + talk.KINDS
    counts = {kind: sum(task.kind == kind for task in tasks) for kind in kinds}
    assert set(counts.values()) == {9, 10}


@pytest.mark.parametrize("size", SIZES)
def test_the_bundled_references_accept_the_trained_replies(size: str) -> None:
    """With or without steps, and not the answer of another task."""
    trained = [(task, record) for task, record in bundled() if task.kind in KINDS]
    others = [task for task, _ in (*trained[1:], trained[0])]
    for (task, record), other in zip(trained, others, strict=True):
        assert grade(record, reply(task, size)) == 1.0
        if other.answer != task.answer:
            assert grade(record, reply(other, size)) == 0.0


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_the_bundled_references_grade_as_the_demos_checker(data: st.DataObject) -> None:
    """For replies that are made of the answer, steps, spaces and dots in any order."""
    task, record = data.draw(st.sampled_from(bundled()))
    pieces = [task.answer, "so ", "so", " ", ".", "\n", "7+6+0=13", "also ", "x"]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=6)))
    assert (grade(record, text) == 1.0) == check(task, text), text
