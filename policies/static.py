"""What learning has to beat: fixed rules, one fixed arm, and chance. None of them learns."""

from collections.abc import Mapping, Sequence

import numpy as np

from policies import base
from policies.types import Arm, ArmEstimate, Decision, ModelState, Outcome, Request


class Static:
    """The rule that teams start with: embeddings and simple tasks to the small model, complex ones to the large.

    Arms are given in the order of their size, smallest first. A request whose complexity reaches `threshold` goes to
    the largest arm that its limits leave, any other to the smallest.
    """

    name = "static"

    def __init__(self, arms: Sequence[Arm], threshold: float = 0.5):
        self.arms, self.threshold = tuple(arms), threshold

    def wants(self, request: Request, eligible: Sequence[int], rng: np.random.Generator) -> dict[int, float]:
        """Probability of each arm index that may be chosen."""
        complex_task = request.profile.complexity >= self.threshold
        return {eligible[-1] if complex_task else eligible[0]: 1.0}

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """See base.Policy. Expected latency and cost are unknown to a rule, so it cannot keep such limits."""
        total_load = float(sum(state.in_flight for state in states.values()))
        default, decisions = ModelState(), []
        for i, request in enumerate(requests):
            live = [states.get(arm.name, default) for arm in self.arms]
            removed = base.removed(self.arms, request.profile, request.objective, live)
            eligible = [k for k, why in enumerate(removed) if not why]
            wanted = self.wants(request, eligible, rng) if eligible else {}
            indices = list(wanted)
            chosen = int(rng.choice(indices, p=list(wanted.values()))) if indices else -1
            estimates = tuple(
                ArmEstimate(
                    arm.name,
                    propensity=wanted.get(k, 0.0),
                    load=base.load(arm, states),
                    total_load=total_load,
                    removed_by=removed[k],
                )
                for k, arm in enumerate(self.arms)
            )
            decision = Decision(
                request.id,
                self.arms[chosen].name if indices else "",
                sequence + i,
                self.name,
                request.profile,
                request.objective,
                estimates,
            )
            decisions.append(decision)
        return decisions

    def advance(self, sequence: int) -> None:
        """See base.Policy; a rule forgets nothing."""

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """A rule learns nothing."""

    def score(self, decision: Decision, score: float, weight: float = 1.0, again: bool = False) -> None:
        """A rule learns nothing."""

    def state(self) -> base.State:
        """A rule has no state."""
        return {}

    def restore(self, state: base.State) -> None:
        """A rule has no state to take over."""


class Uniform(Static):
    """Every arm that the limits leave, with the same probability: the log from which anything can be judged."""

    name = "uniform"

    def wants(self, request: Request, eligible: Sequence[int], rng: np.random.Generator) -> dict[int, float]:
        """See Static."""
        return {k: 1.0 / len(eligible) for k in eligible}


class Always(Static):
    """The named arm, or if a limit removes it the first that is left; without a name the largest that is left."""

    name = "always"

    def __init__(self, arms: Sequence[Arm], arm: str = ""):
        super().__init__(arms)
        names = [a.name for a in arms]
        if arm and arm not in names:
            raise ValueError(f"unknown arm '{arm}'; choose one of: {', '.join(names)}")
        self.arm = names.index(arm) if arm else None

    def wants(self, request: Request, eligible: Sequence[int], rng: np.random.Generator) -> dict[int, float]:
        """See Static."""
        if self.arm is None:
            return {eligible[-1]: 1.0}
        return {self.arm if self.arm in eligible else eligible[0]: 1.0}
