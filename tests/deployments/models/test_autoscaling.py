"""Tests of the autoscaling policy with Ray's own context and state of a deployment, without a cluster."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from deployments.models.autoscaling import DemandPolicy

PATH = "deployments.models.autoscaling:DemandPolicy"
HERE = DeploymentID(name="Model:large", app_name="large")


class FakeRouter:
    """A router actor's handle; `demand` is what it answers, or raises."""

    def __init__(self, demand: Any = 0.0):
        self.answer = demand
        self.asked = 0
        self.told: list[bool] = []
        self.demand = self

    def remote(self, model: str, leaves: bool) -> Awaitable[float]:
        self.asked += 1
        self.told.append(leaves)
        assert model == "large"

        async def reply() -> float:
            if isinstance(self.answer, Exception):
                raise self.answer
            if self.answer == "never":
                await asyncio.sleep(3600)
            return self.answer

        return reply()


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> FakeRouter:
    fake = FakeRouter()

    def get_actor(name: str, namespace: str) -> FakeRouter:
        assert (name, namespace) == ("router", "router")
        if isinstance(fake.answer, Exception):
            raise fake.answer
        return fake

    monkeypatch.setattr(ray, "get_actor", get_actor)
    return fake


def state_of(running: int = 0, **options: Any) -> DeploymentAutoscalingState:
    """Ray's state of a deployment whose configuration names the policy, as serve_config.yaml does."""
    config = AutoscalingConfig(
        **{
            "min_replicas": 0,
            "max_replicas": 4,
            "target_ongoing_requests": 24,
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "policy": {
                "policy_function": PATH,
                "policy_kwargs": {"every_s": 0, "notice_s": 0},
            },
            **options,
        }
    )
    info = DeploymentInfo(
        deployment_config=DeploymentConfig(autoscaling_config=config),
        replica_config=ReplicaConfig.create(lambda: None),
        start_time_ms=0,
        deployer_job_id="",
    )
    state = DeploymentAutoscalingState(HERE)
    state.register(info, running)
    state.update_running_replica_ids(
        [ReplicaID(f"r{n}", deployment_id=HERE) for n in range(running)]
    )
    return state


def decided(state: DeploymentAutoscalingState, target: int, rounds: int = 3) -> int:
    """The number of replicas after some rounds of the controller's loop."""

    async def loop() -> int:
        for _ in range(rounds):
            number = state.get_decision_num_replicas(target)
            await asyncio.sleep(0.02)
        return number

    return asyncio.run(loop())


def with_requests(
    state: DeploymentAutoscalingState, number: float, patch: pytest.MonkeyPatch
) -> DeploymentAutoscalingState:
    patch.setattr(state, "get_total_num_requests", lambda: number)
    return state


def test_a_size_at_zero_is_started_without_a_request(router: FakeRouter) -> None:
    """Any demand of a size without replicas gives one at once, whatever the delay."""
    router.answer = 0.01
    assert decided(state_of(upscale_delay_s=30), 0) == 1


def test_two_replicas_are_wanted_at_once(router: FakeRouter) -> None:
    """As many as the demand fills."""
    router.answer = 30.0
    assert decided(state_of(upscale_delay_s=30), 0) == 2


def test_the_bounds_hold(router: FakeRouter) -> None:
    """Serve's own maximum stays above the wish."""
    router.answer = 1e6
    assert decided(state_of(), 0) == 4


def test_without_demand_a_size_stays_at_zero_and_returns_to_it(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wish is 0, as of Serve's own rule."""
    assert decided(state_of(), 0) == 0
    assert decided(with_requests(state_of(1), 0.0, monkeypatch), 1) == 0


def test_a_replica_that_starts_is_kept(router: FakeRouter) -> None:
    """The demand may fade before the replica is ready; Serve's own rule keeps it, too."""
    assert decided(state_of(), 1) == 1


@pytest.mark.parametrize("requests", [0.0, 5.0, 24.0, 25.0, 60.0, 500.0])
def test_without_demand_it_is_serves_own_rule(
    requests: float, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number as the default policy, for any number of requests."""
    numbers = [
        decided(with_requests(state, requests, monkeypatch), 2)
        for state in (state_of(2), state_of(2, policy=AutoscalingPolicy()))
    ]
    assert numbers[0] == numbers[1]


def test_the_demand_is_added_to_the_requests(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is counterfactual, so no request counts twice."""
    router.answer = 10.0
    assert decided(with_requests(state_of(1), 20.0, monkeypatch), 1) == 2
    assert decided(with_requests(state_of(1), 14.0, monkeypatch), 1) == 1


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("dead"),
        ValueError("Failed to look up actor"),
        "never",
        float("nan"),
        float("inf"),
        "much",
        None,
        float("-inf"),
    ],
)
def test_a_router_that_is_dead_silent_or_wrong_changes_nothing(
    answer: Any, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an exception nor a wait reaches the controller; the figure is Serve's own."""
    router.answer = answer
    state = with_requests(state_of(1), 30.0, monkeypatch)
    began = time.monotonic()
    assert decided(state, 1) == 2
    assert time.monotonic() - began < 5.0
    assert decided(with_requests(state_of(1), 0.0, monkeypatch), 1) == 0


def test_a_last_replica_that_is_not_worth_its_price_stops(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests in flight do not keep it, and the bounds hold; without the router it is Serve's own rule again."""
    router.answer = -1.0
    assert decided(with_requests(state_of(1), 20.0, monkeypatch), 1) == 0
    bounded = state_of(1, min_replicas=1)
    assert decided(with_requests(bounded, 20.0, monkeypatch), 1) == 1
    assert not any(router.told[-2:])
    router.answer = RuntimeError("killed")
    assert decided(with_requests(state_of(1), 20.0, monkeypatch), 1) == 1


def test_of_several_replicas_none_stops_for_the_price(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve's own figure is for them; a model at zero stays there."""
    router.answer = -1.0
    assert decided(with_requests(state_of(2), 40.0, monkeypatch), 2) == 2
    assert decided(state_of(0), 0) == 0


def test_a_last_replica_that_is_worth_its_price_is_kept(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a request too; the wish is for one replica, and not for one more request."""
    router.answer = 0.01
    assert decided(with_requests(state_of(1), 0.0, monkeypatch), 1) == 1
    assert decided(with_requests(state_of(1), 24.0, monkeypatch), 1) == 1
    assert decided(with_requests(state_of(2), 48.0, monkeypatch), 2) == 2


@pytest.mark.parametrize("delay_s", [300.0, 0.0])
def test_the_router_knows_some_seconds_before_the_last_replica_stops(
    delay_s: float, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no request is on its way to a model without replicas; a delay shorter than the notice is extended."""
    policy = DemandPolicy(every_s=0)
    state = with_requests(
        state_of(1, downscale_to_zero_delay_s=delay_s), 3.0, monkeypatch
    )
    router.answer = -1.0

    async def steps() -> None:
        async def wish() -> float:
            for _ in range(4):
                number = policy(state.get_autoscaling_context(1))[0]
                await asyncio.sleep(0.02)
            return number

        assert (await wish() > 0.0) == (delay_s == 0.0)
        assert router.told[-1] == (delay_s == 0.0)
        policy._spare_s -= max(delay_s - 5.0, 11.0)
        assert await wish() == 0.0
        assert router.told[-1]
        router.answer = 0.0
        assert await wish() > 0.0
        assert not router.told[-1]

    on_one_loop(steps)


def on_one_loop(steps: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(steps())  # type: ignore[arg-type]


def test_the_demand_survives_a_short_absence_of_the_router_and_then_fades(
    router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last answer counts for `stale_s`; a router that is back is found again."""
    policy = DemandPolicy(every_s=0, stale_s=0.3)
    state = state_of(0)
    state._policy = policy

    async def steps() -> None:
        async def wish() -> float:
            for _ in range(4):
                ctx = state.get_autoscaling_context(0)
                number = policy(ctx)[0]
                await asyncio.sleep(0.02)
            return number

        router.answer = 48.0
        assert await wish() == 2.0
        router.answer = RuntimeError("killed")
        assert await wish() == 2.0
        await asyncio.sleep(0.4)
        assert await wish() == 0.0
        router.answer = 24.0
        assert await wish() == 1.0

    on_one_loop(steps)


def test_the_router_is_asked_at_most_once_in_a_while(router: FakeRouter) -> None:
    """Ten calls a second are no ten questions, and an open question is not asked again."""
    often = DemandPolicy(every_s=3600)
    slow = DemandPolicy(every_s=0)
    state = state_of(0)

    async def calls(policy: DemandPolicy) -> int:
        before = router.asked
        for _ in range(20):
            policy(state.get_autoscaling_context(0))
            await asyncio.sleep(0.005)
        return router.asked - before

    async def steps() -> None:
        assert await calls(often) == 1
        router.answer = "never"
        assert await calls(slow) == 1

    on_one_loop(steps)


def test_it_is_sent_to_the_controller_without_this_project() -> None:
    """Serve pickles the class by value; its module must not name another one of the project."""
    policy = AutoscalingPolicy(policy_function=PATH)
    body = policy.get_serialized_policy_def()
    assert body is not None and b"deployments.settings" not in body
    made = cloudpickle.loads(body)()
    ctx = state_of(1).get_autoscaling_context(1)
    assert made(ctx) == (0.0, {})  # and without an event loop
    module = __import__("deployments.models.autoscaling", fromlist=["x"])
    assert not [
        name
        for name, value in vars(module).items()
        if str(getattr(value, "__module__", "")).startswith(("deployments", "policies"))
        and name != "DemandPolicy"
    ]


def test_a_broken_context_raises_nothing(router: FakeRouter) -> None:
    """An exception would stop the controller's update of the other applications."""
    ctx = state_of(1).get_autoscaling_context(1)
    ctx.config = None
    assert DemandPolicy()(ctx) == (1, {})
