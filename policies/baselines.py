"""Baselines that do not learn: a fixed rule, one fixed arm, and uniform chance."""

from collections.abc import Mapping, Sequence

import numpy as np

from policies import base, constraints
from policies.events import ArmEstimate, Decision, Outcome
from policies.profiling.features import KINDS
from policies.types import Arm, ModelState, Request


class Static:
    """A complexity threshold: complex requests go to the last eligible arm, all others to the first.

    Args:
        arms: in the order of their size or price, smallest first. A variant gets requests only by `by_kind`, or where
            no other arm is eligible.
        threshold: complexity from which a request goes to the last arm.
        by_kind: by kind of work, the arm that gets its requests whatever their complexity, as long as it is eligible.
            The other kinds are divided among the arms that are not named here.

    Raises:
        ValueError: `by_kind` names an unknown kind or arm, or all arms.
    """

    name = "static"

    def __init__(
        self,
        arms: Sequence[Arm],
        threshold: float = 0.5,
        by_kind: Mapping[str, str] | None = None,
    ):
        self.arms = tuple(arms)
        self.threshold = threshold
        names = [arm.name for arm in arms]
        self._by_kind: dict[str, int] = {}
        for kind, name in (by_kind or {}).items():
            if kind not in KINDS:
                raise ValueError(
                    f"unknown kind '{kind}'; choose one of: {', '.join(KINDS)}"
                )
            if name not in names:
                raise ValueError(
                    f"unknown arm '{name}'; choose one of: {', '.join(names)}"
                )
            self._by_kind[kind] = names.index(name)
        models = {k for k, arm in enumerate(arms) if not arm.variant_of}
        if models <= set(self._by_kind.values()):
            raise ValueError("by_kind names all arms; leave one for the other kinds")

    def wants(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> dict[int, float]:
        """Probability of each eligible arm's index; an arm that is left out has probability 0."""
        profile = request.profile
        special = self._by_kind.get(profile.kind)
        if special is not None and special in eligible:
            return {special: 1.0}
        others = [k for k in eligible if k not in self._by_kind.values()] or eligible
        others = self._models(others)
        complex_task = profile.complexity >= self.threshold
        return {others[-1] if complex_task else others[0]: 1.0}

    def _models(self, eligible: Sequence[int]) -> Sequence[int]:
        """The arms among these that are no variants; all of them if there is none."""
        return [k for k in eligible if not self.arms[k].variant_of] or eligible

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """See base.Policy. A rule has no estimates, so it ignores the limits on latency and cost."""
        total_load = constraints.total_load(self.arms, states)
        default = ModelState()
        decisions = []
        for i, request in enumerate(requests):
            live = [states.get(arm.name, default) for arm in self.arms]
            removed = constraints.removed(
                self.arms, request.profile, request.objective, live
            )
            eligible = [k for k, why in enumerate(removed) if not why]
            wanted = self.wants(request, eligible, rng) if eligible else {}
            indices = list(wanted)
            chosen = (
                int(rng.choice(indices, p=list(wanted.values()))) if indices else -1
            )
            estimates = tuple(
                ArmEstimate(
                    arm.name,
                    propensity=wanted.get(k, 0.0),
                    load=constraints.load(arm, states),
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

    def advance(self, sequence: int, scored: int = -1) -> None:
        """See base.EventLearner; a rule has nothing to forget."""

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """A rule learns nothing."""

    def score(
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """A rule learns nothing."""

    def discount(self, arm: str, events: float) -> None:
        """See base.EventLearner; a rule has nothing to discount."""

    def state(self) -> base.State:
        """A rule has no state."""
        return {}

    def restore(self, state: base.State) -> None:
        """A rule has no state to restore."""


class Uniform(Static):
    """Chooses every eligible arm with the same probability; any other policy can be evaluated from its log."""

    name = "uniform"

    def wants(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> dict[int, float]:
        """See Static."""
        return {k: 1.0 / len(eligible) for k in eligible}


class Always(Static):
    """Chooses the named arm, or the first eligible arm if a limit excludes it; without a name, the largest one."""

    name = "always"

    def __init__(self, arms: Sequence[Arm], arm: str = ""):
        super().__init__(arms)
        names = [a.name for a in arms]
        if arm and arm not in names:
            raise ValueError(f"unknown arm '{arm}'; choose one of: {', '.join(names)}")
        self.arm = names.index(arm) if arm else None

    def wants(
        self, request: Request, eligible: Sequence[int], rng: np.random.Generator
    ) -> dict[int, float]:
        """See Static."""
        if self.arm is None:
            return {self._models(eligible)[-1]: 1.0}
        chosen = self.arm if self.arm in eligible else self._models(eligible)[0]
        return {chosen: 1.0}
