"""A version that gets a role knows then what it would know had it had it all along."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.seating import catch_up
from policies.roles import CHAMPION, SHADOW
from policies.thompson import Thompson
from policies.types import Feedback, Objective, Outcome, Request
from tests.helpers import make_profile
from tests.test_lineage import LARGE, SMALL, count, decide, make
from tests.test_rollout import System, make_settings


async def score(system: System, owner: str, score: float, trusted: bool = False) -> None:
    """One request of this key's owner, answered by `large`, and its score."""
    objective = Objective(models=("large",))
    request = Request(system.memory.identity.new_id(time.time()), make_profile(), objective, owner=owner)
    (decision,) = await system.router.decide([request], "test", {})
    await system.router.observe([(decision, Outcome(decision.id, "ok", 0.1, 0.3, 20, 9))], "test", {})
    await system.router.feedback([Feedback(decision.id, score, time_s=time.time(), owner=owner, trusted=trusted)])


def test_lies_that_were_found_later_are_taken_back_from_a_version_of_before(tmp_path: Path) -> None:
    """And given back once, when an operator vouches for the key."""

    async def play() -> None:
        system = System(make_settings(tmp_path))
        for _ in range(60):
            for owner, given in (("liar", 0.0), ("ann", 1.0), ("ben", 1.0)):
                await score(system, owner, given)
        version = await system.version(1)
        for _ in range(60):
            for owner in "cdef":
                await score(system, owner, 1.0)
            await score(system, "liar", 0.0)
        assert "liar" in system.memory.quarantined
        await system.change("seat", role=SHADOW, snapshot=version, share=0.0)
        members = system.rollout.roles.members
        for trusted in (False, True):
            votes = [count(members[role], "large") for role in (CHAMPION, SHADOW)]
            assert votes[1] == pytest.approx(votes[0], rel=0.04) and (votes[0] > 380) == trusted
            await score(system, "liar", 1.0, trusted=True)

    asyncio.run(play())


def test_a_succession_counts_from_its_row_on(url: str) -> None:
    """A version that is judged on what came before it has not heard of it yet."""
    memory = make(url)
    asyncio.run(memory.serve({"large": "l1"}))
    decide(memory, 200)
    start, learned = memory.journal.last_row, count(memory.policy, "large")
    version = replace(memory.snapshot(), version=1)
    decide(memory, 100)
    asyncio.run(memory.serve({"large": "l2"}))
    decide(memory, 10)
    then = catch_up(memory.journal, version, lambda: Thompson((SMALL, LARGE)), start)
    now = catch_up(memory.journal, version, lambda: Thompson((SMALL, LARGE)), memory.journal.last_row)
    assert count(then, "large") == pytest.approx(learned, rel=0.05) and learned > 30
    assert count(now, "large") == pytest.approx(count(memory.policy, "large"), rel=0.05) and count(now, "large") < 31
