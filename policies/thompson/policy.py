"""Thompson sampling on quality, latency and cost, which are learned separately and traded off at the decision.

Quality is a Bayesian linear model of the score on the profile's features, in which the arms share what they have in
common (hierarchical_posterior.py). Latency and cost are modelled in latency.py. With the request's own weights λ,

    utility = quality - λ_latency (TTFT + tokens · TPOT) - λ_cost (prompt · price_in + tokens · price_out).

Its mean is μ, and its variance σ² follows by propagation from the variances of the parts. Each arm that no limit
excludes gets one draw u ~ N(μ, (α σ)²), and the largest draw wins (Thompson, Biometrika 1933; Agrawal and Goyal, ICML
2013). The exploration factor α decays as scores arrive, and rises again when drift.py finds the arm changed. The
draws are normal, so the propensities are exact integrals (propensity.py).

A changed price, weight or limit takes effect at once, and an answer without a score still teaches latency. For
simplicity the model leaves out the joint covariance of the parts, and the load that the other undecided requests of
the same batch will add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

import numpy as np
from numpy.typing import NDArray

from policies import base, constraints
from policies.constraints import Exclusion
from policies.events import ArmEstimate, Decision, Outcome
from policies.profiling.features import D
from policies.thompson import kernels
from policies.thompson.drift import Drift
from policies.thompson.hierarchical_posterior import HierarchicalPosterior
from policies.thompson.latency import UNKNOWN_STATE, LatencyModel
from policies.thompson.posterior import LinearPosterior
from policies.thompson.propensity import QUADRATURE
from policies.types import Arm, ModelState, Objective, Request, Vector

# Row of the propensity in the table of estimates, whose rows are the fields of ArmEstimate after the arm's name.
PROPENSITY = ArmEstimate._fields.index("propensity") - 1


@dataclass(frozen=True)
class ThompsonSettings:
    """What an operator can tune.

    exploration: factor on the standard deviation of the draws; 1 is Thompson's rule, 0 is greedy.
    fade: exploration decays as 1/√(1 + n/fade), n being the scores of all arms since this arm was added. With
        forgetting, n is bounded and exploration never stops.
    forgetting: weight of an event one decision later; 0.9995 halves it after 1,386 decisions.
    noise: first guess of the variance of a score.
    keep: number of scores that an arm's past still counts for after the arm was found changed.
    least_propensity: smallest probability of every arm that no limit excludes. Such an arm is sometimes chosen
        whatever its estimate. That costs some reward, and lets any other policy be evaluated from the log
        (offpolicy.py).
    """

    exploration: float = 0.7
    fade: float = 500.0
    forgetting: float = 0.9995
    noise: float = 0.15
    keep: float = 10.0
    least_propensity: float = 0.0


class Thompson:
    """Contextual Thompson sampling over K arms; the module's text states the model."""

    name = "thompson"

    def __init__(self, arms: Sequence[Arm], settings: ThompsonSettings | None = None):
        self.arms = tuple(arms)
        self.settings = settings or ThompsonSettings()
        self._names = [arm.name for arm in arms]
        self._index = {name: k for k, name in enumerate(self._names)}
        prior = base.prior_quality(arms)
        forgetting = self.settings.forgetting
        self.quality = HierarchicalPosterior(prior, D, self.settings.noise, forgetting)
        self.latency = LatencyModel(arms, forgetting)
        self.drift = Drift(len(arms))
        self._posteriors: tuple[LinearPosterior, ...] = (
            self.quality,
            self.latency.tokens,
            self.latency.ttft,
            self.latency.tpot,
        )
        # The keys begin the names of the arrays in `state`.
        self._parts: dict[str, LinearPosterior | Drift] = {
            "quality": self.quality,
            "drift": self.drift,
            "tokens": self.latency.tokens,
            "ttft": self.latency.ttft,
            "tpot": self.latency.tpot,
        }

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """See base.Policy."""
        self.advance(sequence)
        objectives = [request.objective for request in requests]
        features = np.array(
            [request.profile.features for request in requests], np.float64
        )  # [B, D]
        asked = self.latency.asked(requests, objectives)
        score = self.quality.predict(features)
        expected = self.latency.expect(asked, features, states)
        removed, eligible = self._removed(requests, objectives, states, expected)
        normal = rng.standard_normal(eligible.shape)
        table, best = kernels.draw(
            score, expected, asked, self._exploration(), normal, eligible, QUADRATURE
        )
        if self.settings.least_propensity > 0:
            _ensure_propensity(
                self.settings.least_propensity, best, table[PROPENSITY], eligible, rng
            )

        names = self._names
        arms = len(names)
        numbers = table.reshape(len(table), -1).tolist()  # [11][B·K]
        fields = zip(names * len(requests), *numbers, chain.from_iterable(removed))
        estimates = list(map(ArmEstimate._make, fields))
        known = self.drift.known
        decisions = []
        chosen = best.tolist()
        for i, (request, row, k) in enumerate(zip(requests, removed, chosen)):
            decision = Decision(
                request.id,
                "" if row[k] else names[k],
                sequence + i,
                self.name,
                request.profile,
                request.objective,
                tuple(estimates[i * arms : (i + 1) * arms]),
                known=known[k],
            )
            decisions.append(decision)
        return decisions

    def _exploration(self) -> Vector:
        """[K] factor on the standard deviation of the draws; it stays positive, so that the draws have a density."""
        return kernels.exploration_factor(
            self.settings.exploration, self.settings.fade, self.quality.total_scores
        )

    def _removed(
        self,
        requests: Sequence[Request],
        objectives: Sequence[Objective],
        states: Mapping[str, ModelState],
        expected: Vector,
    ) -> tuple[list[list[str]], NDArray[np.bool_]]:
        """[B][K] the sentence for the limit that excludes an arm from a request, or ""; [B, K] whether it is ""."""
        live = [states.get(name, UNKNOWN_STATE) for name in self._names]
        eligible = np.ones((len(requests), len(live)), np.bool_)
        rows = []
        for i, (request, objective) in enumerate(zip(requests, objectives)):
            row = constraints.removed(self.arms, request.profile, objective, live)
            if objective.max_latency_s < inf or objective.max_cost_usd < inf:
                latency = expected[i, kernels.LATENCY].tolist()
                cost = expected[i, kernels.COST].tolist()
                for k, reason in enumerate(row):
                    if not reason:
                        row[k] = _over(objective, latency[k], cost[k])
            if any(row):
                eligible[i] = [not reason for reason in row]
            rows.append(row)
        return rows, eligible

    def advance(self, sequence: int) -> None:
        """See base.Policy."""
        for posterior in self._posteriors:
            posterior.advance(sequence)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy. A failed arm's answer scores 0; a disconnected client's answer gets no score."""
        k = self._index.get(decision.arm)
        if k is None or outcome.status == "rejected":
            return
        if outcome.status == "error":
            self.score(decision, 0.0)
        else:
            self.latency.learn(k, decision, outcome)

    def score(
        self, decision: Decision, score: float, weight: float = 1.0, again: bool = False
    ) -> None:
        """See base.Policy."""
        k = self._index.get(decision.arm)
        if k is None:
            return
        self.quality.add(k, decision.profile.features, score, decision.sequence, weight)
        # The drift test needs the expected score that this policy logged; other policies log another one, or none.
        mine = decision.policy_version.startswith(self.name)
        if abs(weight) != 1.0 or not mine:
            return
        if again or weight < 0.0:
            self.drift.recount(k, int(weight))
        elif self.drift.observe(k, decision.estimate().quality, score, decision.known):
            self.quality.discount(k, self.settings.keep)

    def discount(self, arm: str, events: float) -> None:
        """See base.EventLearner."""
        k = self._index.get(arm)
        if k is None:
            return
        for posterior in self._posteriors:
            posterior.discount(k, events)

    def state(self) -> base.State:
        """See base.Policy: the sums of every part, named `part.sum`."""
        arrays = {}
        for name, part in self._parts.items():
            for key, value in part.state().items():
                arrays[f"{name}.{key}"] = value
        return arrays

    def restore(self, state: base.State) -> None:
        """See base.Policy."""
        for name, part in self._parts.items():
            prefix = name + "."
            mine = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            try:
                part.restore(mine)
            except ValueError as error:
                raise ValueError(f"policy state, {name}: {error}") from error


def _ensure_propensity(
    least: float,
    best: NDArray[np.int64],
    propensity: Vector,
    eligible: NDArray[np.bool_],
    rng: np.random.Generator,
) -> None:
    """Give every eligible arm a propensity of at least `least`, in place.

    A share of the requests goes to an eligible arm drawn uniformly; choices [B] and propensities [B, K] change with it.
    """
    count = eligible.sum(axis=1)
    share = np.minimum(least * count, 1.0)  # of the requests
    uniform = np.where(eligible, rng.random(eligible.shape), -1.0).argmax(axis=1)
    best[:] = np.where(rng.random(len(best)) < share, uniform, best)
    each = np.divide(share, count, out=np.zeros(len(best)), where=count > 0)
    propensity[:] = (1.0 - share)[:, None] * propensity + each[:, None] * eligible


def _over(objective: Objective, latency_s: float, cost_usd: float) -> str:
    """The sentence for the limit on latency or cost that an arm exceeds; "" if it exceeds none."""
    if latency_s > objective.max_latency_s:
        return Exclusion.LATENCY.sentence(latency_s, objective.max_latency_s)
    if cost_usd > objective.max_cost_usd:
        return Exclusion.COST.sentence(cost_usd, objective.max_cost_usd)
    return ""
