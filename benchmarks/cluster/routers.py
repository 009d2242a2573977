"""The product's policy and its peers by name, each prepared with the same calibration prompts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster.hardware import Size
from benchmarks.cluster.peers import (
    ONLINE,
    PRESETS,
    Hindsight,
    LeastLoaded,
    LiveRule,
    NearestPrompts,
    Neighbours,
    OnlineLearner,
    RouteBalance,
    preset_name,
)
from benchmarks.cluster.simulation import arms_of
from benchmarks.cluster.workload import Workload
from benchmarks.decisions.streams import Portfolio
from policies.base import Policy
from policies.events import CALIBRATION, Decision, Outcome
from policies.registry import make_policy, rearm
from policies.types import Objective, Vector

OURS = "thompson"
COLD = "thompson, uncalibrated"
UNPRICED = "thompson, no price"
FIXED = "always "  # before the name of a size


@dataclass(frozen=True)
class World:
    """What a router may be prepared with.

    rate: requests a second. calibration: numbers of prompts in the portfolio that no request has.
    """

    sizes: tuple[Size, ...]
    portfolio: Portfolio
    load: Workload
    objective: Objective
    rate: float
    calibration: NDArray[np.int64]
    seed: int

    @property
    def cost(self) -> Vector:
        """[K] cost of an answer, as a share of the dearest size's."""
        return self.portfolio.cost

    @property
    def answer_tokens(self) -> Vector:
        """[K] mean length of the answers."""
        return np.asarray(self.load.answers.mean(0))


def names(world: World) -> list[str]:
    """All routers, the product's policy first."""
    fixed = [FIXED + size.name for size in world.sizes]
    balanced = [preset_name(preset) for preset in PRESETS]
    rules = ["static", "uniform", "least loaded", "nearest prompts", *balanced]
    return [OURS, UNPRICED, COLD, *fixed, *rules, *ONLINE, "hindsight"]


def make(name: str, world: World) -> Policy:
    """A router that has learned from the calibration prompts only.

    Raises:
        ValueError: no router has this name.
    """
    arms = arms_of(world.sizes, world.cost, world.answer_tokens)
    weight = world.objective.cost_weight
    if name in (OURS, UNPRICED, COLD):
        policy = make_policy("thompson", arms)
        if name != COLD:
            _calibrate(policy, world)
        return policy
    if name.startswith(FIXED):
        return make_policy("always", arms)
    if name in ("static", "uniform"):
        return make_policy(name, arms)
    if name == "least loaded":
        return LeastLoaded(arms, world.cost, world.sizes)
    if name == "nearest prompts":
        return NearestPrompts(arms, world.cost, _neighbours(world), weight)
    if name.startswith("routebalance "):
        preset = name.partition(" ")[2]
        return RouteBalance(arms, world.cost, world.sizes, _neighbours(world), preset)
    if name in ONLINE:
        dims = world.portfolio.features.shape[1]
        # these learners take an arm's price of an output token as its cost
        priced = [
            replace(arm, output_price_usd=cost)
            for arm, cost in zip(arms, world.cost.tolist(), strict=True)
        ]
        learner = ONLINE[name](priced, weight, dims, world.seed)
        for row in world.calibration:
            x = world.portfolio.profiles[row].features
            for k, score in enumerate(world.portfolio.scores[row].tolist()):
                learner.update(x, k, score)
        return OnlineLearner(arms, world.cost, world.sizes, learner)
    if name == "hindsight":
        return Hindsight(
            arms, world.cost, world.sizes, world.load, world.rate, world.objective
        )
    raise ValueError(
        f"unknown router '{name}'; choose one of: {', '.join(names(world))}"
    )


def reprice(world: World) -> Callable[[Policy, Vector], Policy]:
    """A change of a router's costs [K]."""

    def changed(router: Policy, cost: Vector) -> Policy:
        if isinstance(router, OnlineLearner):
            router.learner.reprice(cost)
        if isinstance(router, LiveRule):
            router.cost = cost
            return router
        arms = arms_of(world.sizes, cost, world.answer_tokens)
        return rearm(router, arms)

    return changed


def _neighbours(world: World) -> Neighbours:
    rows = world.calibration
    tokens = np.tile(world.answer_tokens, (len(rows), 1))
    lengths = world.portfolio.output_tokens[rows]
    if np.isfinite(lengths).all():
        tokens = lengths / np.maximum(lengths.mean(0), 1.0) * world.answer_tokens
    return Neighbours(
        world.portfolio.features[rows], world.portfolio.scores[rows], tokens
    )


def _calibrate(policy: Policy, world: World) -> None:
    """Give the policy each size's answers to the calibration prompts, made while its replicas were idle."""
    for row in world.calibration:
        profile = world.portfolio.profiles[row]
        for k, size in enumerate(world.sizes):
            tokens = float(world.answer_tokens[k])
            first, whole = size.engine.alone_s(float(profile.prompt_tokens), tokens)
            name = f"c{row} {size.name}"
            decision = Decision(
                name, size.name, 0, CALIBRATION, profile, Objective(), scored=0
            )
            outcome = Outcome(
                name,
                ttft_s=first,
                latency_s=whole,
                prompt_tokens=profile.prompt_tokens,
                output_tokens=int(tokens),
                streamed=True,
            )
            policy.learn(decision, outcome)
            policy.score(decision, float(world.portfolio.scores[row, k]))
