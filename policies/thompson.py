"""Thompson sampling on quality, latency and cost, which are learned apart and traded off at the decision.

Quality is a Bayesian linear model of the score on the profile's features, in which the arms share what they have in
common (hierarchy.py); latency and cost are those of latency.py. With the request's own weights λ,

    utility = quality - λ_latency (TTFT + tokens · TPOT) - λ_cost (prompt · price_in + tokens · price_out),

its mean μ and its variance σ² by propagation of the parts' variances, one draw u ~ N(μ, (α σ)²) for each arm that no
limit removes, and the largest draw wins (Thompson, Biometrika 1933; Agrawal and Goyal, ICML 2013). The factor α of an
arm fades as scores come in; it is back when the arm has changed (drift.py). As the draws are normal, the propensities
are exact integrals (propensity.py).

So a changed price, weight or limit takes effect at once, and an answer without a score still teaches latency.
Given up for simplicity: the parts' joint covariance, and load that other undecided requests of one batch will add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import inf

import numpy as np
from numpy.typing import NDArray

from policies import base, kernels
from policies.drift import Drift
from policies.features import D
from policies.hierarchy import HierarchicalPosterior
from policies.latency import UNKNOWN, LatencyModel
from policies.posterior import LinearPosterior
from policies.propensity import QUADRATURE
from policies.types import Arm, ArmEstimate, Decision, ModelState, Objective, Outcome, Request, Vector

PROPENSITY = ArmEstimate._fields.index("propensity") - 1  # its row in the table of estimates, which has no names
_ESTIMATE = partial(tuple.__new__, ArmEstimate)  # from its values in their order; a third of its price
KNOWN = 1000  # kinds of limits that are remembered
_NOTHING: tuple[list[str], bytes] = [], b""


@dataclass(frozen=True)
class Settings:
    """What an operator can tune.

    exploration: factor on the standard deviation of the draws; 1 is Thompson's rule, 0 is greedy.
    fade: scores, of all arms since this one appeared, after which its factor has fallen to 0.7, and on with the root
        of their number; those that are forgotten count no more, so with forgetting it never fades out.
    forgetting: weight of an event a decision later; 0.9995 halves it after 1,386 decisions.
    noise: first guess of the variance of a score.
    keep: scores that an arm's past still counts for when it is found to have changed.
    least_propensity: of every arm that no limit removes; each is then now and then chosen whatever is thought of it,
        which costs something, but lets any other policy be judged from the log (offpolicy.py).
    """

    exploration: float = 0.7
    fade: float = 500.0
    forgetting: float = 0.9995
    noise: float = 0.15
    keep: float = 10.0
    least_propensity: float = 0.0


class Thompson:
    """Contextual Thompson sampling over K arms; see the module's text for the model."""

    name = "thompson"

    def __init__(self, arms: Sequence[Arm], settings: Settings | None = None):
        self.arms = tuple(arms)
        self.settings = settings or Settings()
        self._names = [arm.name for arm in arms]
        self._index = {name: k for k, name in enumerate(self._names)}
        self._shortest = min([arm.context_tokens for arm in arms])
        self._known: dict[tuple[object, ...], tuple[list[str], bytes]] = {}  # what limits of this kind take out
        prior, forgetting = base.prior_quality(arms), self.settings.forgetting
        self.quality = HierarchicalPosterior(prior, D, self.settings.noise, forgetting)
        self.latency, self.drift = LatencyModel(arms, forgetting), Drift(len(arms))
        self._parts: dict[str, LinearPosterior | Drift] = {
            "quality": self.quality,
            "drift": self.drift,
            "tokens": self.latency.tokens,
            "ttft": self.latency.ttft,
            "tpot": self.latency.tpot,
        }

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """See base.Policy."""
        self.advance(sequence)
        objectives = [request.objective for request in requests]
        features = np.array([request.profile.features for request in requests], np.float64)  # [B, D]
        asked = self.latency.asked(requests, objectives)
        score = self.quality.predict(features)
        expected = self.latency.expect(asked, features, states)
        removed, eligible = self._removed(requests, objectives, states, expected)
        normal = rng.standard_normal(eligible.shape)
        table, best = kernels.draw(score, expected, asked, self._exploration(), normal, eligible, QUADRATURE)
        if self.settings.least_propensity > 0:
            _at_least(self.settings.least_propensity, best, table[PROPENSITY], eligible, rng)

        numbers = table.reshape(len(table), -1).tolist()
        estimates = map(_ESTIMATE, zip(self._names * len(requests), *numbers, chain.from_iterable(removed)))
        by_request = zip(*[estimates] * len(self._names))  # K at a time
        made = zip(requests, objectives, by_request, removed, best.tolist())
        name, known = self.name, self.drift.known
        return [
            Decision(
                q.id, "" if row[k] else self._names[k], sequence + i, name, q.profile, objective, found, known=known[k]
            )
            for i, (q, objective, found, row, k) in enumerate(made)
        ]

    def _exploration(self) -> Vector:
        """[K] factor on the standard deviation of the draws; never nothing, or propensities would have no density."""
        return kernels.faded(self.settings.exploration, self.settings.fade, self.quality.heard)

    def _removed(
        self,
        requests: Sequence[Request],
        objectives: Sequence[Objective],
        states: Mapping[str, ModelState],
        expected: Vector,
    ) -> tuple[list[list[str]], NDArray[np.bool_]]:
        """[B][K] the limit that takes an arm out of a request's choice, in words, or ""; and [B, K] where none does."""
        live = [states.get(name, UNKNOWN) for name in self._names]
        healthy = tuple([state.healthy for state in live])
        rows, masks = [], []
        for i, (request, objective) in enumerate(zip(requests, objectives)):
            profile, row = request.profile, list[str]()
            needed = profile.prompt_tokens + profile.max_output_tokens
            if alike := needed < self._shortest:  # what holds for one, holds for all that ask alike
                key = profile.task, objective.models, objective.unavailable, healthy
                row, mask = self._known.get(key, _NOTHING)
            if not row:
                row = base.removed(self.arms, profile, objective, live)
                mask = _free(row)
                if alike:
                    if len(self._known) >= KNOWN:
                        self._known.clear()
                    self._known[key] = row, mask
            if objective.max_latency_s < inf or objective.max_cost_usd < inf:
                latency, cost = expected[i, kernels.LATENCY].tolist(), expected[i, kernels.COST].tolist()
                row = [why or _over(objective, *spent) for why, *spent in zip(row, latency, cost)]
                mask = _free(row)
            rows.append(row)
            masks.append(mask)
        return rows, np.frombuffer(bytearray().join(masks), np.bool_).reshape(len(rows), len(live))

    def advance(self, sequence: int) -> None:
        """See base.Policy."""
        for part in (self.quality, self.latency.tokens, self.latency.ttft, self.latency.tpot):
            part.advance(sequence)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy. An arm that failed gave an answer worth nothing; a client that left says nothing."""
        k = self._index.get(decision.arm)
        if k is None or outcome.status == "rejected":
            return
        if outcome.status == "error":
            self.score(decision, 0.0)
        else:
            self.latency.learn(k, decision, outcome)

    def score(self, decision: Decision, score: float, weight: float = 1.0, again: bool = False) -> None:
        """See base.Policy."""
        k = self._index.get(decision.arm)
        if k is None:
            return
        self.quality.add(k, decision.profile.features, score, decision.sequence, weight)
        if abs(weight) != 1.0 or not decision.policy_version.startswith(self.name):  # others expect what they like
            return
        if again or weight < 0.0:
            self.drift.recount(k, int(weight))
        elif self.drift.observe(k, decision.estimate().quality, score, decision.known):
            self.quality.cut(k, self.settings.keep)

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


def _at_least(
    least: float, best: NDArray[np.int64], propensity: Vector, eligible: NDArray[np.bool_], rng: np.random.Generator
) -> None:
    """Change choice [B] and propensities [B, K]: now and then any eligible arm is taken, each as often."""
    count = eligible.sum(axis=1)
    share = np.minimum(least * count, 1.0)  # of the requests
    anyone = np.where(eligible, rng.random(eligible.shape), -1.0).argmax(axis=1)
    best[:] = np.where(rng.random(len(best)) < share, anyone, best)
    each = np.divide(share, count, out=np.zeros(len(best)), where=count > 0)
    propensity[:] = (1.0 - share)[:, None] * propensity + each[:, None] * eligible


def _free(row: Sequence[str]) -> bytes:
    """[K] whether nothing takes the arm out, a byte each, as numpy holds it."""
    return bytes([not why for why in row])


def _over(objective: Objective, latency_s: float, cost_usd: float) -> str:
    """The limit on latency or cost that is not kept, in words; "" if both are."""
    if latency_s > objective.max_latency_s:
        return f"expected latency {latency_s:.3g} s is over the limit of {objective.max_latency_s:g} s"
    if cost_usd > objective.max_cost_usd:
        return f"expected cost {cost_usd:.3g} USD is over the limit of {objective.max_cost_usd:g} USD"
    return ""
