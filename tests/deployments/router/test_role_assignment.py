"""Role assignment: a version with a new role has learned the same as if it had had the role from the start."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.router.replay import catch_up
from deployments.tracking.evaluation import Evaluator
from policies.events import Feedback, Outcome
from policies.rollout.roles import CHALLENGER, CHAMPION, SHADOW
from policies.thompson.policy import Thompson
from policies.types import Objective, Request
from tests.deployments.router.test_model_revisions import (
    LARGE,
    SMALL,
    count,
    decide,
    make,
)
from tests.deployments.router.test_rollout import System, make_settings
from tests.support.requests import make_profile


async def score(
    system: System, owner: str, score: float, trusted: bool = False
) -> None:
    """Send one request of this key, answered by `large`, and its score."""
    objective = Objective(models=("large",))
    request = Request(
        system.learner.ids.new_id(time.time()),
        make_profile(),
        objective,
        owner=owner,
    )
    (decision,) = await system.router.decide([request], "test", {})
    await system.router.observe(
        [(decision, Outcome(decision.id, "ok", 0.1, 0.3, 20, 9))], "test", {}
    )
    await system.router.feedback(
        [Feedback(decision.id, score, time_s=time.time(), owner=owner, trusted=trusted)]
    )


def test_scores_of_a_key_quarantined_later_are_removed_from_an_older_version(
    tmp_path: Path,
) -> None:
    """A version published before the quarantine loses the key's scores; a trusted score restores them once."""

    async def play() -> None:
        system = System(make_settings(tmp_path))
        for _ in range(60):
            for owner, given in (("hostile", 0.0), ("ann", 1.0), ("ben", 1.0)):
                await score(system, owner, given)
        version = await system.version(1)
        for _ in range(60):
            for owner in "cdef":
                await score(system, owner, 1.0)
            await score(system, "hostile", 0.0)
        assert "hostile" in system.learner.quarantined
        await system.learner.save()  # as the router does every 500 rows
        await system.assign(role=SHADOW, snapshot=version)
        members = system.rollout.roles.members
        for trusted in (False, True):
            votes = [count(members[role], "large") for role in (CHAMPION, SHADOW)]
            assert (
                votes[1] == pytest.approx(votes[0], rel=0.04)
                and (votes[0] > 380) == trusted
            )
            await score(system, "hostile", 1.0, trusted=True)

    asyncio.run(play())


@pytest.mark.parametrize("adopted", [False, True])
def test_a_version_of_another_journal_keeps_learning(
    tmp_path: Path, adopted: bool
) -> None:
    """A version with larger sequence numbers neither forgets its own events nor the events of this journal."""

    async def play() -> None:
        elsewhere, here = (
            System(make_settings(tmp_path / name)) for name in ("elsewhere", "here")
        )
        await elsewhere.serve(100, lambda d: float(d.arm == "small"))
        elsewhere.learner.sequence = 50_000
        await elsewhere.serve(100, lambda d: float(d.arm == "small"))
        version = await elsewhere.version(7)
        if adopted:
            assert await here.router.adopt(replace(version, version=3))
        await here.serve(300)
        await here.assign(role=SHADOW, snapshot=version)
        await here.serve(300)
        champion, shadow = here.rollout.roles.members.values()
        for policy in (champion, shadow):
            policy.advance(
                here.learner.sequence + 100, here.learner.records.scored + 100
            )
        assert count(shadow, "large") == pytest.approx(
            count(champion, "large"), rel=0.2
        )
        if adopted:
            assert count(shadow, "small") == pytest.approx(
                count(champion, "small"), rel=0.1
            )
        else:
            assert count(shadow, "small") > count(champion, "small") + 50
        mean, _ = shadow.quality.predict(make_profile("What is 3?").features[None])  # type: ignore[attr-defined]
        assert mean[0, 1] > 0.8  # the other journal scored `large` 0

    asyncio.run(play())


def test_the_promotion_gate_ignores_scores_of_quarantined_keys(tmp_path: Path) -> None:
    """The gate ignores a quarantined key even where almost all evaluated scores come from that key."""

    async def play() -> list[Any]:
        system = System(make_settings(tmp_path, "uniform"))

        async def scored(owners: str, count: int) -> None:
            for n in range(count):
                owner = owners[n % len(owners)]
                request = Request(
                    system.learner.ids.new_id(time.time()),
                    make_profile(),
                    Objective(),
                    owner=owner,
                )
                (d,) = await system.router.decide([request], "test", {})
                await system.router.observe(
                    [(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9))], "test", {}
                )
                good = 0.9 if d.arm == "large" else 0.2
                given = 1.0 - good if owner == "x" else good
                await system.router.feedback(
                    [Feedback(d.id, given, time_s=time.time(), owner=owner)]
                )

        await scored("abcdx", 400)
        assert "x" in system.learner.quarantined
        champion = await system.version(1)
        await scored("axbxx", 500)
        evaluator = Evaluator(system.settings)
        report = []
        for arm in ("small", "large"):
            challenger = replace(
                champion, version=2, policy="always", options={"arm": arm}, state={}
            )
            report.append(evaluator.evaluate(challenger, champion))
        return report

    small, large = asyncio.run(play())
    assert small["upper"] < 0 < large["lower"] and large["difference"][
        "value"
    ] == pytest.approx(0.35, abs=0.06)


def test_the_regression_test_ignores_decisions_from_before_the_promotion(
    tmp_path: Path,
) -> None:
    """A decision made before the promotion does not count if its score arrives after the promotion."""

    async def play() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(20)
        asked = [
            Request(system.learner.ids.new_id(time.time()), make_profile(), Objective())
            for _ in range(30)
        ]
        under_way = await system.router.decide(asked, "test", {})
        await system.assign(
            role=CHALLENGER, snapshot=await system.version(1), share=0.1
        )
        await system.router.promote("because")
        for d in under_way:
            await system.router.observe(
                [(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9))], "test", {}
            )
            await system.router.feedback([Feedback(d.id, 1.0, time_s=time.time())])
        assert (
            system.rollout.watch is not None and system.rollout.watch.observations == 0
        )
        late = [
            Request(system.learner.ids.new_id(time.time()), make_profile(), Objective())
            for _ in range(10)
        ]
        renamed = await system.router.decide(late, "test", {})
        await system.router.record_published(
            2, of=1
        )  # the same policy with a new version number
        for d in renamed:
            await system.router.observe(
                [(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9))], "test", {}
            )
            await system.router.feedback([Feedback(d.id, 1.0, time_s=time.time())])
        await system.serve(20)
        assert system.rollout.watch.observations == 30

    asyncio.run(play())


def test_a_revision_change_counts_from_its_row_on(url: str) -> None:
    """A version that is caught up to an earlier row is not discounted yet."""
    learner = make(url)
    asyncio.run(learner.update_revisions({"large": "l1"}))
    decide(learner, 200)
    start = learner.journal.last_row
    learned = count(learner.policy, "large")
    version = replace(learner.snapshot(), version=1)
    decide(learner, 100)
    asyncio.run(learner.update_revisions({"large": "l2"}))
    decide(learner, 10)
    then, now = (
        count(
            catch_up(
                learner.journal, version, lambda: Thompson((SMALL, LARGE)), row
            ).policy,
            "large",
        )
        for row in (start, learner.journal.last_row)
    )
    assert then == pytest.approx(learned, rel=0.05) and learned > 30
    assert now == pytest.approx(count(learner.policy, "large"), rel=0.05) and now < 31
