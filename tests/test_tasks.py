"""The generated tasks are what the models' accuracy is measured with, so they must be right themselves."""

import random
import re

import pytest

from assets.tasks import KINDS, SIZES, Task, check, make_task, reply


@pytest.mark.parametrize("kind", KINDS)
def test_the_taught_reply_of_every_size_is_right(kind: str) -> None:
    """With or without working, it ends in the answer."""
    rng = random.Random(0)
    for _ in range(100):
        task = make_task(rng, kind)
        assert all(check(task, reply(task, size)) for size in SIZES)


def test_a_wrong_reply_is_found_out() -> None:
    """The end counts: a right number in the working does not help."""
    task = Task("sum", "What is 347 plus 586?", "933")
    assert check(task, "7+6+0=13 4+8+1=13 3+5+1=9 so 933") and check(task, " 933. ")
    assert not check(task, "933 so 934") and not check(task, "") and not check(task, "so 9330")


def test_workings_are_true_sums() -> None:
    """Every step `x+y+c=t` and `x*y=p+c=t` holds."""
    rng = random.Random(1)
    for _ in range(300):
        working = reply(make_task(rng, rng.choice(("sum", "chain", "multiply", "story"))), "large")
        for step in working.split():
            if product := re.fullmatch(r"(\d)\*(\d)=(\d+)\+(\d)=(\d+)", step):
                x, y, both, carry, total = map(int, product.groups())
                assert x * y == both and both + carry == total, step
            elif addition := re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d+)", step):
                x, y, carry, total = map(int, addition.groups())
                assert x + y + carry == total, step


def test_same_seed_same_stream() -> None:
    """Demo and benchmark streams can be repeated."""
    one = [make_task(random.Random(5)) for _ in range(3)]
    assert one == [make_task(random.Random(5)) for _ in range(3)]
