"""Changed settings: running actors use them at once, and still after Ray has restarted the actors."""

import asyncio
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient

from deployments.router.actor import Router
from deployments.settings import GatewaySettings
from deployments.tracking.tracker import Tracker
from policies.events import Decision, Feedback, Outcome
from policies.types import Objective, Request
from tests.support.fakes import Remote
from tests.support.requests import make_profile


def make_settings(folder: Path, *models: str, **options: Any) -> GatewaySettings:
    given = {
        "models": {name: {} for name in models},
        "journal": f"sqlite:///{folder}/journal.db",
        **options,
    }
    return GatewaySettings.model_validate(given)


def count_replicas(models: Collection[str]) -> dict[str, int]:
    """Every model has one ready replica."""
    return dict.fromkeys(models, 1)


async def ask(router: Router, model: str) -> Decision:
    """Send a request that names a model; if the model is chosen, add an outcome and a score."""
    objective = Objective(models=(model,))
    request = Request(
        router._learner.ids.new_id(time.time()),
        make_profile(),
        objective,
        forced=True,
    )
    (decision,) = await router.decide([request], "test", {})
    if decision.arm:
        await router.observe(
            [(decision, Outcome(decision.id, "ok", 0.1, 0.3, 20, 9))], "test", {}
        )
        await router.feedback([Feedback(decision.id, 1.0, time_s=time.time())])
    return decision


def votes(router: Router) -> list[float]:
    return [float(n) for n in router._policy.state()["quality.heard"]]


def test_an_added_model_is_used(tmp_path: Path) -> None:
    """The router counts the replicas of an added model at its next maintenance."""

    async def play() -> str:
        router = Router(make_settings(tmp_path, "small", "large"), count_replicas)
        await router._maintain()
        await router.configure(make_settings(tmp_path, "small", "large", "huge"))
        await router._maintain()
        return (await ask(router, "huge")).arm

    assert asyncio.run(play()) == "huge"


def test_a_restarted_router_uses_the_latest_settings(
    tmp_path: Path,
) -> None:
    """Ray restarts the router with its first arguments; it must keep what it learned about later models."""

    async def play() -> tuple[list[str], list[float]]:
        first = make_settings(tmp_path, "small", "large")
        router = Router(first, count_replicas)
        await router.configure(
            make_settings(tmp_path, "small", "large", "huge", max_mean_cost_usd=0.5)
        )
        for _ in range(20):
            assert (await ask(router, "huge")).arm == "huge"
        again = Router(first, count_replicas)
        assert again._projections.pacer.summary()["max_mean_cost_usd"] == 0.5
        await again._learner.save()  # as the maintenance does
        await again.configure(
            make_settings(tmp_path, "small", "large", "huge", max_mean_cost_usd=0.5)
        )
        return [arm.name for arm in again._policy.arms], votes(again)

    arms, heard = asyncio.run(play())
    assert arms == ["small", "large", "huge"] and heard == pytest.approx(
        [20, 20, 20], rel=0.02
    )


def test_stored_settings_that_are_invalid_are_ignored(tmp_path: Path) -> None:
    """A router ignores stored settings of another release if they are invalid, and uses its arguments."""

    async def play() -> list[str]:
        router = Router(make_settings(tmp_path, "small", "large"), count_replicas)
        router._journal.put_metadata(
            "settings", b'{"models": {"small": {"colour": "red"}}}'
        )
        await router._journal.flush()
        return [
            arm.name
            for arm in Router(
                make_settings(tmp_path, "small"), count_replicas
            )._policy.arms
        ]

    assert asyncio.run(play()) == ["small"]


def test_a_policy_change_succeeds_after_the_disk_was_full(tmp_path: Path) -> None:
    """The first policy change fails half-way; its incomplete state is neither used nor saved."""

    async def play() -> None:
        router = Router(make_settings(tmp_path, "small", "large"), count_replicas)
        for _ in range(30):
            await ask(router, "large")
        before = votes(router)
        write = router._journal._write
        await router.configure(
            make_settings(tmp_path, "small", "large", policy={"name": "static"})
        )

        def full(_: object) -> None:
            raise sa.exc.OperationalError("insert", {}, Exception("disk is full"))

        router._journal._write = full  # type: ignore[method-assign]
        request = Request(
            router._learner.ids.new_id(time.time()), make_profile(), Objective()
        )
        await router.decide([request], "test", {})
        back = make_settings(tmp_path, "small", "large")
        with pytest.raises(sa.exc.OperationalError):
            await router.configure(back)
        with pytest.raises(sa.exc.OperationalError):
            await router._learner.save()
        router._journal._write = write  # type: ignore[method-assign]
        await router._learner.save()
        for each in (Router(back, count_replicas), router):
            await each.configure(back)
            assert votes(each) == pytest.approx(before, rel=0.02)

    asyncio.run(play())


def test_a_version_of_another_policy_is_not_adopted(tmp_path: Path) -> None:
    """A version with other options gives its learned state, but the router does not take its version number."""

    async def play() -> list[tuple[bool, str, int]]:
        router = Router(make_settings(tmp_path / "a", "small", "large"), count_replicas)
        for _ in range(20):
            await ask(router, "large")
        version = replace(await router.checkpoint(), version=12)
        found = []
        for name, options in (
            ("static", {}),
            ("thompson", {"exploration": 2.0}),
            ("thompson", {}),
        ):
            policy = {"name": name, "options": options}
            new = Router(
                make_settings(
                    tmp_path / f"{name}{len(options)}", "small", "large", policy=policy
                ),
                count_replicas,
            )
            taken = await new.adopt(version)
            found.append(
                (
                    taken,
                    new._rollout.label("champion"),
                    (await new.summary()).decisions,
                )
            )
        return found

    assert asyncio.run(play()) == [
        (False, "static-v0", 0),
        (True, "thompson-v0", 20),
        (True, "thompson-v12", 20),
    ]


def test_the_tracker_takes_over_changed_settings(
    tmp_path: Path, mlflow_uri: str
) -> None:
    """A tracker asks the router for the settings at its next turn, even if it was created without MLflow."""

    async def play() -> tuple[Tracker, str]:
        router = Router(make_settings(tmp_path, "small", "large"), count_replicas)
        tracker = Tracker(
            make_settings(tmp_path, "small", "large"), Remote(router), 0.0
        )
        assert not await tracker.start()
        uri = {"mlflow_uri": mlflow_uri, "experiment": "test"}
        await router.configure(make_settings(tmp_path, "small", "large", "huge", **uri))
        assert await tracker.start()
        await tracker._track()
        first = tracker._run_id
        await router.configure(make_settings(tmp_path, "small", "huge", **uri))
        await tracker._refresh_settings()
        await tracker._track()
        return tracker, first

    tracker, first = asyncio.run(play())
    assert [arm.name for arm in tracker._promotions._evaluator._arms] == [
        "small",
        "huge",
    ]
    # the parameters of a run never change, so other models begin another one
    assert tracker._run_id != first
    client = MlflowClient(mlflow_uri, mlflow_uri)
    states = [client.get_run(run).info.status for run in (first, tracker._run_id)]
    assert states == ["FINISHED", "RUNNING"]


def test_an_added_variant_begins_with_what_was_learned_of_its_model(
    tmp_path: Path,
) -> None:
    """Discounted to `inherited_events`. It has its model's replicas, and a removed one leaves the model as it was."""
    variants = {"large-direct": {"chat_template_kwargs": {"enable_thinking": False}}}
    with_variant = {"small": {}, "large": {"inherited_events": 3, "variants": variants}}
    without = {"small": {}, "large": {"inherited_events": 3}}

    def counts(router: Router) -> list[float]:
        return [float(n) for n in router._policy.state()["quality.count"]]

    async def play() -> list[list[float]]:
        router = Router(make_settings(tmp_path, models=without), count_replicas)
        await router._maintain()
        for _ in range(20):
            await ask(router, "large")
        found = [counts(router)]
        await router.configure(make_settings(tmp_path, models=with_variant))
        await router._maintain()
        states = router._arm_stats.states()
        assert states["large-direct"].replicas == states["large"].replicas == 1
        found.append(counts(router))
        assert (await ask(router, "large-direct")).arm == "large-direct"
        await router.configure(make_settings(tmp_path, models=without))
        found.append(counts(router))
        return found

    before, added, removed = asyncio.run(play())
    assert before[0] == 0 and before[1] == pytest.approx(20, rel=0.05)
    assert added[1] == pytest.approx(before[1]) == removed[1]
    assert added[2] == pytest.approx(3, rel=0.05)
