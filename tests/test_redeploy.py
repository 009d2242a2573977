"""Other settings for actors that live on: they are heeded at once, and still when Ray makes the actors anew."""

import asyncio
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from deployments.router import Router
from deployments.settings import GatewaySettings
from deployments.tracking import Tracker
from policies.types import Decision, Feedback, Objective, Outcome, Request
from tests.fakes import Remote
from tests.helpers import make_profile


def make_settings(folder: Path, *models: str, **options: Any) -> GatewaySettings:
    given = {"models": {name: {} for name in models}, "journal": f"sqlite:///{folder}/journal.db", **options}
    return GatewaySettings.model_validate(given)


def watch(models: Collection[str]) -> dict[str, int]:
    """All that it is asked for are ready."""
    return dict.fromkeys(models, 1)


async def ask(router: Router, model: str) -> Decision:
    """A request that names a model; answered and scored if it got it."""
    objective = Objective(models=(model,))
    request = Request(router._memory.identity.new_id(time.time()), make_profile(), objective, forced=True)
    (decision,) = await router.decide([request], "test", {})
    if decision.arm:
        await router.observe([(decision, Outcome(decision.id, "ok", 0.1, 0.3, 20, 9))], "test", {})
        await router.feedback([Feedback(decision.id, 1.0, time_s=time.time())])
    return decision


def votes(router: Router) -> list[float]:
    return [float(n) for n in router._policy.state()["quality.heard"]]


def test_a_model_that_was_added_is_used(tmp_path: Path) -> None:
    """Its replicas are counted from the next look on."""

    async def play() -> str:
        router = Router(make_settings(tmp_path, "small", "large"), watch)
        await router._look()
        await router.configure(make_settings(tmp_path, "small", "large", "huge"))
        await router._look()
        return (await ask(router, "huge")).arm

    assert asyncio.run(play()) == "huge"


def test_a_router_that_died_comes_back_with_the_settings_of_today(tmp_path: Path) -> None:
    """Ray makes it with the arguments of the first day; what was learned of later models must not be lost by that."""

    async def play() -> tuple[list[str], list[float]]:
        first = make_settings(tmp_path, "small", "large")
        router = Router(first, watch)
        await router.configure(make_settings(tmp_path, "small", "large", "huge", max_mean_cost_usd=0.5))
        for _ in range(20):
            assert (await ask(router, "huge")).arm == "huge"
        again = Router(first, watch)
        assert again._pacer.summary()["max_mean_cost_usd"] == 0.5
        await again._memory.save()  # as the watch does
        await again.configure(make_settings(tmp_path, "small", "large", "huge", max_mean_cost_usd=0.5))
        return [arm.name for arm in again._policy.arms], votes(again)

    arms, heard = asyncio.run(play())
    assert arms == ["small", "large", "huge"] and heard == pytest.approx([20, 20, 20], rel=0.02)


def test_settings_that_are_valid_no_more_give_way(tmp_path: Path) -> None:
    """To those that the actor was made with; kept ones may be of another version of this code."""

    async def play() -> list[str]:
        router = Router(make_settings(tmp_path, "small", "large"), watch)
        router._journal.put_fact("settings", b'{"models": {"small": {"colour": "red"}}}')
        await router._journal.flush()
        return [arm.name for arm in Router(make_settings(tmp_path, "small"), watch)._policy.arms]

    assert asyncio.run(play()) == ["small"]


def test_another_policy_learns_all_though_the_disk_was_full(tmp_path: Path) -> None:
    """The first try fails half-way; what it left must not be taken for what was learned, nor be saved over that."""

    async def play() -> None:
        router = Router(make_settings(tmp_path, "small", "large"), watch)
        for _ in range(30):
            await ask(router, "large")
        before, write = votes(router), router._journal._write
        await router.configure(make_settings(tmp_path, "small", "large", policy={"name": "static"}))

        def full(_: object) -> None:
            raise sa.exc.OperationalError("insert", {}, Exception("disk is full"))

        router._journal._write = full  # type: ignore[method-assign]
        request = Request(router._memory.identity.new_id(time.time()), make_profile(), Objective())
        await router.decide([request], "test", {})
        back = make_settings(tmp_path, "small", "large")
        with pytest.raises(sa.exc.OperationalError):
            await router.configure(back)
        with pytest.raises(sa.exc.OperationalError):
            await router._memory.save()
        router._journal._write = write  # type: ignore[method-assign]
        await router._memory.save()
        for each in (Router(back, watch), router):
            await each.configure(back)
            assert votes(each) == pytest.approx(before, rel=0.02)

    asyncio.run(play())


def test_a_version_of_another_policy_is_not_adopted(tmp_path: Path) -> None:
    """With other options it is taken, but its name is not: the router would bear that of what it is not."""

    async def play() -> list[tuple[bool, str, int]]:
        router = Router(make_settings(tmp_path / "a", "small", "large"), watch)
        for _ in range(20):
            await ask(router, "large")
        version = replace(await router.checkpoint(), version=12)
        found = []
        for name, options in (("static", {}), ("thompson", {"exploration": 2.0}), ("thompson", {})):
            policy = {"name": name, "options": options}
            new = Router(make_settings(tmp_path / f"{name}{len(options)}", "small", "large", policy=policy), watch)
            taken = await new.adopt(version)
            found.append((taken, new._rollout.label("champion"), (await new.summary())["decisions"]))
        return found

    assert asyncio.run(play()) == [(False, "static-v0", 0), (True, "thompson-v0", 20), (True, "thompson-v12", 20)]


def test_the_tracker_takes_the_settings_of_today(tmp_path: Path, mlflow_uri: str) -> None:
    """From the router, at its next turn; also one that was made when there was no MLflow."""

    async def play() -> tuple[Tracker, str]:
        router = Router(make_settings(tmp_path, "small", "large"), watch)
        tracker = Tracker(make_settings(tmp_path, "small", "large"), Remote(router), 0.0)
        assert not await tracker.start()
        uri = {"mlflow_uri": mlflow_uri, "experiment": "test"}
        await router.configure(make_settings(tmp_path, "small", "large", "huge", **uri))
        assert await tracker.start()
        await tracker._track()
        first = tracker._run_id
        await router.configure(make_settings(tmp_path, "small", "huge", **uri))
        await tracker._heed()
        await tracker._track()
        return tracker, first

    tracker, first = asyncio.run(play())
    assert [arm.name for arm in tracker._promotions._evaluator._arms] == ["small", "huge"]
    assert tracker._run_id == first
