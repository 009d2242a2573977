"""Routers beside the product's policy; all use the same admission and the same choice of a replica.

- a fixed size: every request names it.
- least loaded: the size with the smallest share of its slots in use.
- nearest prompts: the quality of the nearest calibration prompts, less cost; blind to the load.
- RouteBalance's published rule: quality and length from the nearest prompts, trained offline; latency priced at the
  choice of the size. Its three presets weigh the normalised terms, and sizes that would miss the limits on the first
  token and on the pace are left out where another one remains.
- online learners (`ONLINE`): ACQB's rule, which is Thompson sampling with decaying forced exploration, and five peers
  of benchmarks/decisions. A choice without a free slot goes to the size with the shortest queue.
- hindsight: knows all scores, lengths and the prices of a linear programme.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from benchmarks.cluster.capacity import scarcity, work
from benchmarks.cluster.hardware import Size
from benchmarks.cluster.workload import Workload
from benchmarks.decisions.peers import (
    ClusterMeans,
    EpsilonGreedy,
    ForcedExploration,
    LinUCB,
    ParetoBandit,
    Peer,
)
from benchmarks.decisions.peers import NearestPrompts as NearestScores
from policies.baselines import Static
from policies.events import Decision
from policies.types import Arm, ModelState, Objective, Request, Vector

# what learns from the scores online; each knows the cost, and none the latency
ONLINE: dict[str, Callable[[Sequence[Arm], float, int, int], Peer]] = {
    "acqb": partial(ForcedExploration, c=0.1),
    "cluster means": ClusterMeans,
    "epsilon-greedy": EpsilonGreedy,
    "linucb": LinUCB,
    "nearest scores": NearestScores,
    "paretobandit": ParetoBandit,
}
NEAREST = 25
TTFT_S, TPOT_S = 0.5, 0.03  # limits of the service level objective
PRESETS = {  # weights of quality, latency and cost
    "quality": (0.8, 0.1, 0.1),
    "balanced": (1 / 3, 1 / 3, 1 / 3),
    "fast": (0.1, 0.8, 0.1),
}


def preset_name(preset: str) -> str:
    """The name of the router with a preset of RouteBalance."""
    return f"routebalance {preset}"


class LiveRule(Static):
    """A rule that also sees the live state; subclasses give each size a value."""

    name = "rule"

    def __init__(self, arms: Sequence[Arm], cost: Vector):
        super().__init__(arms)
        self.cost = np.asarray(cost, float)
        self._live: list[ModelState] = []

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """See base.Policy."""
        self._live = [states[arm.name] for arm in self.arms]
        return super().decide(requests, states, rng, sequence)

    def wants(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> dict[int, float]:
        """See Static."""
        value = self.values(request, eligible, rng)
        return {max(eligible, key=lambda k: (value[k], -k)): 1.0}

    def values(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> Vector:
        """[K] the value of each size for this request."""
        raise NotImplementedError

    def loads(self) -> Vector:
        """[K] requests in flight per replica."""
        return np.array([live.in_flight / max(1, live.replicas) for live in self._live])


class LeastLoaded(LiveRule):
    """The size with the smallest share of its slots in use."""

    name = "least loaded"

    def __init__(self, arms: Sequence[Arm], cost: Vector, sizes: Sequence[Size]):
        super().__init__(arms, cost)
        self._slots = np.array([size.engine.max_running for size in sizes], float)

    def values(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> Vector:
        """See LiveRule."""
        return -self.loads() / self._slots


class Neighbours:
    """Means over the nearest calibration prompts, by the cosine of the features.

    Args:
        features: [M, D]. scores: [M, K]. answers: [M, K] tokens.
    """

    def __init__(self, features: Vector, scores: Vector, answers: Vector):
        self._features = features / np.linalg.norm(features, axis=1, keepdims=True)
        self._scores = scores
        self._answers = answers

    def near(self, x: Vector) -> tuple[Vector, Vector]:
        """[K] expected scores and [K] expected answer tokens of a request with features x [D]."""
        likeness = self._features @ (x / np.linalg.norm(x))
        nearest = min(NEAREST, len(likeness))
        rows = np.argpartition(likeness, -nearest)[-nearest:]
        return self._scores[rows].mean(0), self._answers[rows].mean(0)


class NearestPrompts(LiveRule):
    """The quality of the nearest calibration prompts, less cost."""

    name = "nearest prompts"

    def __init__(
        self,
        arms: Sequence[Arm],
        cost: Vector,
        neighbours: Neighbours,
        cost_weight: float,
    ):
        super().__init__(arms, cost)
        self._neighbours = neighbours
        self._cost_weight = cost_weight

    def values(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> Vector:
        """See LiveRule."""
        quality, _ = self._neighbours.near(request.profile.features)
        return quality - self._cost_weight * self.cost


class RouteBalance(LiveRule):
    """Normalised quality, latency and cost, weighed by a preset; its latency model is the true engine's."""

    name = "routebalance"

    def __init__(
        self,
        arms: Sequence[Arm],
        cost: Vector,
        sizes: Sequence[Size],
        neighbours: Neighbours,
        preset: str,
    ):
        super().__init__(arms, cost)
        self._neighbours = neighbours
        self._weights = PRESETS[preset]
        engines = [size.engine for size in sizes]
        self._step = np.array([engine.step_s for engine in engines])
        self._further = np.array([engine.sequence_s for engine in engines])
        self._read = np.array([engine.prefill_tokens_s for engine in engines])

    def values(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> Vector:
        """See LiveRule."""
        quality, tokens = self._neighbours.near(request.profile.features)
        pace = self._step + self._further * (self.loads() + 1.0)
        wait = np.array([live.wait_s for live in self._live])
        first = wait + request.profile.prompt_tokens / self._read + pace
        latency = first + tokens * pace
        by_quality, by_latency, by_cost = self._weights
        rows = list(eligible)
        value = by_quality * quality
        value = value - by_latency * _normalised(latency, rows)
        value = value - by_cost * _normalised(self.cost, rows)
        meets = (first <= TTFT_S) & (pace <= TPOT_S)
        if meets[rows].any():
            value = np.where(meets, value, -np.inf)
        return np.asarray(value)


def _normalised(values: Vector, rows: list[int]) -> Vector:
    """The values as shares of the largest one among these rows."""
    return np.asarray(values / max(float(values[rows].max()), 1e-12))


class OnlineLearner(LiveRule):
    """A learner of the scores, among the sizes with a free slot.

    Args:
        arms: the sizes.
        cost: [K], see LiveRule.
        sizes: the same sizes.
        learner: chooses by the features, and learns the scores.
    """

    name = "online learner"

    def __init__(
        self, arms: Sequence[Arm], cost: Vector, sizes: Sequence[Size], learner: Peer
    ):
        super().__init__(arms, cost)
        self.learner = learner
        self._slots = np.array([size.engine.max_running for size in sizes], float)
        self._column = {arm.name: k for k, arm in enumerate(arms)}

    def values(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> Vector:
        """See LiveRule. A chosen size without a free slot is replaced by the one with the shortest queue."""
        chosen = self.learner.choose(request.profile.features)
        free = self.loads() < self._slots
        value = -self.loads() / self._slots
        if free[chosen]:
            value[chosen] = 1.0
        return value

    def score(
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """See base.EventLearner."""
        arm = self._column[decision.arm]
        self.learner.update(decision.profile.features, arm, score)


class Hindsight(LiveRule):
    """Knows every score and length, and the price of each size's capacity over the whole workload."""

    name = "hindsight"

    def __init__(
        self,
        arms: Sequence[Arm],
        cost: Vector,
        sizes: tuple[Size, ...],
        load: Workload,
        rate: float,
        objective: Objective,
    ):
        super().__init__(arms, cost)
        alone = [
            [
                size.engine.alone_s(float(load.prompts[n]), float(load.answers[n, k]))[
                    1
                ]
                for k, size in enumerate(sizes)
            ]
            for n in range(len(load))
        ]
        self._latency_weight = objective.latency_weight
        self._cost_weight = objective.cost_weight
        self._scores = load.scores - objective.latency_weight * np.array(alone)
        self._work = work(sizes, load.prompts, load.answers)
        capacity = np.array([size.replicas for size in sizes]) * len(load) / rate
        worth = self._scores - objective.cost_weight * self.cost
        self.prices = scarcity(worth, self._work, capacity)

    def values(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> Vector:
        """See LiveRule."""
        n = int(request.id)
        wait = np.array([live.wait_s for live in self._live])
        value = self._scores[n] - self._cost_weight * self.cost
        value = value - self.prices * self._work[n] - self._latency_weight * wait
        return np.asarray(value)
