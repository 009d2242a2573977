"""Other routers and bandit libraries as policies; each plays the same streams on the same features.

The extra `peers` installs them. Each library is imported only by the class that uses it.

Every peer knows the exact cost of an arm. The cost is subtracted from the reward or, if the library supports it, from
the score at the time of the choice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from policies import base
from policies.events import ArmEstimate, Decision, Outcome
from policies.profiling.features import EMBEDDING_COLUMNS, KINDS
from policies.types import Arm, ModelState, Request, Vector

# arguments: arms, cost weight, dimensions, seed
Make = Callable[[Sequence[Arm], float, int, int], "Peer"]


class Peer:
    """Adapts a bandit library to a policy. Subclasses implement `choose` and `update`."""

    name = "peer"

    def __init__(self, arms: Sequence[Arm], cost_weight: float, dims: int, seed: int):
        self.arms = tuple(arms)
        self.cost_weight = cost_weight
        self.dims = dims
        self.seed = seed
        self.cost = cost_weight * np.array([arm.output_price_usd for arm in arms])
        self._index = {arm.name: k for k, arm in enumerate(self.arms)}

    def choose(self, x: Vector) -> int:
        """Index of the arm for a request with features x [D]."""
        raise NotImplementedError

    def update(self, x: Vector, arm: int, score: float) -> None:
        """Learn the score of an arm for a request with features x [D]."""
        raise NotImplementedError

    def reprice(self, cost: Vector) -> None:
        """Use other costs [K] of an answer from the next choice on."""
        self.cost = self.cost_weight * cost

    def choose_many(self, x: Vector) -> list[int]:
        """Indices of the arms for requests with features x [B, D]."""
        return [self.choose(row) for row in x]

    def update_many(self, x: Vector, arms: Sequence[int], scores: Vector) -> None:
        """Learn the scores [B] of arms [B] for requests with features x [B, D]."""
        for row, arm, score in zip(x, arms, scores.tolist(), strict=True):
            self.update(row, arm, score)

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """See base.Policy. Requests are decided one after the other, without propensities."""
        decisions = []
        for i, request in enumerate(requests):
            arm = self.arms[self.choose(request.profile.features)].name
            decision = Decision(
                request.id,
                arm,
                sequence + i,
                self.name,
                request.profile,
                request.objective,
                (ArmEstimate(arm),),
            )
            decisions.append(decision)
        return decisions

    def score(
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """See base.Policy."""
        self.update(decision.profile.features, self._index[decision.arm], score)

    def advance(self, sequence: int, scored: int = -1) -> None:
        """Do nothing: peers have their own clocks."""

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Learn a failure as a score of 0, because it is seen."""
        if outcome.status == "error":
            self.score(decision, 0.0)

    def state(self) -> base.State:
        """An empty state: peers are not saved."""
        return {}

    def restore(self, state: base.State) -> None:
        """Do nothing: peers are not saved."""


class ParetoBandit(Peer):
    """LinUCB with forgetting.

    The exact cost is subtracted at the choice, where ParetoBandit's own router subtracts its estimate.
    """

    name = "paretobandit"

    def __init__(
        self,
        *given: Any,
        alpha: float = 0.01,
        gamma: float = 0.997,
        init_lambda: float = 1.0,
    ):
        super().__init__(*given)
        from pareto_bandit.policy import DisjointLinUCBPolicy

        names = [arm.name for arm in self.arms]
        self.bandit = DisjointLinUCBPolicy(
            names,
            self.dims,
            alpha=alpha,
            init_lambda=init_lambda,
            forgetting_factor=gamma,
            seed=self.seed,
        )
        self._penalties = dict(zip(names, self.cost.tolist(), strict=True))

    def choose(self, x: Vector) -> int:
        arm, _ = self.bandit.select_arm(x, cost_penalties=self._penalties)
        self.bandit.mark_selected(arm)
        return self._index[arm]

    def update(self, x: Vector, arm: int, score: float) -> None:
        self.bandit.update(self.arms[arm].name, x, score, advance_time=False)

    def reprice(self, cost: Vector) -> None:
        super().reprice(cost)
        for arm, penalty in zip(self.arms, self.cost.tolist(), strict=True):
            self._penalties[arm.name] = penalty

    def rearm(self, arms: Sequence[Arm]) -> "ParetoBandit":
        """Use other arms or prices from the next choice on. Existing arms keep their indices."""
        for arm in arms[len(self.arms) :]:
            self.bandit.add_arm(arm.name)
        self.arms = tuple(arms)
        self._index = {arm.name: k for k, arm in enumerate(arms)}
        self.cost = self.cost_weight * np.array([arm.output_price_usd for arm in arms])
        self._penalties = {
            arm.name: float(cost) for arm, cost in zip(arms, self.cost, strict=True)
        }
        return self


class Mabwiser(Peer):
    """A linear policy of mabwiser. `policy` is its name in `LearningPolicy`."""

    name = "mabwiser"

    def __init__(self, *given: Any, policy: str = "LinTS", **options: float):
        super().__init__(*given)
        from mabwiser.mab import MAB, LearningPolicy

        self._mab = MAB(
            list(range(len(self.arms))),
            getattr(LearningPolicy, policy)(**options),
            seed=self.seed,
        )
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
        if not self._fitted:
            return super().choose_many(x)
        return [int(arm) for arm in self._mab.predict(x)]

    def update_many(self, x: Vector, arms: Sequence[int], scores: Vector) -> None:
        learn = self._mab.partial_fit if self._fitted else self._mab.fit
        learn(list(arms), scores - self.cost[list(arms)], x)
        self._fitted = True


class VowpalWabbit(Peer):
    """An explorer of Vowpal Wabbit on action-dependent features; each arm has its own weights."""

    name = "vowpalwabbit"

    def __init__(self, *given: Any, options: str = "--squarecb"):
        super().__init__(*given)
        from vowpalwabbit import Workspace

        self._vw = Workspace(
            f"--cb_explore_adf {options} -q ca --quiet --random_seed {self.seed + 1}"
        )
        self._rng = np.random.default_rng(self.seed)
        # Before the first choice, every arm is as likely.
        self._chances: Vector = np.full(len(self.arms), 1.0 / len(self.arms))

    def _text(self, x: Vector, label: str = "", arm: int = -1) -> list[str]:
        """An example in Vowpal Wabbit's text format; the line of `arm` has the label."""
        features = " ".join(f"{i}:{v:.6f}" for i, v in enumerate(x) if v)
        lines = [f"shared |c {features}"]
        for k in range(len(self.arms)):
            lines.append(f"{label if k == arm else ''} |a arm{k}")
        return lines

    def choose(self, x: Vector) -> int:
        self._chances = np.array(self._vw.predict(self._text(x)))
        return int(
            self._rng.choice(len(self.arms), p=self._chances / self._chances.sum())
        )

    def update(self, x: Vector, arm: int, score: float) -> None:
        cost = self.cost[arm] - score
        probability = max(self._chances[arm], 1e-3)
        self._vw.learn(self._text(x, f"{arm}:{cost:.6f}:{probability:.6f}", arm))


class LinUCB(Peer):
    """Disjoint LinUCB in numpy (Li et al., WWW 2010). The cost is subtracted at the choice."""

    name = "linucb"

    def __init__(
        self, *given: Any, alpha: float = 1.0, l2: float = 1.0, epsilon: float = 0.0
    ):
        super().__init__(*given)
        self._alpha = alpha
        self._epsilon = epsilon
        self._rng = np.random.default_rng(self.seed)
        self._inverse = np.tile(np.eye(self.dims) / l2, (len(self.arms), 1, 1))
        self._moment = np.zeros((len(self.arms), self.dims))

    def choose(self, x: Vector) -> int:
        if self._rng.random() < self._epsilon:
            return int(self._rng.integers(len(self.arms)))
        spread = self._inverse @ x  # [K, D]
        value = (
            (spread * self._moment).sum(1)
            + self._alpha * np.sqrt(spread @ x)
            - self.cost
        )
        return int(np.flatnonzero(value == value.max())[0])

    def update(self, x: Vector, arm: int, score: float) -> None:
        spread = self._inverse[arm] @ x
        self._inverse[arm] -= np.outer(spread, spread) / (1 + x @ spread)
        self._moment[arm] += score * x


class EpsilonGreedy(LinUCB):
    """Ridge regression for each arm; takes the best arm with probability 1 - ε."""

    name = "epsilon-greedy"

    def __init__(self, *given: Any, epsilon: float = 0.1, l2: float = 1.0):
        super().__init__(*given, alpha=0.0, l2=l2, epsilon=epsilon)


class NearestPrompts(Peer):
    """Upper confidence bound on the nearest scored prompts of each arm, by the cosine of the features.

    The mean of the nearest scores is shrunk to the arm's mean, which counts for `shrink` scores.
    """

    name = "nearest prompts"

    def __init__(
        self,
        *given: Any,
        nearest: int = 25,
        bonus: float = 0.3,
        shrink: float = 5.0,
    ):
        super().__init__(*given)
        self._nearest = nearest
        self._bonus = bonus
        self._shrink = shrink
        self._prompts: list[list[Vector]] = [[] for _ in self.arms]
        self._scores: list[list[float]] = [[] for _ in self.arms]

    def choose(self, x: Vector) -> int:
        x = x / np.linalg.norm(x)
        value = [self._value(x, arm) for arm in range(len(self.arms))]
        return int(np.argmax(np.array(value) - self.cost))

    def _value(self, x: Vector, arm: int) -> float:
        scores = np.array(self._scores[arm])
        if not len(scores):
            return 0.5 + self._bonus
        likeness = np.array(self._prompts[arm]) @ x
        # The identical prompt may not be looked up: streams may repeat prompts.
        likeness[likeness > 1 - 1e-9] = -1.0
        near = np.argsort(likeness)[-self._nearest :]
        total = scores[near].sum() + self._shrink * scores.mean()
        count = len(near) + self._shrink
        return float(total / count + self._bonus / np.sqrt(len(near)))

    def update(self, x: Vector, arm: int, score: float) -> None:
        self._prompts[arm].append(x / np.linalg.norm(x))
        self._scores[arm].append(score)


class ClusterMeans(Peer):
    """Thompson sampling on the mean score of each arm in each cluster, shrunk to the arm's mean.

    A cluster is a kind of work and the signs of the first two columns of the embedding.
    """

    name = "cluster means"

    def __init__(
        self,
        *given: Any,
        noise: float = 0.3,
        shrink: float = 5.0,
        columns: int = 2,
        sampling: bool = True,
    ):
        super().__init__(*given)
        self._noise = noise
        self._shrink = shrink
        self._columns = columns
        self._sampling = sampling
        self._rng = np.random.default_rng(self.seed)
        blank = {"": np.zeros((len(self.arms), 2))}
        self._sums: dict[str, Vector] = blank  # by cluster [K, 2]; "" is all

    def _cluster(self, x: Vector) -> str:
        first_kind = 1 + EMBEDDING_COLUMNS
        kind = int(x[first_kind : first_kind + len(KINDS)].argmax())
        signs = (x[1 : 1 + self._columns] > 0).astype(int)
        return f"{kind} {signs}"

    def choose(self, x: Vector) -> int:
        everything = self._sums[""]
        level = (everything[:, 0] + 0.5) / (everything[:, 1] + 1.0)
        mine = self._sums.get(self._cluster(x), np.zeros_like(everything))
        count = mine[:, 1] + self._shrink
        value = (mine[:, 0] + self._shrink * level) / count
        if self._sampling:
            value = value + self._deviation(mine, everything) * (
                self._rng.standard_normal(len(value))
            )
        return int(np.argmax(value - self.cost))

    def _deviation(self, mine: Vector, everything: Vector) -> Vector:
        own = mine[:, 1] + np.minimum(everything[:, 1], self._shrink)
        return np.asarray(self._noise / np.sqrt(own + 1.0))

    def update(self, x: Vector, arm: int, score: float) -> None:
        for cluster in ("", self._cluster(x)):
            sums = self._sums.setdefault(cluster, np.zeros((len(self.arms), 2)))
            sums[arm] += (score, 1.0)


class ClusterRanking(ClusterMeans):
    """A ranking of the arms per cluster, as Avengers-Pro has it: the best score less cost in the prompt's cluster.

    Its clusters come from all prompts beforehand; here they are those of ClusterMeans, with more signs. It does not
    explore, so a share ε of the requests goes to a random arm.
    """

    name = "cluster ranking"

    def __init__(self, *given: Any, epsilon: float = 0.05, columns: int = 4):
        super().__init__(*given, columns=columns, sampling=False)
        self._epsilon = epsilon

    def choose(self, x: Vector) -> int:
        if self._rng.random() < self._epsilon:
            return int(self._rng.integers(len(self.arms)))
        return super().choose(x)


class ForcedExploration(LinUCB):
    """Contextual Thompson sampling with decaying forced exploration, as ACQB has it without its queues.

    Request t goes to a random arm with the probability min(1, c K / √t).
    """

    name = "forced exploration"

    def __init__(self, *given: Any, c: float = 0.5, deviation: float = 0.3):
        super().__init__(*given, alpha=0.0)
        self._c = c
        self._deviation = deviation
        self._requests = 0

    def choose(self, x: Vector) -> int:
        self._requests += 1
        arms = len(self.arms)
        if self._rng.random() < self._c * arms / np.sqrt(self._requests):
            return int(self._rng.integers(arms))
        spread = self._inverse @ x  # [K, D]
        drawn = self._rng.standard_normal(arms) * np.sqrt(spread @ x)
        value = (spread * self._moment).sum(1) + self._deviation * drawn
        return int(np.argmax(value - self.cost))


# by name: the class, its documented defaults, and a small grid whose best setting is also shown
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
    "mabwiser LinTS": (
        Mabwiser,
        {"policy": "LinTS"},
        ({"alpha": 0.3}, {"alpha": 0.3, "l2_lambda": 10.0}),
    ),
    "mabwiser LinUCB": (
        Mabwiser,
        {"policy": "LinUCB"},
        ({"alpha": 0.3}, {"alpha": 0.3, "l2_lambda": 10.0}),
    ),
    "VW SquareCB": (
        VowpalWabbit,
        {"options": "--squarecb"},
        ({"options": "--squarecb --gamma_scale 100"},),
    ),
    "VW RegCB": (
        VowpalWabbit,
        {"options": "--regcb"},
        ({"options": "--regcb --mellowness 0.01"},),
    ),
    "LinUCB": (LinUCB, {}, ({"alpha": 0.3, "l2": 10.0}, {"alpha": 0.1, "l2": 10.0})),
    "epsilon-greedy": (
        EpsilonGreedy,
        {},
        ({"epsilon": 0.02}, {"epsilon": 0.02, "l2": 10.0}),
    ),
    "nearest prompts": (
        NearestPrompts,
        {},
        ({"bonus": 0.1}, {"nearest": 50}, {"nearest": 50, "bonus": 0.1}),
    ),
    "cluster means": (
        ClusterMeans,
        {},
        ({"noise": 0.15}, {"shrink": 10.0}, {"shrink": 10.0, "noise": 0.15}),
    ),
    "cluster ranking": (
        ClusterRanking,
        {},
        ({"epsilon": 0.02}, {"columns": 2}, {"columns": 2, "epsilon": 0.02}),
    ),
    "forced exploration": (
        ForcedExploration,
        {},
        ({"c": 0.1}, {"c": 0.1, "deviation": 0.1}),
    ),
}
