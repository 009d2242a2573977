"""How long and how dear an answer of each arm will be: Bayesian linear models of the logarithms of its parts.

Log TTFT and log TPOT depend on prompt length and load, and what log output tokens are beyond those that the profile
expects, on the features. Latency is TTFT + further tokens · TPOT, cost is tokens · price. The variance of latency
follows from those of its logarithms to first order; that of the number of tokens, which every answer teaches, is left
out.
"""

from collections.abc import Mapping, Sequence
from math import inf, log, log1p
from typing import NamedTuple

import numpy as np

from policies import base
from policies.features import D, latency_features
from policies.posterior import LinearPosterior
from policies.types import Arm, ArmEstimate, Decision, ModelState, Outcome, Request, Vector

DOUBT = 0.25  # most variance of a logarithm: beyond it a normal draw would promise negative latencies
PRIOR_TTFT_S, PRIOR_TPOT_S = 0.1, 0.01


class Expected(NamedTuple):
    """What to expect of B requests on K arms; all [B, K], the variance in seconds squared."""

    ttft_s: Vector
    tpot_s: Vector
    output_tokens: Vector
    load: Vector
    total_load: Vector
    latency_s: Vector
    latency_variance: Vector
    cost_usd: Vector


class LatencyModel:
    """Learns the pace and the length of each arm's answers."""

    def __init__(self, arms: Sequence[Arm], forgetting: float):
        self._arms = tuple(arms)
        self._index = {arm.name: k for k, arm in enumerate(arms)}
        self._context = np.array([float(arm.context_tokens) for arm in arms])
        self._prompt_price = np.array([arm.prompt_price_usd for arm in arms])
        self._output_price = np.array([arm.output_price_usd for arm in arms])
        self.tokens = LinearPosterior(np.zeros((len(arms), D)), np.full(D, 1.0), 0.2, forgetting)
        self._none = np.zeros(len(arms))
        precision = np.array([0.5, 4.0, 16.0, 16.0])
        prior = np.array([log(PRIOR_TTFT_S), 0.2, 0.5, 0.2])
        self.ttft = LinearPosterior(np.tile(prior, (len(arms), 1)), precision, 0.2, forgetting)
        prior = np.array([log(PRIOR_TPOT_S), 0.0, 0.3, 0.2])
        self.tpot = LinearPosterior(np.tile(prior, (len(arms), 1)), precision, 0.2, forgetting)

    def expect(self, requests: Sequence[Request], features: Vector, states: Mapping[str, ModelState]) -> Expected:
        """What each arm's answer would be like, given the load that the requests will meet."""
        profiles = [request.profile for request in requests]
        prompts = np.array([[float(profile.prompt_tokens)] for profile in profiles])
        load, total_load = self._loads(requests, states)
        tokens = self._output_tokens(
            features,
            prompts,
            np.array([[float(profile.output_tokens)] for profile in profiles]),
            np.array([[float(profile.max_output_tokens or inf)] for profile in profiles]),
        )
        x = latency_features(prompts, load, total_load)
        ttft, ttft_doubt = _exponential(self.ttft, x)
        tpot, tpot_doubt = _exponential(self.tpot, x)
        decoding = (tokens - 1.0) * tpot
        return Expected(
            ttft,
            tpot,
            tokens,
            load,
            total_load + self._none,
            latency_s=ttft + decoding,
            latency_variance=ttft * ttft * ttft_doubt + decoding * decoding * tpot_doubt,
            cost_usd=prompts * self._prompt_price + tokens * self._output_price,
        )

    def _loads(self, requests: Sequence[Request], states: Mapping[str, ModelState]) -> tuple[Vector, Vector]:
        """Requests in flight per replica [B, K] and over all arms [B, 1], as each request will meet them.

        Those of the same batch that name their arm count for the others: they are as good as in flight.
        """
        load = np.array([[base.load(arm, states) for arm in self._arms]])
        total = float(sum([state.in_flight for state in states.values()]))
        if not any(request.forced for request in requests):
            return np.zeros((len(requests), 1)) + load, np.full((len(requests), 1), total)
        named = np.zeros((len(requests), len(self._arms)))
        for i, request in enumerate(requests):
            if request.forced and (k := self._index.get(request.objective.models[0])) is not None:
                named[i, k] = 1.0
        others = named.sum(axis=0) - named
        replicas = np.array([max(1, states.get(arm.name, ModelState()).replicas) for arm in self._arms])
        return load + others / replicas, total + others.sum(axis=1, keepdims=True)

    def _output_tokens(self, features: Vector, prompts: Vector, usual: Vector, limit: Vector) -> Vector:
        """Expected answer length [B, K], within what client and context allow."""
        beyond = self.tokens.expect(features) + 0.5 * self.tokens.noise
        tokens = (1.0 + usual) * np.exp(beyond) - 1.0
        return np.asarray(np.maximum(np.minimum(tokens, np.minimum(self._context - prompts, limit)), 1.0))

    def learn(self, arm: int, decision: Decision, outcome: Outcome) -> None:
        """Fold in how long an answer took and was, as far as it tells."""
        estimate, profile, at = decision.estimate(), decision.profile, decision.sequence
        ttft_s, pace = _split(estimate, outcome)
        if ttft_s <= 0:
            return
        prompt = float(outcome.prompt_tokens or profile.prompt_tokens)
        x = latency_features(np.array([[prompt]]), np.array([[estimate.load]]), np.array([[estimate.total_load]]))[0, 0]
        self.ttft.add(arm, x, log(ttft_s), at)
        if pace > 0:
            self.tpot.add(arm, x, log(pace), at, weight=min(1.0, (outcome.output_tokens - 1) / 8))
        if outcome.status == "ok" and outcome.output_tokens:
            beyond = log1p(outcome.output_tokens) - log1p(profile.output_tokens)
            self.tokens.add(arm, profile.features, beyond, at)


def _exponential(part: LinearPosterior, x: Vector) -> tuple[Vector, Vector]:
    """Expected value of what `part` predicts the logarithm of, and the variance of that logarithm."""
    mean, variance = part.predict(x)
    return np.exp(np.minimum(mean + 0.5 * part.noise, 8.0)), np.minimum(variance, DOUBT)


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
