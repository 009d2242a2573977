"""How long and how dear an answer of each arm will be: Bayesian linear models of the logarithms of its parts.

Log TTFT and log TPOT depend on prompt length and load, and what log output tokens are beyond those that the profile
expects, on the features. Latency is the wait for a place (which whoever gives the places knows) + TTFT + further
tokens · TPOT, cost is tokens · price. The variance of latency
follows from those of its logarithms to first order; that of the number of tokens, which every answer teaches, is left
out.
"""

from collections.abc import Mapping, Sequence
from math import inf, log, log1p

import numpy as np
from msgspec import structs

from policies import kernels
from policies.features import D
from policies.posterior import LinearPosterior
from policies.types import Arm, ArmEstimate, Decision, ModelState, Objective, Outcome, Request, Vector

PRIOR_TTFT_S, PRIOR_TPOT_S = 0.1, 0.01
UNKNOWN = ModelState()


class LatencyModel:
    """Learns the pace and the length of each arm's answers."""

    def __init__(self, arms: Sequence[Arm], forgetting: float):
        self._arms = tuple(arms)
        self._index = {arm.name: k for k, arm in enumerate(arms)}
        terms = [(float(arm.context_tokens), arm.prompt_price_usd, arm.output_price_usd) for arm in arms]
        self._terms = np.array(terms).T.copy()  # [3, K]
        self.tokens = LinearPosterior(np.zeros((len(arms), D)), np.full(D, 1.0), 0.2, forgetting)
        precision = np.array([0.5, 4.0, 16.0, 16.0])
        prior = np.array([log(PRIOR_TTFT_S), 0.2, 0.5, 0.2])
        self.ttft = LinearPosterior(np.tile(prior, (len(arms), 1)), precision, 0.2, forgetting)
        prior = np.array([log(PRIOR_TPOT_S), 0.0, 0.3, 0.2])
        self.tpot = LinearPosterior(np.tile(prior, (len(arms), 1)), precision, 0.2, forgetting)

    def asked(self, requests: Sequence[Request], objectives: Sequence[Objective]) -> Vector:
        """[B, 6] what the requests say of themselves, as kernels.expect takes it."""
        rows = [
            (
                request.profile.prompt_tokens,
                request.profile.output_tokens,
                request.profile.max_output_tokens or inf,
                self._index.get(objective.models[0], -1) if request.forced else -1,
                objective.latency_weight,
                objective.cost_weight,
            )
            for request, objective in zip(requests, objectives)
        ]
        return np.array(rows, np.float64)

    def expect(self, asked: Vector, features: Vector, states: Mapping[str, ModelState]) -> Vector:
        """What each arm's answer would be like, given the load that the requests will meet: see kernels.expect."""
        live = [states.get(arm.name, UNKNOWN) for arm in self._arms]
        rows = [s.in_flight for s in live], [max(1, s.replicas) for s in live], [s.wait_s for s in live]
        load = np.array(rows, np.float64)
        total = float(sum([state.in_flight for state in states.values()]))
        beliefs = self.tokens.belief(), self.ttft.belief(), self.tpot.belief()
        return kernels.expect(features, asked, load, total, self._terms, *beliefs)

    def learn(self, arm: int, decision: Decision, outcome: Outcome) -> None:
        """Fold in how long an answer took and was, as far as it tells.

        One that was given up before its first token says only how long it took at least: that is news where it was
        longer than the whole was expected to take, and then counts as if it had come then.
        """
        estimate, profile, at = decision.estimate(), decision.profile, decision.sequence
        if outcome.status == "disconnected" and outcome.ttft_s <= 0:
            if outcome.latency_s - outcome.waited_s <= _whole_s(estimate, estimate.output_tokens):
                return
            outcome = structs.replace(outcome, output_tokens=max(1, round(estimate.output_tokens)))
        (ttft_s, pace), (by_ttft, by_pace) = _split(estimate, outcome)
        if ttft_s <= 0:
            return
        prompt = float(outcome.prompt_tokens or profile.prompt_tokens)
        x = kernels.pace_features(prompt, estimate.load, estimate.total_load)
        self.ttft.add(arm, x, log(ttft_s), at, weight=by_ttft)
        if pace > 0:
            self.tpot.add(arm, x, log(pace), at, weight=by_pace * min(1.0, (outcome.output_tokens - 1) / 8))
        if outcome.status == "ok" and outcome.output_tokens and _shows_length(decision, outcome):
            beyond = log1p(outcome.output_tokens) - log1p(profile.output_tokens)
            self.tokens.add(arm, profile.features, beyond, at)


def _whole_s(estimate: ArmEstimate, tokens: float) -> float:
    """Seconds that an answer of so many tokens was expected to take once it had a place."""
    return estimate.ttft_s + max(tokens - 1, 0) * estimate.tpot_s


def _shows_length(decision: Decision, outcome: Outcome) -> bool:
    """Whether it shows how long such answers get. One that a limit cut off says only that it would have been longer:
    that is news where the decision expected a shorter one, and then its length is the least that can be learned.
    """
    expected, limit = decision.estimate().output_tokens, decision.profile.max_output_tokens or inf
    cut = outcome.finish_reason == "length"
    return not cut or (expected or decision.profile.output_tokens) < min(outcome.output_tokens, limit)


def _split(estimate: ArmEstimate, outcome: Outcome) -> tuple[tuple[float, float], tuple[float, float]]:
    """TTFT and TPOT of an answer in seconds once it had a place, 0 where it does not tell; and how many events each
    counts for.

    An answer in one piece shows only its whole latency. That is shared out as the decision expected it to be, and of
    each part it tells the less, the smaller its share s: log latency changes by s where log TTFT changes by 1, so its
    Fisher information is s² of that of a TTFT seen by itself (delta method). Otherwise long answers would confirm
    whatever was believed of the first token.
    """
    further, latency_s = max(outcome.output_tokens - 1, 0), outcome.latency_s - outcome.waited_s
    if outcome.ttft_s > outcome.waited_s:
        whole = further and outcome.status == "ok"  # who leaves before the end may not have listened for a while
        pace = (outcome.latency_s - outcome.ttft_s) / further if whole else 0.0
        return (outcome.ttft_s - outcome.waited_s, pace), (1.0, 1.0)
    expected = _whole_s(estimate, outcome.output_tokens)
    if expected <= 0 or latency_s <= 0:
        return (0.0, 0.0), (0.0, 0.0)
    ratio, share = latency_s / expected, estimate.ttft_s / expected
    return (estimate.ttft_s * ratio, estimate.tpot_s * ratio if further else 0.0), (share**2, (1.0 - share) ** 2)
