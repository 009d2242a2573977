"""Tests of the generated tasks, which measure the accuracy of the models."""

import random
import re

import pytest

from assets.tasks import KINDS, SIZES, Task, check, make_task, reply


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
