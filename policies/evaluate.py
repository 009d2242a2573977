"""The loop offline: a recorded stream, on which every arm's score is known, is played to a policy request by request.

The policy sees only what it would see live: the profile, then the score of the arm it chose, perhaps late or never.
Seeded and without global state: the same arguments give the same trace.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from policies.base import Policy
from policies.pacer import Pacer, paced
from policies.types import Arm, Decision, Objective, Request, TaskProfile, Vector


@dataclass(frozen=True)
class Stream:
    """N requests in the order of their arrival, and what each of K arms makes of them.

    profiles: N; with a `max_output_tokens` of 1, so that a request costs exactly its arm's output price.
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
        return tuple(Arm(name, ("chat",), 1 << 30, 0.0, float(prices[name])) for name in names or self.arms)


@dataclass(frozen=True)
class Trace:
    """What a policy did with a stream.

    chosen: [N] column of the arm. propensity: [N] with which it was chosen.
    utility: [N] of the choice. score, cost_usd: [N] what it is made of.
    scores: how many the policy was given.
    """

    chosen: NDArray[np.int64]
    propensity: Vector
    utility: Vector
    score: Vector
    cost_usd: Vector
    scores: int


def play(
    policy: Policy,
    stream: Stream,
    objective: Objective,
    rng: np.random.Generator,
    delay: int = 0,
    coverage: float = 1.0,
    switches: Mapping[int, Callable[[Policy], Policy]] | None = None,
    pacer: Pacer | None = None,
    most: float = inf,
) -> Trace:
    """Play a stream to a policy, which learns on the way.

    Args:
        policy: over some or all of the stream's arms.
        stream: what happens.
        objective: of every request.
        rng: the policy's randomness, and which scores never come.
        delay: requests after which a score arrives.
        coverage: probability in (0, 1] that a score arrives at all.
        switches: by request number, what happens to the policy just before it: new prices, a new arm.
        pacer: keeps the mean cost under its ceiling; the trace's utility is without its price.
        most: how many scores arrive before they cease.
    """
    column = {name: k for k, name in enumerate(stream.arms)}
    missing = np.random.default_rng(rng.integers(1 << 62)).random(len(stream.profiles)) >= coverage
    due: dict[int, list[tuple[Decision, float]]] = defaultdict(list)
    chosen, propensity = np.zeros(len(stream.profiles), dtype=np.int64), np.zeros(len(stream.profiles))
    given = 0
    for n, profile in enumerate(stream.profiles):
        if switches and n in switches:
            policy = switches[n](policy)
        for decision, score in due.pop(n, ()):
            policy.score(decision, score)
            given += 1
        request = Request(str(n), profile, objective)
        (decision,) = policy.decide(paced([request], pacer.cost_weight if pacer else 0.0), {}, rng, n)
        if pacer:
            pacer.decided(decision)
        chosen[n] = column[decision.arm]
        propensity[n] = decision.estimate().propensity
        if missing[n] or given >= most:
            continue
        score = float(stream.scores[n, chosen[n]])
        if delay:
            due[n + delay].append((decision, score))
        else:
            policy.score(decision, score)
            given += 1
    rows = np.arange(len(chosen))
    score_got, cost = stream.scores[rows, chosen], stream.costs[rows, chosen]
    return Trace(chosen, propensity, score_got - objective.cost_weight * cost, score_got, cost, given)
