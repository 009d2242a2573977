"""Roles in a running router: a swap loses no learning, a restart changes nothing, a regression is rolled back."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.journal import Journal
from deployments.memory import Memory
from deployments.rollout import Rollout, champion_of
from deployments.router import Router
from deployments.seating import Branch, operate
from deployments.settings import GatewaySettings
from deployments.snapshot import Snapshot
from policies.roles import CHALLENGER, CHAMPION, SHADOW
from policies.types import Decision, Feedback, Objective, Outcome, Request
from tests.helpers import make_profile

BETTER: Callable[[Decision], float] = lambda d: float(d.arm == "large")  # noqa: E731


def make_settings(folder: Path, policy: str = "thompson", **options: Any) -> GatewaySettings:
    return GatewaySettings.model_validate(
        {
            "models": {"small": {}, "large": {}},
            "policy": {"name": policy},
            "journal": f"sqlite:///{folder}/journal.db",
            "rollout": options,
        }
    )


class System:
    """A router without Ray, and requests for it."""

    def __init__(self, settings: GatewaySettings, seed: int = 0):
        self.settings, self.rng = settings, np.random.default_rng(seed)
        self.router = Router(settings, lambda _: {})
        self.router._rng = np.random.default_rng(seed)

    @property
    def memory(self) -> Memory:
        return self.router._memory

    @property
    def rollout(self) -> Rollout:
        return self.router._rollout

    async def serve(self, count: int, score: Callable[[Decision], float] = BETTER) -> list[Decision]:
        """Requests one after the other, in batches of ten; each with its outcome and a score."""
        made: list[Decision] = []
        while len(made) < count:
            now = time.time()
            ids = [self.memory.identity.new_id(now) for _ in range(min(10, count - len(made)))]
            batch = [Request(i, make_profile(f"What is {self.rng.integers(99)}?"), Objective()) for i in ids]
            decisions = await self.router.decide(batch, "test", {})
            await self.router.observe([(d, Outcome(d.id, "ok", 0.1, 0.3, 20, 9)) for d in decisions], "test", {})
            assert set(await self.router.feedback([Feedback(d.id, score(d), time_s=now) for d in decisions])) == {
                "accepted"
            }
            made += decisions
        return made

    async def change(self, verb: str, **options: Any) -> Any:
        return await self.router.rollout(verb, "because", options)

    async def version(self, number: int, **options: Any) -> Snapshot:
        """As the registry would give it back; with other options of its policy."""
        return replace(await self.router.checkpoint(), version=number, options=options)


def same(one: Any, another: Any) -> bool:
    for policy in (one, another):
        policy.advance(100_000)
    mine, theirs = one.state(), another.state()
    return set(mine) == set(theirs) and all(np.allclose(mine[k], v, rtol=1e-9, atol=1e-9) for k, v in theirs.items())


def test_a_version_that_gets_a_role_has_learned_all_that_came_since_it_was_made(tmp_path: Path) -> None:
    """Also what comes while it is caught up; each event once: it equals the champion, that learned all along."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(60)
        old = await system.version(1)
        made = await system.serve(90)
        corrections = [Feedback(d.id, 0.5, time_s=time.time() + 5) for d in made]
        seating = asyncio.create_task(system.change("seat", role=SHADOW, snapshot=old, share=0.0))
        await asyncio.sleep(0)
        await system.router.feedback(corrections)
        await system.serve(50)
        await seating
        await system.serve(20)
        members = system.rollout.roles.members
        assert same(members[CHAMPION], members[SHADOW])

    asyncio.run(scenario())


def test_promotion_and_rollback_lose_no_learning(tmp_path: Path) -> None:
    """After there and back again the champion is what it would have been without."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path, watch_margin=1.0))
        await system.serve(40)
        champion = system.rollout.roles.members[CHAMPION]
        await system.change("seat", role=CHALLENGER, snapshot=await system.version(7, exploration=2.0), share=0.5)
        made = await system.serve(40)
        await system.change("promote")
        assert system.rollout.label(CHAMPION) == "thompson-v7"
        promoted = await system.serve(40)
        late = Feedback(made[0].id, 0.25, time_s=time.time() + 9)
        assert await system.router.feedback([late]) == ["accepted"]
        await system.change("rollback")
        await system.serve(20)
        assert system.rollout.roles.members == {CHAMPION: champion}
        assert {d.policy_version for d in made} == {"thompson-v0", "thompson-v7"}
        assert {d.policy_version for d in promoted} == {"thompson-v0", "thompson-v7"}
        rebuilt = Memory(Branch(Journal(system.settings.journal), 0, None), Rollout(make_settings(tmp_path)).make)
        assert same(rebuilt.policy, system.rollout.roles)

    asyncio.run(scenario())


def test_roles_survive_a_restart(tmp_path: Path) -> None:
    """Versions, share, states, the watch and the history; events after the last snapshot are folded into all."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(40)
        version = await system.version(3)
        await system.change(
            "seat", role=CHALLENGER, snapshot=replace(version, options={"exploration": 2.0}), share=0.25
        )
        await system.change("seat", role=SHADOW, snapshot=replace(version, version=4), share=0.0)
        await system.change("promote")
        await system.serve(60)
        again = System(system.settings)
        before, after = system.rollout, again.rollout
        assert after.state() == before.state() and after.summary() == before.summary()
        assert after.watch is not None and after.watch.observations == 60
        for role, policy in before.roles.members.items():
            assert same(policy, after.roles.members[role]), role
        assert after.roles.members[CHAMPION].settings.exploration == 2.0  # type: ignore[attr-defined]
        assert sum(after.summary()["shadow"]["choices"].values()) == 60
        await again.change("rollback")
        assert System(system.settings).rollout.label(CHAMPION) == "thompson-v0"

    asyncio.run(scenario())


def test_a_regression_is_rolled_back_by_itself(tmp_path: Path) -> None:
    """The promoted rule always takes the arm that is worse; nobody looks, and a restart comes in between."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path, watch_share=0.2))
        await system.serve(100)
        version = await system.version(5)
        worse = replace(version, policy="always", options={"arm": "small"}, state={})
        await system.change("seat", role=CHALLENGER, snapshot=worse, share=0.1)
        await system.change("promote")
        served = 0
        while system.rollout.watch is not None and served < 3000:
            served += len(await system.serve(50))
            if served % 100:  # and every other time the snapshot is from before
                await system.memory.save()
            system = System(system.settings, seed=served)
        print(f"rolled back after {served} requests")
        assert served <= 400
        assert system.rollout.label(CHAMPION) == "thompson-v0" and not system.rollout.roles.share
        last = [change for change in system.rollout.summary()["history"] if change["what"] == "rolled back"]
        assert len(last) == 1 and last[0]["loser"] == 5 and "to 1 rolls back" in last[0]["reason"]

    asyncio.run(scenario())


def test_a_promoted_version_that_is_as_good_stays(tmp_path: Path) -> None:
    """Until the watch is over, then alone."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path, watch_rewards=300))
        await system.serve(200)
        await system.change("seat", role=CHALLENGER, snapshot=await system.version(2), share=0.1)
        await system.change("promote")
        await system.serve(320)
        assert system.rollout.label(CHAMPION) == "thompson-v2" and system.rollout.watch is None
        assert list(system.rollout.roles.members) == [CHAMPION]

    asyncio.run(scenario())


def test_a_decision_counts_once_for_the_watch(tmp_path: Path) -> None:
    """However often its score is corrected, and whatever the old champion's late scores say."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path))
        old = await system.serve(20)
        await system.change("seat", role=CHALLENGER, snapshot=await system.version(2), share=0.1)
        await system.change("promote")
        made = await system.serve(10)
        for source in ("user", "judge"):
            now = time.time() + 1
            await system.router.feedback([Feedback(d.id, 0.0, source, now) for d in old + made])
        assert system.rollout.watch is not None and system.rollout.watch.observations == 10

    asyncio.run(scenario())


def test_another_policy_in_the_settings_ends_what_was_promoted(tmp_path: Path) -> None:
    """The operator's file has the last word; the same file has none."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(20)
        await system.change("seat", role=CHALLENGER, snapshot=await system.version(2, exploration=2.0), share=0.1)
        await system.change("promote")
        await system.router.configure(make_settings(tmp_path, watch_margin=0.5))
        assert system.rollout.label(CHAMPION) == "thompson-v2" and system.rollout.roles.share == 0.2
        await system.router.configure(make_settings(tmp_path, "static"))
        assert system.rollout.label(CHAMPION) == "static-v0" and list(system.rollout.roles.members) == [CHAMPION]
        again = System(make_settings(tmp_path))  # as it was made; the ingress then says what the file says now
        await again.router.configure(again.settings)
        assert again.rollout.label(CHAMPION) == "thompson-v0"
        fresh = Memory(Branch(again.memory.journal, 0, None), Rollout(again.settings).make)
        assert same(again.rollout.roles, fresh.policy)

    asyncio.run(scenario())


def test_what_cannot_be_done_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """In words that say what would help."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(20)
        version, before = await system.version(2), system.rollout.state()
        for verb, options, why in (
            ("promote", {}, "there is no challenger"),
            ("rollback", {}, "no promotion is being watched"),
            ("vacate", {"role": SHADOW}, "there is no shadow"),
            ("elect", {}, "unknown verb 'elect'"),
            ("seat", {"snapshot": replace(version, version=0)}, "version 0 is the champion"),
            ("seat", {"snapshot": replace(version, journal="")}, "does not say from which rows"),
            ("seat", {"snapshot": replace(version, policy="oracle")}, "unknown policy 'oracle'"),
            ("seat", {"snapshot": replace(version, state={})}, "must have shape"),
        ):
            given = {"role": SHADOW, "share": 0.0, **options} if verb == "seat" else options
            with pytest.raises(ValueError, match=why):
                await system.change(verb, **given)
            assert system.rollout.state() == before and not system.rollout.roles.recorders
        await system.change("seat", role=CHALLENGER, snapshot=version, share=0.1)
        await system.change("promote")
        with pytest.raises(ValueError, match="the predecessor is the challenger"):
            await system.change("seat", role=CHALLENGER, snapshot=replace(version, version=3), share=0.1)

    asyncio.run(scenario())


def test_the_way_in_decides_like_the_champion_and_gets_nobody_elses_state(tmp_path: Path) -> None:
    """What every ingress fetches every other second is the champion alone, and says what policy it is."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(20)
        alone = (await system.router.snapshot())[0]
        await system.change("seat", role=SHADOW, snapshot=await system.version(2, exploration=2.0), share=0.0)
        snapshot, _, label = await system.router.snapshot()
        assert set(snapshot.state) == set(alone.state) and label == "thompson-v0"
        assert champion_of(system.memory.snapshot()).rollout == {}

    asyncio.run(scenario())


def test_a_version_s_number_lands_on_its_own_champion_only(tmp_path: Path) -> None:
    """Published while another was promoted: the newcomer keeps its number."""

    async def scenario() -> None:
        system = System(make_settings(tmp_path))
        await system.serve(20)
        await system.change("published", version=1, of=0)
        await system.change("seat", role=CHALLENGER, snapshot=await system.version(5), share=0.1)
        await system.change("promote")
        await system.change("published", version=6, of=1)
        assert [system.rollout.label(role) for role in (CHAMPION, CHALLENGER)] == ["thompson-v5", "thompson-v1"]
        await system.change("published", version=7, of=5)
        assert System(system.settings).rollout.label(CHAMPION) == "thompson-v7"

    asyncio.run(scenario())


def test_only_the_verbs_there_are(tmp_path: Path) -> None:
    """An operator's typo is told what there is."""
    system = System(make_settings(tmp_path))
    with pytest.raises(ValueError, match="choose one of: seat, vacate, promote, rollback"):
        asyncio.run(operate(system.memory, system.rollout, "demote", ""))
