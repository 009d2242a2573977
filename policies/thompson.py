"""Thompson sampling on quality, latency and cost, which are learned apart and traded off at the decision.

For each arm: a Bayesian linear model (posterior.py) of the score on the profile's features, of log TTFT and log TPOT
on prompt length and load, and of what log output tokens are beyond those that the profile expects, on the features.
Then, with the request's own weights λ,

    utility = quality - λ_latency (TTFT + tokens · TPOT) - λ_cost (prompt · price_in + tokens · price_out),

its mean μ and its variance σ² by propagation of the parts' variances, one draw u ~ N(μ, σ²) for each arm that no
limit removes, and the largest draw wins (Thompson, Biometrika 1933; Agrawal and Goyal, ICML 2013). As the draws are
normal, the propensities are exact integrals (propensity.py).

So a changed price, weight or limit takes effect at once, and an answer without a score still teaches latency.
Given up for simplicity: the parts' joint covariance, and load that other undecided requests of one batch will add.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log, log1p, sqrt

import numpy as np

from policies import base
from policies.features import D, latency_features
from policies.hierarchy import HierarchicalPosterior
from policies.posterior import LinearPosterior
from policies.propensity import probability_best
from policies.types import Arm, ArmEstimate, Decision, ModelState, Objective, Outcome, Request, TaskProfile, Vector

SENSITIVITY = 3.0  # a text that asks for speed or care makes seconds (and money) weigh this much more or less
DOUBT = 0.25  # most variance of a logarithm: beyond it a normal draw would promise negative latencies
PRIOR_TTFT_S, PRIOR_TPOT_S = 0.1, 0.01


@dataclass(frozen=True)
class Settings:
    """What an operator can tune.

    exploration: factor on the standard deviation of the draws; 1 is Thompson's rule, 0 is greedy.
    fade: scores after which the factor has fallen to 0.7 of it, and on with the root of their number; those that are
        forgotten count no more, so with forgetting it never fades out.
    forgetting: weight of an event a decision later; 0.9995 halves it after 1,386 decisions.
    noise: first guess of the variance of a score.
    weight_deviation: prior standard deviation of a quality weight, where arms share nothing.
    shared: whether the arms' quality models share what they have in common (hierarchy.py).
    """

    exploration: float = 1.0
    fade: float = inf
    forgetting: float = 0.9995
    noise: float = 0.1
    weight_deviation: float = 0.4
    shared: bool = False


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


def _split(estimate: ArmEstimate, outcome: Outcome) -> tuple[float, float]:
    """TTFT and TPOT of an answer in seconds; 0 where it does not tell.

    An answer in one piece shows only its whole latency; it is shared out as the decision expected it to be.
    """
    further = outcome.output_tokens - 1
    if outcome.ttft_s > 0:
        return outcome.ttft_s, (outcome.latency_s - outcome.ttft_s) / further if further > 0 else 0.0
    expected = estimate.ttft_s + max(further, 0) * estimate.tpot_s
    if expected <= 0 or outcome.latency_s <= 0:
        return 0.0, 0.0
    ratio = outcome.latency_s / expected
    return estimate.ttft_s * ratio, estimate.tpot_s * ratio if further > 0 else 0.0


class Thompson:
    """Contextual Thompson sampling over K arms; see the module's text for the model."""

    name = "thompson"

    def __init__(self, arms: Sequence[Arm], settings: Settings | None = None):
        self.arms = tuple(arms)
        self.configure(settings or Settings())

    def configure(self, settings: Settings) -> None:
        """Start over with other settings; `restore` brings back what was learned."""
        self.settings = settings
        self._index = {arm.name: k for k, arm in enumerate(self.arms)}
        forgetting = settings.forgetting
        self.quality = self._quality(settings)
        self.tokens = LinearPosterior(np.zeros((len(self.arms), D)), np.full(D, 1.0), 0.2, forgetting)
        precision = np.array([0.5, 4.0, 16.0, 16.0])
        prior = np.array([log(PRIOR_TTFT_S), 0.2, 0.5, 0.2])
        self.ttft = LinearPosterior(np.tile(prior, (len(self.arms), 1)), precision, 0.2, forgetting)
        prior = np.array([log(PRIOR_TPOT_S), 0.0, 0.3, 0.2])
        self.tpot = LinearPosterior(np.tile(prior, (len(self.arms), 1)), precision, 0.2, forgetting)
        self._parts = {"quality": self.quality, "tokens": self.tokens, "ttft": self.ttft, "tpot": self.tpot}

    def _quality(self, settings: Settings) -> LinearPosterior:
        prior = np.array([arm.prior_quality for arm in self.arms])
        if settings.shared:
            return HierarchicalPosterior(prior, D, settings.noise, settings.forgetting)
        bias, weight = np.zeros((len(self.arms), D)), np.full(D, settings.weight_deviation**-2)
        bias[:, 0], weight[0] = prior, 4.0
        return LinearPosterior(bias, weight, settings.noise, settings.forgetting)

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """See base.Policy."""
        for part in self._parts.values():
            part.advance(sequence)
        objectives = [effective(request.objective, request.profile) for request in requests]
        features = np.stack([request.profile.features for request in requests])  # [B, D]
        loads, total_load = self._loads(requests, states)

        quality, quality_var = self.quality.predict(features)
        tokens, tokens_var = self._output_tokens(requests, features)
        ttft, ttft_var, tpot, tpot_var = self._pace(requests, loads, total_load)
        prompts = np.array([request.profile.prompt_tokens for request in requests])[:, None]
        decoding = np.maximum(tokens - 1, 0) * tpot
        latency = ttft + decoding
        latency_var = ttft**2 * ttft_var + decoding**2 * (tpot_var + tokens_var)
        price = np.array([arm.output_price_usd for arm in self.arms])
        cost = prompts * np.array([arm.prompt_price_usd for arm in self.arms]) + tokens * price

        by_latency = np.array([o.latency_weight for o in objectives])[:, None]
        by_cost = np.array([o.cost_weight for o in objectives])[:, None]
        mean = quality - by_latency * latency - by_cost * cost
        slow, dear = by_latency**2 * latency_var, by_cost**2 * (tokens * price) ** 2 * tokens_var
        deviation = np.sqrt(quality_var + slow + dear)
        faded = self.settings.exploration / sqrt(1 + max(0.0, float(self.quality.count.sum())) / self.settings.fade)
        spread = max(faded, 1e-6) * deviation
        draws = spread * rng.standard_normal(mean.shape)
        removed = self._removed(requests, objectives, states, latency, cost)
        eligible = np.array([[not why for why in row] for row in removed])
        propensity = probability_best(mean, spread, eligible)
        best = np.where(eligible, mean + draws, -np.inf).argmax(axis=1)

        # what each part must have been, most likely, for the utility to come out as drawn
        share = draws / deviation**2
        sampled_quality, sampled_latency = quality + quality_var * share, latency - by_latency * latency_var * share
        columns = (
            *(quality, sampled_quality, latency, np.maximum(sampled_latency, 0), cost, mean, mean + draws),
            *(ttft, tpot, tokens, propensity, loads, np.broadcast_to(total_load[:, None], mean.shape)),
        )
        table = np.stack(columns, axis=2).tolist()  # [B, K, 13], in the order of ArmEstimate's fields
        names = [arm.name for arm in self.arms]
        return [
            Decision(
                id=request.id,
                arm=names[best[i]] if eligible[i, best[i]] else "",
                sequence=sequence + i,
                policy_version=self.name,
                profile=request.profile,
                objective=objectives[i],
                estimates=tuple(
                    ArmEstimate(name, *row, why)  # type: ignore[call-arg]
                    for name, row, why in zip(names, table[i], removed[i], strict=True)
                ),
            )
            for i, request in enumerate(requests)
        ]

    def _loads(self, requests: Sequence[Request], states: Mapping[str, ModelState]) -> tuple[Vector, Vector]:
        """Requests in flight per replica [B, K] and over all arms [B], as each request will meet them.

        Those of the same batch that name their arm count for the others: they are as good as in flight.
        """
        named = np.zeros((len(requests), len(self.arms)))
        for i, request in enumerate(requests):
            if request.forced and (k := self._index.get(request.objective.models[0])) is not None:
                named[i, k] = 1.0
        others = named.sum(axis=0) - named
        replicas = np.array([max(1, states.get(arm.name, ModelState()).replicas) for arm in self.arms])
        total = float(sum(state.in_flight for state in states.values()))
        return np.array([base.load(arm, states) for arm in self.arms]) + others / replicas, total + others.sum(axis=1)

    def _output_tokens(self, requests: Sequence[Request], features: Vector) -> tuple[Vector, Vector]:
        """Expected answer length [B, K] and the variance of its logarithm, within what client and context allow."""
        log_tokens, variance = self.tokens.predict(features)
        usual = np.array([log1p(request.profile.output_tokens) for request in requests])[:, None]
        tokens = np.expm1(usual + log_tokens + self.tokens.noise / 2)
        context = np.array([arm.context_tokens for arm in self.arms])
        room = np.array(
            [np.minimum(context - r.profile.prompt_tokens, r.profile.max_output_tokens or context) for r in requests]
        )
        # an answer that the limit will cut off has that length, without doubt
        doubt = np.where(tokens < room, np.minimum(variance, DOUBT), 0.0)
        return np.clip(tokens, 1.0, np.maximum(room, 1)), doubt

    def _pace(self, requests: Sequence[Request], loads: Vector, total_load: Vector) -> tuple[Vector, ...]:
        """TTFT and TPOT in seconds [B, K], each followed by the variance of its logarithm."""
        prompts = np.repeat([float(r.profile.prompt_tokens) for r in requests], len(self.arms))
        x = latency_features(prompts, loads.ravel(), np.repeat(total_load, len(self.arms))).reshape(*loads.shape, -1)
        out: list[Vector] = []
        for part in (self.ttft, self.tpot):
            mean, variance = part.predict(x)
            out += [np.exp(np.clip(mean + part.noise / 2, -12, 8)), np.minimum(variance, DOUBT)]
        return tuple(out)

    def _removed(
        self,
        requests: Sequence[Request],
        objectives: Sequence[Objective],
        states: Mapping[str, ModelState],
        latency: Vector,
        cost: Vector,
    ) -> list[list[str]]:
        """[B][K] the limit that takes an arm out of a request's choice, in words; "" if none does."""
        default, rows = ModelState(), []
        for i, (request, objective) in enumerate(zip(requests, objectives, strict=True)):
            row = []
            for k, arm in enumerate(self.arms):
                why = base.removed_by(arm, request.profile, objective, states.get(arm.name, default))
                if not why and latency[i, k] > objective.max_latency_s:
                    why = f"expected latency {latency[i, k]:.3g} s is over the limit of {objective.max_latency_s:g} s"
                if not why and cost[i, k] > objective.max_cost_usd:
                    why = f"expected cost {cost[i, k]:.3g} USD is over the limit of {objective.max_cost_usd:g} USD"
                row.append(why)
            rows.append(row)
        return rows

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy. An arm that failed gave an answer worth nothing; a client that left says nothing."""
        k = self._index.get(decision.arm)
        if k is None or outcome.status == "rejected":
            return
        estimate, profile, at = decision.estimate(), decision.profile, decision.sequence
        if outcome.status == "error":
            self.quality.add(k, profile.features, 0.0, at)
            return
        ttft_s, pace = _split(estimate, outcome)
        if ttft_s <= 0:
            return
        prompt = float(outcome.prompt_tokens or profile.prompt_tokens)
        x = latency_features(np.array([prompt]), np.array([estimate.load]), np.array([estimate.total_load]))[0]
        self.ttft.add(k, x, log(ttft_s), at)
        if pace > 0:
            self.tpot.add(k, x, log(pace), at, weight=min(1.0, (outcome.output_tokens - 1) / 8))
        if outcome.status == "ok" and outcome.output_tokens:
            beyond = log1p(outcome.output_tokens) - log1p(profile.output_tokens)
            self.tokens.add(k, profile.features, beyond, at)

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


class Hierarchical(Thompson):
    """Thompson sampling whose arms learn the score from each other (hierarchy.py), exploring less as scores come in."""

    name = "hierarchical"

    def __init__(self, arms: Sequence[Arm], exploration: float = 0.7, fade: float = 500.0, forgetting: float = 0.9995):
        super().__init__(arms, Settings(exploration, fade, forgetting, noise=0.15, shared=True))
