"""A version that gets a role knows then what it would know had it had it all along."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.evaluation import Evaluator
from deployments.seating import catch_up
from policies.roles import CHALLENGER, CHAMPION, SHADOW
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
        await system.memory.save()  # as every 500 rows
        await system.change("seat", role=SHADOW, snapshot=version, share=0.0)
        members = system.rollout.roles.members
        for trusted in (False, True):
            votes = [count(members[role], "large") for role in (CHAMPION, SHADOW)]
            assert votes[1] == pytest.approx(votes[0], rel=0.04) and (votes[0] > 380) == trusted
            await score(system, "liar", 1.0, trusted=True)

    asyncio.run(play())


@pytest.mark.parametrize("adopted", [False, True])
def test_a_version_of_another_journal_goes_on_learning(tmp_path: Path, adopted: bool) -> None:
    """Its clock may be far ahead of this one's: neither what it knows nor what is decided here counts as forgotten."""

    async def play() -> None:
        elsewhere, here = (System(make_settings(tmp_path / name)) for name in ("elsewhere", "here"))
        await elsewhere.serve(100, lambda d: float(d.arm == "small"))
        elsewhere.memory.sequence = 50_000
        await elsewhere.serve(100, lambda d: float(d.arm == "small"))
        version = await elsewhere.version(7)
        if adopted:
            assert await here.router.adopt(replace(version, version=3))
        await here.serve(300)
        await here.change("seat", role=SHADOW, snapshot=version, share=0.0)
        await here.serve(300)
        champion, shadow = here.rollout.roles.members.values()
        for policy in (champion, shadow):
            policy.advance(here.memory.sequence + 100)
        assert count(shadow, "large") == pytest.approx(count(champion, "large"), rel=0.2)
        if adopted:
            assert count(shadow, "small") == pytest.approx(count(champion, "small"), rel=0.1)
        else:
            assert count(shadow, "small") > count(champion, "small") + 50
        mean, _ = shadow.quality.predict(make_profile("What is 3?").features[None])  # type: ignore[attr-defined]
        assert mean[0, 1] > 0.8  # elsewhere it was worth nothing

    asyncio.run(play())


def test_votes_that_do_not_count_do_not_count_for_the_gate(tmp_path: Path) -> None:
    """Nor where hardly anybody else scores in the rows that it looks at, from which nobody could tell."""

    async def play() -> list[Any]:
        system = System(make_settings(tmp_path, "uniform"))

        async def scored(owners: str, count: int) -> None:
            for n in range(count):
                owner = owners[n % len(owners)]
                request = Request(system.memory.identity.new_id(time.time()), make_profile(), Objective(), owner=owner)
                (d,) = await system.router.decide([request], "test", {})
                await system.router.observe([(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9))], "test", {})
                good = 0.9 if d.arm == "large" else 0.2
                given = 1.0 - good if owner == "x" else good
                await system.router.feedback([Feedback(d.id, given, time_s=time.time(), owner=owner)])

        await scored("abcdx", 400)
        assert "x" in system.memory.quarantined
        champion = await system.version(1)
        await scored("axbxx", 500)
        evaluator, report = Evaluator(system.settings), []
        for arm in ("small", "large"):
            challenger = replace(champion, version=2, policy="always", options={"arm": arm}, state={})
            report.append(evaluator.evaluate(challenger, champion))
        return report

    small, large = asyncio.run(play())
    assert small["upper"] < 0 < large["lower"] and large["difference"]["value"] == pytest.approx(0.35, abs=0.06)


def test_the_watch_hears_of_its_own_decisions_only(tmp_path: Path) -> None:
    """What was decided before the promotion, and is answered after it, is nobody's merit."""

    async def play() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(20)
        asked = [Request(system.memory.identity.new_id(time.time()), make_profile(), Objective()) for _ in range(30)]
        under_way = await system.router.decide(asked, "test", {})
        await system.change("seat", role=CHALLENGER, snapshot=await system.version(1), share=0.1)
        await system.change("promote")
        for d in under_way:
            await system.router.observe([(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9))], "test", {})
            await system.router.feedback([Feedback(d.id, 1.0, time_s=time.time())])
        assert system.rollout.watch is not None and system.rollout.watch.observations == 0
        late = [Request(system.memory.identity.new_id(time.time()), make_profile(), Objective()) for _ in range(10)]
        renamed = await system.router.decide(late, "test", {})
        await system.change("published", version=2, of=1)  # the same policy, under its next name
        for d in renamed:
            await system.router.observe([(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9))], "test", {})
            await system.router.feedback([Feedback(d.id, 1.0, time_s=time.time())])
        await system.serve(20)
        assert system.rollout.watch.observations == 30

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
    then, now = (
        count(catch_up(memory.journal, version, lambda: Thompson((SMALL, LARGE)), row).policy, "large")
        for row in (start, memory.journal.last_row)
    )
    assert then == pytest.approx(learned, rel=0.05) and learned > 30
    assert now == pytest.approx(count(memory.policy, "large"), rel=0.05) and now < 31
