"""Offline simulation: a policy decides and learns on a recorded stream on which every arm's score is known.

The policy gets only what it would get live: the profile, then the score of the arm it chose, perhaps late or never.
The simulation is seeded and has no global state: the same arguments give the same result.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.base import Policy
from policies.events import Decision, Outcome
from policies.objectives import paced
from policies.types import Arm, Objective, Request, TaskProfile, Vector


@dataclass(frozen=True)
class Stream:
    """N requests in the order of their arrival, with the score and the cost of each of K arms.

    profiles: N profiles with a `max_output_tokens` of 1, so that a request costs exactly its arm's output price.
    arms: K names, the columns of the arrays.
    scores: [N, K] in [0, 1].
    costs: [N, K] USD a request, as known before the choice.
    """

    profiles: Sequence[TaskProfile]
    arms: tuple[str, ...]
    scores: Vector
    costs: Vector

    def arms_at(self, n: int, names: Sequence[str] = ()) -> tuple[Arm, ...]:
        """These arms (by default all), at the prices of request n."""
        prices = dict(zip(self.arms, self.costs[n], strict=True))
        return tuple(
            Arm(name, ("chat",), 1 << 30, 0.0, float(prices[name]))
            for name in names or self.arms
        )


@dataclass(frozen=True)
class SimulationResult:
    """The choices of a policy on a stream.

    chosen: [N] column of the chosen arm. propensity: [N] its propensity.
    utility: [N] of the choice. score, cost_usd: [N] the parts of the utility.
    scores: number of scores that the policy learned from.
    """

    chosen: NDArray[np.int64]
    propensity: Vector
    utility: Vector
    score: Vector
    cost_usd: Vector
    scores: int


class Pacer(Protocol):
    """What a simulation needs of a budget pacer (policies/budget.py)."""

    @property
    def cost_weight(self) -> float:
        """The price on cost that the next objective gets."""

    def decided(self, decision: Decision) -> None:
        """Take in a decision."""


@dataclass(frozen=True)
class FeedbackPlan:
    """Which answers of a simulation are scored, and when.

    coverage: share in (0, 1] of the answers that are scored.
    first: share in [0, 1] of these scores that go to the first requests, all of which are scored then.
    sampled: whether the policy knows beforehand which answers will be scored, as with a judge's sample.
    pairs: of each scored request a second arm answers in the background, and both answers are scored. Then half as
        many requests are scored. The first answer is that of the best estimate.
    explore: probability with which a sampled request's arm is drawn uniformly, if few requests are sampled.
    delay: number of requests after which a score arrives.
    most: number of scores that arrive; later scores are missing.
    """

    coverage: float = 1.0
    first: float = 0.0
    sampled: bool = False
    pairs: bool = False
    explore: float = 0.2
    delay: int = 0
    most: float = inf

    def rates(self, requests: int) -> Vector:
        """[N] probability of each request that its answer is scored."""
        coverage = self.coverage / 2 if self.pairs else self.coverage
        at_first = round(self.first * coverage * requests)
        later = max(0.0, coverage * requests - at_first) / max(1, requests - at_first)
        return np.where(np.arange(requests) < at_first, 1.0, later)


def simulate(
    policy: Policy,
    stream: Stream,
    objective: Objective,
    rng: np.random.Generator,
    feedback: FeedbackPlan = FeedbackPlan(),
    interventions: Mapping[int, Callable[[Policy], Policy]] | None = None,
    pacer: Pacer | None = None,
    failures: Sequence[float] = (),
) -> SimulationResult:
    """Simulate a policy on a stream; the policy learns on the way.

    Args:
        policy: over some or all of the stream's arms.
        stream: the recorded requests, scores and costs.
        objective: of every request.
        rng: for the policy's draws, and for the choice of the missing scores.
        feedback: which answers are scored.
        interventions: by request number, a change of the policy just before that request: new prices, a new arm.
        pacer: keeps the mean cost under its ceiling; the result's utility does not include its price.
        failures: [K] probability that an arm fails. A failure scores 0, is always seen, and costs the same.
    """
    column = {name: k for k, name in enumerate(stream.arms)}
    luck = np.random.default_rng(rng.integers(1 << 62))
    rates = feedback.rates(len(stream.profiles))
    scored = luck.random(len(stream.profiles)) < rates
    failed = luck.random(stream.scores.shape) < (failures or np.zeros(len(column)))
    due: dict[int, list[tuple[Decision, float]]] = defaultdict(list)
    chosen = np.zeros(len(stream.profiles), dtype=np.int64)
    propensity = np.zeros(len(stream.profiles))
    given = 0

    def answer(decision: Decision, n: int) -> None:
        """Teach the policy what an answer to request n shows."""
        nonlocal given
        arm = column[decision.arm]
        status = "error" if failed[n, arm] else "ok"
        policy.learn(decision, Outcome(decision.id, status))
        if status == "error" or not scored[n] or given >= feedback.most:
            return
        score = float(stream.scores[n, arm])
        if feedback.delay:
            due[n + feedback.delay].append((decision, score))
        else:
            policy.score(decision, score)
            given += 1

    for n, profile in enumerate(stream.profiles):
        if interventions and n in interventions:
            policy = interventions[n](policy)
        for decision, score in due.pop(n, ()):
            policy.score(decision, score)
            given += 1
        policy.advance(n, given)
        request = _asked(
            Request(str(n), profile, objective),
            feedback,
            bool(scored[n]),
            float(rates[n]),
        )
        if pacer:
            (request,) = paced([request], pacer.cost_weight)
        (decision,) = policy.decide([request], {}, rng, n)
        if pacer:
            pacer.decided(decision.made(request, decision.policy_version, 0.0))
        chosen[n] = column[decision.arm]
        propensity[n] = decision.estimate().propensity
        if feedback.pairs and scored[n]:
            other = _second(policy, request, decision.arm, rng, n)
            answer(other, n)
        answer(decision, n)
    rows = np.arange(len(chosen))
    score_got = np.where(failed[rows, chosen], 0.0, stream.scores[rows, chosen])
    cost = stream.costs[rows, chosen]
    return SimulationResult(
        chosen,
        propensity,
        score_got - objective.cost_weight * cost,
        score_got,
        cost,
        given,
    )


def _asked(
    request: Request, feedback: FeedbackPlan, scored: bool, rate: float
) -> Request:
    """The request with what is known of its score before the decision."""
    if feedback.pairs:
        return replace(request, score_chance=0.0)  # the second answer explores
    if not feedback.sampled:
        return replace(request, score_chance=rate)
    explore = feedback.explore * (1.0 - rate) if scored else 0.0
    return replace(request, score_chance=float(scored), explore=explore)


def _second(
    policy: Policy, request: Request, first: str, rng: np.random.Generator, n: int
) -> Decision:
    """The decision about the second answer, by an arm other than the first."""
    others = tuple(arm.name for arm in policy.arms if arm.name != first)
    objective = replace(request.objective, models=others)
    request = replace(request, objective=objective, score_chance=1.0, explore=0.0)
    return policy.decide([request], {}, rng, n)[0]
