"""Thompson sampling on quality, latency and cost, which are learned apart and traded off at the decision.

Quality is a Bayesian linear model of the score on the profile's features, in which the arms share what they have in
common (hierarchy.py); latency and cost are those of latency.py. With the request's own weights λ,

    utility = quality - λ_latency (TTFT + tokens · TPOT) - λ_cost (prompt · price_in + tokens · price_out),

its mean μ and its variance σ² by propagation of the parts' variances, one draw u ~ N(μ, (α σ)²) for each arm that no
limit removes, and the largest draw wins (Thompson, Biometrika 1933; Agrawal and Goyal, ICML 2013). The factor α fades
as scores come in. As the draws are normal, the propensities are exact integrals (propensity.py).

So a changed price, weight or limit takes effect at once, and an answer without a score still teaches latency.
Given up for simplicity: the parts' joint covariance, and load that other undecided requests of one batch will add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt

import numpy as np

from policies import base
from policies.features import D
from policies.hierarchy import HierarchicalPosterior
from policies.latency import LatencyModel
from policies.propensity import probability_best
from policies.types import Arm, ArmEstimate, Decision, ModelState, Objective, Outcome, Request, TaskProfile, Vector

SENSITIVITY = 3.0  # a text that asks for speed or care makes seconds (and money) weigh this much more or less


@dataclass(frozen=True)
class Settings:
    """What an operator can tune.

    exploration: factor on the standard deviation of the draws; 1 is Thompson's rule, 0 is greedy.
    fade: scores after which the factor has fallen to 0.7 of it, and on with the root of their number; those that are
        forgotten count no more, so with forgetting it never fades out.
    forgetting: weight of an event a decision later; 0.9995 halves it after 1,386 decisions.
    noise: first guess of the variance of a score.
    """

    exploration: float = 0.7
    fade: float = 500.0
    forgetting: float = 0.9995
    noise: float = 0.15


def effective(objective: Objective, profile: TaskProfile) -> Objective:
    """The request's objective, moved by what its text says about haste and care."""
    haste, care = profile.time_sensitivity, profile.accuracy_sensitivity
    if not haste and not care:
        return objective
    return replace(
        objective,
        latency_weight=objective.latency_weight * SENSITIVITY ** (haste - care),
        cost_weight=objective.cost_weight * SENSITIVITY**-care,
    )


class Thompson:
    """Contextual Thompson sampling over K arms; see the module's text for the model."""

    name = "thompson"

    def __init__(self, arms: Sequence[Arm], settings: Settings | None = None):
        self.arms = tuple(arms)
        self.settings = settings or Settings()
        self._names = [arm.name for arm in arms]
        self._index = {name: k for k, name in enumerate(self._names)}
        prior, forgetting = np.array([arm.prior_quality for arm in arms]), self.settings.forgetting
        self.quality = HierarchicalPosterior(prior, D, self.settings.noise, forgetting)
        self.latency = LatencyModel(arms, forgetting)
        self._parts = {
            "quality": self.quality,
            "tokens": self.latency.tokens,
            "ttft": self.latency.ttft,
            "tpot": self.latency.tpot,
        }

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """See base.Policy."""
        for part in self._parts.values():
            part.advance(sequence)
        objectives = [effective(request.objective, request.profile) for request in requests]
        features = np.array([request.profile.features for request in requests])  # [B, D]
        quality, variance = self.quality.predict(features)
        expected = self.latency.expect(requests, features, states)

        by_latency = np.array([[o.latency_weight] for o in objectives])
        by_cost = np.array([[o.cost_weight] for o in objectives])
        mean = quality - by_latency * expected.latency_s - by_cost * expected.cost_usd
        variance = variance + by_latency**2 * expected.latency_variance + by_cost**2 * expected.cost_variance
        spread = self._exploration() * np.sqrt(variance)
        drawn = mean + spread * rng.standard_normal(mean.shape)
        removed = self._removed(requests, objectives, states, expected.latency_s, expected.cost_usd)
        eligible = np.array([[not why for why in row] for row in removed])
        propensity = probability_best(mean, spread, eligible)
        best = np.where(eligible, drawn, -inf).argmax(axis=1).tolist()

        columns = (quality, expected.latency_s, expected.cost_usd, mean, drawn, *expected[:3], propensity, *expected[3:5])
        table = np.array(columns).transpose(1, 2, 0).tolist()  # [B, K, 11], in the order of ArmEstimate's fields
        decisions = []
        for i, request in enumerate(requests):
            whys = removed[i]
            estimates = tuple([ArmEstimate(name, *row, why) for name, row, why in zip(self._names, table[i], whys)])
            arm = self._names[best[i]] if not whys[best[i]] else ""
            given = (request.id, arm, sequence + i, self.name, request.profile, objectives[i], estimates)
            decisions.append(Decision(*given))
        return decisions

    def _exploration(self) -> float:
        """Factor on the standard deviation of the draws; never nothing, or propensities would have no density."""
        return max(self.settings.exploration / sqrt(1 + max(0.0, self.quality.total) / self.settings.fade), 1e-6)

    def _removed(
        self,
        requests: Sequence[Request],
        objectives: Sequence[Objective],
        states: Mapping[str, ModelState],
        latency: Vector,
        cost: Vector,
    ) -> list[list[str]]:
        """[B][K] the limit that takes an arm out of a request's choice, in words; "" if none does."""
        live = [states.get(name, _UNKNOWN) for name in self._names]
        rows = []
        for i, (request, objective) in enumerate(zip(requests, objectives)):
            row = [base.removed_by(arm, request.profile, objective, s) for arm, s in zip(self.arms, live)]
            if objective.max_latency_s < inf or objective.max_cost_usd < inf:
                for k in range(len(row)):
                    row[k] = row[k] or _over(objective, float(latency[i, k]), float(cost[i, k]))
            rows.append(row)
        return rows

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy. An arm that failed gave an answer worth nothing; a client that left says nothing."""
        k = self._index.get(decision.arm)
        if k is None or outcome.status == "rejected":
            return
        if outcome.status == "error":
            self.quality.add(k, decision.profile.features, 0.0, decision.sequence)
        else:
            self.latency.learn(k, decision, outcome)

    def score(self, decision: Decision, score: float, weight: float = 1.0) -> None:
        """See base.Policy."""
        k = self._index.get(decision.arm)
        if k is not None:
            self.quality.add(k, decision.profile.features, score, decision.sequence, weight)

    def state(self) -> base.State:
        """See base.Policy: the sums of every part, named `part.sum`."""
        return {f"{name}.{key}": value for name, part in self._parts.items() for key, value in part.state().items()}

    def restore(self, state: base.State) -> None:
        """See base.Policy."""
        for name, part in self._parts.items():
            prefix = name + "."
            try:
                part.restore({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})
            except ValueError as error:
                raise ValueError(f"policy state, {name}: {error}") from error


_UNKNOWN = ModelState()


def _over(objective: Objective, latency_s: float, cost_usd: float) -> str:
    """The limit on latency or cost that is not kept, in words; "" if both are."""
    if latency_s > objective.max_latency_s:
        return f"expected latency {latency_s:.3g} s is over the limit of {objective.max_latency_s:g} s"
    if cost_usd > objective.max_cost_usd:
        return f"expected cost {cost_usd:.3g} USD is over the limit of {objective.max_cost_usd:g} USD"
    return ""
