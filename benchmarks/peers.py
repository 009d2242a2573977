"""The other routers and bandit libraries, as policies: each plays the same streams on the same features.

Installed by the extra `peers`, and imported here only, where they are used. Every peer is told an arm's cost exactly:
it is taken off the reward, or where the library has a place for it, off the score at the choice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from policies import base
from policies.types import Arm, ArmEstimate, Decision, ModelState, Outcome, Request, Vector

Make = Callable[[Sequence[Arm], float, int, int], "Peer"]  # arms, cost weight, dimensions, seed


class Peer:
    """A bandit library behind the two verbs of a policy. Subclasses have `choose` and `update`."""

    name = "peer"

    def __init__(self, arms: Sequence[Arm], cost_weight: float, dims: int, seed: int):
        self.arms, self.cost_weight, self.dims, self.seed = tuple(arms), cost_weight, dims, seed
        self.cost = cost_weight * np.array([arm.output_price_usd for arm in arms])
        self._index = {arm.name: k for k, arm in enumerate(self.arms)}

    def choose(self, x: Vector) -> int:
        """The arm for a request with features x [D]."""
        raise NotImplementedError

    def update(self, x: Vector, arm: int, score: float) -> None:
        """What became of it."""
        raise NotImplementedError

    def choose_many(self, x: Vector) -> list[int]:
        """The arms for requests with features x [B, D]."""
        return [self.choose(row) for row in x]

    def update_many(self, x: Vector, arms: Sequence[int], scores: Vector) -> None:
        """What became of them."""
        for row, arm, score in zip(x, arms, scores.tolist(), strict=True):
            self.update(row, arm, score)

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """See base.Policy; one after the other, and without propensities."""
        decisions = []
        for i, request in enumerate(requests):
            arm = self.arms[self.choose(request.profile.features)].name
            estimates = (ArmEstimate(arm),)
            parts = (request.id, arm, sequence + i, self.name, request.profile, request.objective, estimates)
            decisions.append(Decision(*parts))
        return decisions

    def score(self, decision: Decision, score: float, weight: float = 1.0, again: bool = False) -> None:
        """See base.Policy."""
        self.update(decision.profile.features, self._index[decision.arm], score)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Peers learn from scores."""

    def state(self) -> base.State:
        """Not carried away."""
        return {}

    def restore(self, state: base.State) -> None:
        """Not brought back."""


class ParetoBandit(Peer):
    """LinUCB with forgetting; the exact cost is taken off at the choice, as its router does with its own estimate."""

    name = "paretobandit"

    def __init__(self, *given: Any, alpha: float = 0.01, gamma: float = 0.997, init_lambda: float = 1.0):
        super().__init__(*given)
        from pareto_bandit.policy import DisjointLinUCBPolicy

        names = [arm.name for arm in self.arms]
        self.bandit = DisjointLinUCBPolicy(
            names, self.dims, alpha=alpha, init_lambda=init_lambda, forgetting_factor=gamma, seed=self.seed
        )
        self._penalties = dict(zip(names, self.cost.tolist(), strict=True))

    def choose(self, x: Vector) -> int:
        arm, _ = self.bandit.select_arm(x, cost_penalties=self._penalties)
        self.bandit.mark_selected(arm)
        return self._index[arm]

    def update(self, x: Vector, arm: int, score: float) -> None:
        self.bandit.update(self.arms[arm].name, x, score, advance_time=False)

    def rearm(self, arms: Sequence[Arm]) -> "ParetoBandit":
        """Other arms or prices from the next choice on; arms that are there stay in their places."""
        for arm in arms[len(self.arms) :]:
            self.bandit.add_arm(arm.name)
        self.arms, self._index = tuple(arms), {arm.name: k for k, arm in enumerate(arms)}
        self.cost = self.cost_weight * np.array([arm.output_price_usd for arm in arms])
        self._penalties = {arm.name: float(cost) for arm, cost in zip(arms, self.cost, strict=True)}
        return self


class Mabwiser(Peer):
    """One of mabwiser's linear policies, by its name in `LearningPolicy`."""

    name = "mabwiser"

    def __init__(self, *given: Any, policy: str = "LinTS", **options: float):
        super().__init__(*given)
        from mabwiser.mab import MAB, LearningPolicy

        self._mab = MAB(list(range(len(self.arms))), getattr(LearningPolicy, policy)(**options), seed=self.seed)
        self._fitted = False

    def choose(self, x: Vector) -> int:
        if not self._fitted:
            return self.seed % len(self.arms)
        return int(self._mab.predict(x[None]))

    def update(self, x: Vector, arm: int, score: float) -> None:
        learn = self._mab.partial_fit if self._fitted else self._mab.fit
        learn([arm], [score - self.cost[arm]], x[None])
        self._fitted = True

    def choose_many(self, x: Vector) -> list[int]:
        return [int(arm) for arm in self._mab.predict(x)] if self._fitted else super().choose_many(x)

    def update_many(self, x: Vector, arms: Sequence[int], scores: Vector) -> None:
        learn = self._mab.partial_fit if self._fitted else self._mab.fit
        learn(list(arms), scores - self.cost[list(arms)], x)
        self._fitted = True


class VowpalWabbit(Peer):
    """One of Vowpal Wabbit's explorers over action-dependent features (each arm has weights of its own)."""

    name = "vowpalwabbit"

    def __init__(self, *given: Any, options: str = "--squarecb"):
        super().__init__(*given)
        from vowpalwabbit import Workspace

        self._vw = Workspace(f"--cb_explore_adf {options} -q ca --quiet --random_seed {self.seed + 1}")
        self._rng = np.random.default_rng(self.seed)
        self._chances: Vector = np.zeros(0)

    def _text(self, x: Vector, label: str = "", arm: int = -1) -> list[str]:
        shared = "shared |c " + " ".join(f"{i}:{v:.6f}" for i, v in enumerate(x) if v)
        return [shared, *(f"{label if k == arm else ''} |a arm{k}" for k in range(len(self.arms)))]

    def choose(self, x: Vector) -> int:
        self._chances = np.array(self._vw.predict(self._text(x)))
        return int(self._rng.choice(len(self.arms), p=self._chances / self._chances.sum()))

    def update(self, x: Vector, arm: int, score: float) -> None:
        cost = self.cost[arm] - score
        self._vw.learn(self._text(x, f"{arm}:{cost:.6f}:{max(self._chances[arm], 1e-3):.6f}", arm))


class LinUCB(Peer):
    """Disjoint LinUCB in numpy (Li et al., WWW 2010), with the cost taken off at the choice."""

    name = "linucb"

    def __init__(self, *given: Any, alpha: float = 1.0, l2: float = 1.0, epsilon: float = 0.0):
        super().__init__(*given)
        self._alpha, self._epsilon, self._rng = alpha, epsilon, np.random.default_rng(self.seed)
        self._inverse = np.tile(np.eye(self.dims) / l2, (len(self.arms), 1, 1))
        self._moment = np.zeros((len(self.arms), self.dims))

    def choose(self, x: Vector) -> int:
        if self._rng.random() < self._epsilon:
            return int(self._rng.integers(len(self.arms)))
        spread = self._inverse @ x  # [K, D]
        value = (spread * self._moment).sum(1) + self._alpha * np.sqrt(spread @ x) - self.cost
        return int(np.flatnonzero(value == value.max())[0])

    def update(self, x: Vector, arm: int, score: float) -> None:
        spread = self._inverse[arm] @ x
        self._inverse[arm] -= np.outer(spread, spread) / (1 + x @ spread)
        self._moment[arm] += score * x


class EpsilonGreedy(LinUCB):
    """Ridge regression a arm, the best one with probability 1 - ε."""

    name = "epsilon-greedy"

    def __init__(self, *given: Any, epsilon: float = 0.1, l2: float = 1.0):
        super().__init__(*given, alpha=0.0, l2=l2, epsilon=epsilon)


# by name: the class, its documented defaults, and a small grid of which the best is shown, too
PEERS: dict[str, tuple[type[Peer], dict[str, Any], tuple[dict[str, Any], ...]]] = {
    "paretobandit": (
        ParetoBandit,
        {},
        (
            {"alpha": 0.1},
            {"gamma": 1.0},
            {"alpha": 0.1, "gamma": 1.0},
            {"alpha": 0.1, "gamma": 1.0, "init_lambda": 10.0},
        ),
    ),
    "mabwiser LinTS": (Mabwiser, {"policy": "LinTS"}, ({"alpha": 0.3}, {"alpha": 0.3, "l2_lambda": 10.0})),
    "mabwiser LinUCB": (Mabwiser, {"policy": "LinUCB"}, ({"alpha": 0.3}, {"alpha": 0.3, "l2_lambda": 10.0})),
    "VW SquareCB": (VowpalWabbit, {"options": "--squarecb"}, ({"options": "--squarecb --gamma_scale 100"},)),
    "VW RegCB": (VowpalWabbit, {"options": "--regcb"}, ({"options": "--regcb --mellowness 0.01"},)),
    "LinUCB": (LinUCB, {}, ({"alpha": 0.3, "l2": 10.0}, {"alpha": 0.1, "l2": 10.0})),
    "epsilon-greedy": (EpsilonGreedy, {}, ({"epsilon": 0.02}, {"epsilon": 0.02, "l2": 10.0})),
}
