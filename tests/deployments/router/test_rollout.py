"""Rollout in a running router: a promotion loses no learning, roles survive a restart, a regression rolls back."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.journal.codec import encode
from deployments.journal.journal import Journal
from deployments.journal.snapshot import Snapshot
from deployments.router.actor import Router
from deployments.router.learner import Learner
from deployments.router.replay import JournalView
from deployments.router.role_table import champion_of
from deployments.router.rollout import Rollout
from deployments.settings import GatewaySettings
from policies.events import Decision, Feedback, Outcome
from policies.rollout.regression_watch import RegressionTest
from policies.rollout.roles import CHALLENGER, CHAMPION, SHADOW
from policies.types import Objective, Request
from tests.support.requests import make_profile

BETTER: Callable[[Decision], float] = lambda d: float(d.arm == "large")  # noqa: E731


def make_settings(
    folder: Path, policy: str = "thompson", **options: Any
) -> GatewaySettings:
    return GatewaySettings.model_validate(
        {
            "models": {"small": {}, "large": {}},
            "policy": {"name": policy},
            "journal": f"sqlite:///{folder}/journal.db",
            "rollout": options,
        }
    )


class System:
    """A router without Ray, with methods that send requests and assign roles."""

    def __init__(self, settings: GatewaySettings, seed: int = 0):
        self.settings = settings
        self.rng = np.random.default_rng(seed)
        self.router = Router(settings, lambda _: {})
        self.router._rng = np.random.default_rng(seed)

    @property
    def learner(self) -> Learner:
        return self.router._learner

    @property
    def rollout(self) -> Rollout:
        return self.router._rollout

    async def serve(
        self, count: int, score: Callable[[Decision], float] = BETTER
    ) -> list[Decision]:
        """Send requests in batches of ten, each with an outcome and a score."""
        made: list[Decision] = []
        while len(made) < count:
            now = time.time()
            ids = [
                self.learner.ids.new_id(now) for _ in range(min(10, count - len(made)))
            ]
            batch = [
                Request(
                    i, make_profile(f"What is {self.rng.integers(99)}?"), Objective()
                )
                for i in ids
            ]
            decisions = await self.router.decide(batch, "test", {})
            await self.router.observe(
                [(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9)) for d in decisions],
                "test",
                {},
            )
            assert set(
                await self.router.feedback(
                    [Feedback(d.id, score(d), time_s=now) for d in decisions]
                )
            ) == {"accepted"}
            made += decisions
        return made

    async def assign(self, role: str, snapshot: Snapshot, share: float = 0.0) -> Any:
        return await self.router.assign_role(role, snapshot, share, "because")

    async def version(self, number: int, **options: Any) -> Snapshot:
        """A published version as the registry returns it, with these options."""
        return replace(await self.router.checkpoint(), version=number, options=options)


def same(one: Any, another: Any) -> bool:
    for policy in (one, another):
        policy.advance(100_000, 100_000)
    mine = one.state()
    theirs = another.state()
    # Only the scores of a policy's own decisions are evidence of drift, so this part depends on the role.
    return set(mine) == set(theirs) and all(
        np.allclose(mine[k], v, rtol=1e-9, atol=1e-9)
        for k, v in theirs.items()
        if not k.endswith(("drift.better", "drift.worse"))
    )


async def test_a_version_with_a_new_role_has_learned_all_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shadow equals the champion, including events that arrive while the shadow catches up."""
    # Each role has its own evidence of drift, so an alarm of one would make them differ.
    monkeypatch.setattr("policies.thompson.drift.THRESHOLD", float("inf"))

    system = System(make_settings(tmp_path))
    await system.serve(60)
    old = await system.version(1)
    made = await system.serve(90)
    corrections = [Feedback(d.id, 0.5, time_s=time.time() + 5) for d in made]
    seating = asyncio.create_task(system.assign(role=SHADOW, snapshot=old))
    await asyncio.sleep(0)
    await system.router.feedback(corrections)
    await system.serve(50)
    await seating
    await system.serve(20)
    members = system.rollout.roles.members
    assert same(members[CHAMPION], members[SHADOW])


async def test_promotion_and_rollback_lose_no_learning(tmp_path: Path) -> None:
    """After a promotion and a rollback the champion has learned every event once."""

    system = System(make_settings(tmp_path, watch_margin=1.0))
    await system.serve(40)
    champion = system.rollout.roles.members[CHAMPION]
    await system.assign(
        role=CHALLENGER,
        snapshot=await system.version(7, exploration=2.0),
        share=0.5,
    )
    made = await system.serve(40)
    await system.router.promote("because")
    assert system.rollout.label(CHAMPION) == "thompson-v7"
    promoted = await system.serve(40)
    late = Feedback(made[0].id, 0.25, time_s=time.time() + 9)
    assert await system.router.feedback([late]) == ["accepted"]
    await system.router.roll_back("because")
    await system.serve(20)
    assert system.rollout.roles.members == {CHAMPION: champion}
    assert {d.policy_version for d in made} == {"thompson-v0", "thompson-v7"}
    assert {d.policy_version for d in promoted} == {"thompson-v0", "thompson-v7"}
    rebuilt = Learner(
        JournalView(Journal(system.settings.journal), 0, None),
        Rollout(make_settings(tmp_path)).make,
    )
    assert same(rebuilt.policy, system.rollout.roles)


async def test_roles_survive_a_restart(tmp_path: Path) -> None:
    """A restart restores versions, share, policies, regression test and history, and replays later events."""

    system = System(make_settings(tmp_path))
    await system.serve(40)
    version = await system.version(3)
    await system.assign(
        role=CHALLENGER,
        snapshot=replace(version, options={"exploration": 2.0}),
        share=0.25,
    )
    await system.assign(role=SHADOW, snapshot=replace(version, version=4), share=0.0)
    await system.router.promote("because")
    await system.serve(60)
    again = System(system.settings)
    before = system.rollout
    after = again.rollout
    assert after.state() == before.state() and after.summary() == before.summary()
    assert after.watch is not None and after.watch.observations == 60
    for role, policy in before.roles.members.items():
        assert same(policy, after.roles.members[role]), role
    assert after.roles.members[CHAMPION].settings.exploration == 2.0  # type: ignore[attr-defined]
    assert sum(after.summary().shadow.choices.values()) == 60
    await again.router.roll_back("because")
    assert System(system.settings).rollout.label(CHAMPION) == "thompson-v0"


async def test_a_regression_rolls_back_automatically(tmp_path: Path) -> None:
    """A promoted rule that always takes the worse arm is rolled back, across several restarts."""

    system = System(make_settings(tmp_path, watch_share=0.2))
    await system.serve(100)
    version = await system.version(5)
    worse = replace(version, policy="always", options={"arm": "small"}, state={})
    await system.assign(role=CHALLENGER, snapshot=worse, share=0.1)
    await system.router.promote("because")
    served = 0
    while system.rollout.watch is not None and served < 3000:
        served += len(await system.serve(50))
        if served % 100:  # every other restart uses an older snapshot
            await system.learner.save()
        system = System(system.settings, seed=served)
    print(f"rolled back after {served} requests")
    assert served <= 400
    assert (
        system.rollout.label(CHAMPION) == "thompson-v0"
        and not system.rollout.roles.share
    )
    last = [
        change
        for change in system.rollout.summary().history
        if change.what == "rolled back"
    ]
    assert len(last) == 1 and last[0].loser == 5 and "to 1 rolls back" in last[0].reason


async def test_a_promoted_version_without_regression_stays(tmp_path: Path) -> None:
    """When the regression test is over, the promoted version is the only policy."""

    system = System(make_settings(tmp_path, watch_rewards=300))
    await system.serve(200)
    await system.assign(role=CHALLENGER, snapshot=await system.version(2), share=0.1)
    await system.router.promote("because")
    await system.serve(320)
    assert (
        system.rollout.label(CHAMPION) == "thompson-v2" and system.rollout.watch is None
    )
    assert list(system.rollout.roles.members) == [CHAMPION]


async def test_a_decision_counts_once_for_the_regression_test(tmp_path: Path) -> None:
    """Corrected scores, and late scores of earlier decisions, do not count."""

    system = System(make_settings(tmp_path))
    old = await system.serve(20)
    await system.assign(role=CHALLENGER, snapshot=await system.version(2), share=0.1)
    await system.router.promote("because")
    made = await system.serve(10)
    for source in ("user", "judge"):
        now = time.time() + 1
        await system.router.feedback(
            [Feedback(d.id, 0.0, source, now) for d in old + made]
        )
    assert system.rollout.watch is not None and system.rollout.watch.observations == 10


async def test_another_policy_in_the_settings_ends_a_promotion(tmp_path: Path) -> None:
    """Settings with another policy end a promotion; settings with the same policy do not."""

    system = System(make_settings(tmp_path))
    await system.serve(20)
    await system.assign(
        role=CHALLENGER,
        snapshot=await system.version(2, exploration=2.0),
        share=0.1,
    )
    await system.router.promote("because")
    await system.router.configure(make_settings(tmp_path, watch_margin=0.5))
    assert (
        system.rollout.label(CHAMPION) == "thompson-v2"
        and system.rollout.roles.share == 0.2
    )
    await system.router.configure(make_settings(tmp_path, "static"))
    assert system.rollout.label(CHAMPION) == "static-v0" and list(
        system.rollout.roles.members
    ) == [CHAMPION]
    again = System(
        make_settings(tmp_path)
    )  # first arguments of the actor; the ingress then sends the present ones
    await again.router.configure(again.settings)
    assert again.rollout.label(CHAMPION) == "thompson-v0"
    fresh = Learner(
        JournalView(again.learner.journal, 0, None), Rollout(again.settings).make
    )
    assert same(again.rollout.roles, fresh.policy)


async def test_an_impossible_change_of_roles_is_refused(tmp_path: Path) -> None:
    """A refused change raises a ValueError that says why, and leaves the rollout as it was."""

    system = System(make_settings(tmp_path))
    await system.serve(20)
    version = await system.version(2)
    before = system.rollout.state()
    router = system.router
    refused = (
        (lambda: router.promote(""), "there is no challenger"),
        (lambda: router.roll_back(""), "no promotion is being watched"),
        (lambda: router.remove_role(SHADOW, ""), "there is no shadow"),
        (lambda: router.remove_role(CHAMPION, ""), "there is no champion"),
    )
    unsuitable = (
        (replace(version, version=0), "version 0 is the champion"),
        (replace(version, journal=""), "does not say from which rows"),
        (replace(version, policy="oracle"), "unknown policy 'oracle'"),
        (replace(version, state={}), "must have shape"),
    )
    for change, why in refused:
        with pytest.raises(ValueError, match=why):
            await change()
        assert system.rollout.state() == before
    for snapshot, why in unsuitable:
        with pytest.raises(ValueError, match=why):
            await system.assign(SHADOW, snapshot)
        assert system.rollout.state() == before
        assert not system.rollout.roles.buffers
    await system.assign(role=CHALLENGER, snapshot=version, share=0.1)
    await system.router.promote("because")
    with pytest.raises(ValueError, match="the predecessor is the challenger"):
        await system.assign(
            role=CHALLENGER, snapshot=replace(version, version=3), share=0.1
        )


async def test_an_ingress_gets_only_the_champions_state(
    tmp_path: Path,
) -> None:
    """The snapshot for the ingresses contains only the champion, with its label."""

    system = System(make_settings(tmp_path))
    await system.serve(20)
    alone = (await system.router.snapshot()).snapshot
    await system.assign(
        role=SHADOW,
        snapshot=await system.version(2, exploration=2.0),
        share=0.0,
    )
    view = await system.router.snapshot()
    snapshot = view.snapshot
    label = view.policy_version
    assert set(snapshot.state) == set(alone.state) and label == "thompson-v0"
    assert champion_of(system.learner.snapshot()).rollout == {}


async def test_a_new_version_number_goes_to_the_published_champion_only(
    tmp_path: Path,
) -> None:
    """A version promoted during the publication of its predecessor keeps its own number."""

    system = System(make_settings(tmp_path))
    await system.serve(20)
    await system.router.record_published(1, of=0)
    await system.assign(role=CHALLENGER, snapshot=await system.version(5), share=0.1)
    await system.router.promote("because")
    await system.router.record_published(6, of=1)
    assert [system.rollout.label(role) for role in (CHAMPION, CHALLENGER)] == [
        "thompson-v5",
        "thompson-v1",
    ]
    await system.router.record_published(7, of=5)
    assert System(system.settings).rollout.label(CHAMPION) == "thompson-v7"


def test_the_stored_form_of_a_rollout_is_stable(tmp_path: Path) -> None:
    """A rollout restores the state of an earlier release, and stores it again as the same bytes."""
    assignment = {"version": 3, "policy": "thompson", "options": {"exploration": 2.0}}
    watch = RegressionTest(margin=0.02, alpha=0.05, bounds=(-1.0, 1.0))
    watch.observe(0.5)
    watch.observe(0.25, predecessor=True)
    stored = {
        "configured": {"name": "thompson", "options": {}},
        "seats": {
            "champion": assignment,
            "challenger": assignment | {"version": 0, "options": {}},
        },
        "share": 0.2,
        "since": 1.5,
        "borne": ["thompson-v3"],
        "watch": {"margin": 0.02, "alpha": 0.05, "state": watch.state()},
        "history": [
            {"what": "promoted", "role": "champion", "version": 3, "reason": "by ann"},
            {
                "what": "rolled back",
                "role": "champion",
                "version": 2,
                "reason": "it earns less",
                "loser": 3,
            },
        ],
        "rewarded": ["d1", "d2"],
        "shadowed": {"small": 2},
        "agreed": 1,
        "rewards": {
            "all_answers": [["small", "code", 20.0, 1.0]],
            "sample": [],
            "counted": ["d1"],
        },
    }
    snapshot = Snapshot("thompson", ("small", "large"), 2, 3, {}, rollout=stored)
    settings = make_settings(tmp_path)
    assert encode(Rollout(settings, snapshot).state()) == encode(stored)
    later = ("borne", "rewards")
    early = {name: value for name, value in stored.items() if name not in later}
    restored = Rollout(settings, replace(snapshot, rollout=early))
    nothing = {"all_answers": [], "sample": [], "counted": []}
    assert restored.state() == {**stored, "borne": [], "rewards": nothing}
