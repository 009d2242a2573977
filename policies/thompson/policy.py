"""Thompson sampling on quality, availability, latency and cost, which are learned separately.

Quality is the score of an answer without a visible flaw: a Bayesian linear model on the profile's features, in which
the arms share what they have in common (hierarchical_posterior.py). Availability is the probability of no visible flaw
(availability.py). Latency and cost are modelled in latency.py. With the request's own weights λ,

    utility = availability · quality - λ_latency (TTFT + tokens · TPOT)
              - λ_cost (prompt · price_in + tokens · price_out) - scarcity.

Scarcity is what the request pays for its place at an arm that has too many requests (scarcity.py). The mean of
this is μ. Each arm that no limit excludes gets one draw u ~ N(μ, s²), and the largest draw wins (Thompson, Biometrika
1933; Agrawal and Goyal, ICML 2013). An exploring choice pays only if the answer will show something. So s² is α² times
the variance of each part as far as the answer will show it: that of availability and latency always, that of the
quality with the factor √c. Here c is the request's chance to be scored; the root was compared with c itself
(benchmarks/LOG.md, 2026-11-29). α decays as scores arrive, and rises again when drift.py finds the arm changed. The
draws are normal, so the propensities are exact integrals (propensity.py). A request of a small sample that will be
scored may bear more: it says with which probability its arm is drawn uniformly.

A changed price, weight or limit takes effect at once, and an answer without a score still teaches availability and
latency. For simplicity the model leaves out the joint covariance of the parts, and the load that the other undecided
requests of the same batch will add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf

import numpy as np
from numpy.typing import NDArray

from policies import base, constraints
from policies.constraints import Exclusion
from policies.events import ArmEstimate, Decision, Outcome, visible_flaw
from policies.profiling.prior import DeclaredQuality, prior_weights
from policies.thompson import kernels
from policies.thompson.availability import Availability
from policies.thompson.drift import Drift
from policies.thompson.hierarchical_posterior import HierarchicalPosterior
from policies.thompson.latency import UNKNOWN_STATE, LatencyModel
from policies.thompson.posterior import LinearPosterior
from policies.thompson.propensity import QUADRATURE
from policies.thompson.smearing import Smearing
from policies.types import Arm, ModelState, Objective, Request, Vector

CLOCK = "clock.latest"  # name of the array that holds the clock of scores
# Share of a score for the request of an API key that narrows exploration. A key that gives false scores is found out
# after some hundred decisions (reputation.py), and until then only exploration corrects what they taught.
KEYED_TRUST = 0.4


@dataclass(frozen=True)
class ThompsonSettings:
    """What an operator can tune.

    exploration: factor on the standard deviation of the draws; 1 is Thompson's rule, 0 is greedy.
    fade: exploration decays as 1/√(1 + n/fade), n being the scores of all arms since this arm was added. A score for
        the request of an API key counts for KEYED_TRUST. With forgetting, n is bounded and exploration never stops.
    forgetting: weight of a score one score later, and of a latency one decision later; 0.9995 halves it after 1,386.
    noise: first guess of the variance of a score.
    keep: number of scores that an arm's past still counts for after the arm was found changed.
    least_propensity: smallest probability of every arm that no limit excludes, if the answer will be scored. Such an
        arm is sometimes chosen whatever its estimate. That costs some reward, keeps every arm's estimate fresh, and
        lets any other policy be evaluated from the log (offpolicy.py).
    """

    exploration: float = 0.7
    fade: float = 200.0
    forgetting: float = 0.9995
    noise: float = 0.15
    keep: float = 10.0
    least_propensity: float = 0.0002


class Thompson:
    """Contextual Thompson sampling over K arms; the module's text states the model."""

    name = "thompson"

    def __init__(self, arms: Sequence[Arm], settings: ThompsonSettings | None = None):
        self.arms = tuple(arms)
        self.settings = settings or ThompsonSettings()
        self._names = [arm.name for arm in arms]
        self._index = {name: k for k, name in enumerate(self._names)}
        self._variants = [arm for arm in arms if arm.variant_of]
        forgetting = self.settings.forgetting
        self.quality = HierarchicalPosterior(
            prior_weights(arms), self.settings.noise, forgetting
        )
        self._declared = DeclaredQuality(arms, self.settings.noise)
        self.latency = LatencyModel(arms, forgetting)
        self.drift = Drift(len(arms))
        self.availability = Availability(len(arms))
        self._exploration = (
            float(self.settings.exploration),
            float(self.settings.fade),
            float(self.settings.least_propensity),
        )
        self._scored = -1  # clock of the scores, see base.EventLearner.advance
        self._latencies: tuple[LinearPosterior, ...] = (
            self.latency.tokens,
            self.latency.ttft,
            self.latency.tpot,
        )
        self._smearings = (self.latency.smearing, self.latency.pace_smearing)
        # The keys begin the names of the arrays in `state`.
        self._parts: dict[str, LinearPosterior | Drift | Availability | Smearing] = {
            "quality": self.quality,
            "drift": self.drift,
            "availability": self.availability,
            "tokens": self.latency.tokens,
            "ttft": self.latency.ttft,
            "tpot": self.latency.tpot,
            "smearing": self.latency.smearing,
            "pace_smearing": self.latency.pace_smearing,
        }

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """See base.Policy."""
        self.advance(sequence, self._scored)
        objectives = [request.objective for request in requests]
        features = np.array(
            [request.profile.features for request in requests], np.float64
        )  # [B, D]
        asked = self.latency.asked(requests, objectives)
        quality = self._declared.combined(self.quality.predict(features), requests)
        live = [states.get(name, UNKNOWN_STATE) for name in self._names]
        total = constraints.total_load(self._variants, states)
        expected = self.latency.expect(asked, features, live, total)
        removed, eligible = self._removed(requests, objectives, live, expected)
        table, best = kernels.draw(
            quality,
            self.availability.observed(),
            expected,
            asked,
            self._exploration,
            self.quality.total_scores,
            rng.standard_normal(eligible.shape),
            rng.random((len(requests), 2)),
            eligible,
            QUADRATURE,
        )
        names = self._names
        arms = len(names)
        *numbers, available = table.reshape(len(table), -1).tolist()
        fields = zip(
            names * len(requests),
            *numbers,  # [11][B·K]
            chain.from_iterable(removed),
            available,
        )
        estimates = list(map(ArmEstimate._make, fields))
        known = self.drift.known
        decisions = []
        chosen = best.tolist()
        for i, (request, row, k) in enumerate(zip(requests, removed, chosen)):
            factor, pace_factor = self.latency.recorded_factors(k)
            decision = Decision(
                request.id,
                "" if row[k] else names[k],
                sequence + i,
                self.name,
                request.profile,
                request.objective,
                tuple(estimates[i * arms : (i + 1) * arms]),
                known=known[k],
                scored=self._scored,
                score_chance=request.score_chance,
                explore=request.explore,
                smearing=factor,
                pace_smearing=pace_factor,
            )
            decisions.append(decision)
        return decisions

    def _removed(
        self,
        requests: Sequence[Request],
        objectives: Sequence[Objective],
        live: Sequence[ModelState],
        expected: Vector,
    ) -> tuple[list[list[str]], NDArray[np.bool_]]:
        """[B][K] the sentence for the limit that excludes an arm from a request, or ""; [B, K] whether it is ""."""
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

    def advance(self, sequence: int, scored: int = -1) -> None:
        """See base.Policy."""
        self._scored = scored
        self.availability.advance(sequence)
        for smearing in self._smearings:
            smearing.advance(sequence)
        for posterior in self._latencies:
            posterior.advance(sequence)
        self.quality.advance(sequence if scored < 0 else scored)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy. A disconnected client's answer teaches latency alone."""
        k = self._index.get(decision.arm)
        if k is None or outcome.status == "rejected":
            return
        if outcome.status != "disconnected":
            flawed = visible_flaw(decision, outcome) != ""
            self.availability.observe(k, decision.sequence, flawed)
        if outcome.status != "error":
            self.latency.learn(k, decision, outcome)

    def score(
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """See base.Policy."""
        k = self._index.get(decision.arm)
        if k is None:
            return
        at = decision.scored
        if at < 0:  # not recorded: the age is unknown
            at = decision.sequence if self._scored < 0 else self._scored
        trust = KEYED_TRUST if decision.owner else 1.0
        self.quality.add(k, decision.profile.features, score, at, weight, trust)
        if again or weight < 0.0:
            self.drift.recount(k, int(weight))
            return
        if expected is None:
            # Only Thompson sampling logs an expectation of quality.
            if not decision.policy_version.startswith(self.name):
                return
            expected = decision.estimate().unflawed_quality
        if self.drift.observe(k, expected, score, decision.known):
            self.quality.discount(k, self.settings.keep)

    def discount(self, arm: str, events: float) -> None:
        """See base.EventLearner."""
        k = self._index.get(arm)
        if k is None:
            return
        self.availability.discount(k, events)
        for smearing in self._smearings:
            smearing.discount(k, events)
        for posterior in (self.quality, *self._latencies):
            posterior.discount(k, events)

    def state(self) -> base.State:
        """See base.Policy: the sums of every part, named `part.sum`."""
        arrays = {}
        for name, part in self._parts.items():
            for key, value in part.state().items():
                arrays[f"{name}.{key}"] = value
        arrays[CLOCK] = np.array([float(self._scored)])
        return arrays

    def restore(self, state: base.State) -> None:
        """See base.Policy."""
        clock = state.get(CLOCK)
        if clock is None:  # of an earlier release, whose quality forgot by decisions
            state = base.restart_clock(state, "quality")
        self._scored = int(clock[0]) if clock is not None else 0
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


def _over(objective: Objective, latency_s: float, cost_usd: float) -> str:
    """The sentence for the limit on latency or cost that an arm exceeds; "" if it exceeds none."""
    if latency_s > objective.max_latency_s:
        return Exclusion.LATENCY.sentence(latency_s, objective.max_latency_s)
    if cost_usd > objective.max_cost_usd:
        return Exclusion.COST.sentence(cost_usd, objective.max_cost_usd)
    return ""
