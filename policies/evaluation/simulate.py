"""Offline simulation: a policy decides and learns on a recorded stream on which every arm's score is known.

The policy gets only what it would get live: the profile, then the score of the arm it chose, perhaps late or never.
The simulation is seeded and has no global state: the same arguments give the same result.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from policies.base import Policy
from policies.budget import BudgetPacer
from policies.events import Decision
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


def simulate(
    policy: Policy,
    stream: Stream,
    objective: Objective,
    rng: np.random.Generator,
    delay: int = 0,
    coverage: float = 1.0,
    interventions: Mapping[int, Callable[[Policy], Policy]] | None = None,
    pacer: BudgetPacer | None = None,
    max_scores: float = inf,
) -> SimulationResult:
    """Simulate a policy on a stream; the policy learns on the way.

    Args:
        policy: over some or all of the stream's arms.
        stream: the recorded requests, scores and costs.
        objective: of every request.
        rng: for the policy's draws, and for the choice of the missing scores.
        delay: number of requests after which a score arrives.
        coverage: probability in (0, 1] that a score arrives at all.
        interventions: by request number, a change of the policy just before that request: new prices, a new arm.
        pacer: keeps the mean cost under its ceiling; the result's utility does not include its price.
        max_scores: number of scores that arrive; later scores are missing.
    """
    column = {name: k for k, name in enumerate(stream.arms)}
    missing = (
        np.random.default_rng(rng.integers(1 << 62)).random(len(stream.profiles))
        >= coverage
    )
    due: dict[int, list[tuple[Decision, float]]] = defaultdict(list)
    chosen = np.zeros(len(stream.profiles), dtype=np.int64)
    propensity = np.zeros(len(stream.profiles))
    given = 0
    for n, profile in enumerate(stream.profiles):
        if interventions and n in interventions:
            policy = interventions[n](policy)
        for decision, score in due.pop(n, ()):
            policy.score(decision, score)
            given += 1
        request = Request(str(n), profile, objective)
        (decision,) = policy.decide(
            paced([request], pacer.cost_weight if pacer else 0.0), {}, rng, n
        )
        if pacer:
            pacer.decided(decision)
        chosen[n] = column[decision.arm]
        propensity[n] = decision.estimate().propensity
        if missing[n] or given >= max_scores:
            continue
        score = float(stream.scores[n, chosen[n]])
        if delay:
            due[n + delay].append((decision, score))
        else:
            policy.score(decision, score)
            given += 1
    rows = np.arange(len(chosen))
    score_got = stream.scores[rows, chosen]
    cost = stream.costs[rows, chosen]
    return SimulationResult(
        chosen,
        propensity,
        score_got - objective.cost_weight * cost,
        score_got,
        cost,
        given,
    )
