"""Expected latency and cost of each arm's answer: Bayesian linear models of the logarithms of its parts.

Log TTFT and log TPOT depend on prompt length and load. The logarithm of the output tokens, less that of the usual
number in the profile, depends on the features. Latency is the wait in the queue, which the dispatcher estimates, + TTFT
+ further tokens · TPOT. Cost is tokens · price. The variance of the latency follows from those of its logarithms to
first order. The variance of the number of tokens is left out, because every answer teaches it.
"""

from collections.abc import Mapping, Sequence
from math import inf, log, log1p

import numpy as np
from msgspec import structs

from policies.events import ArmEstimate, Decision, Outcome
from policies.profiling.features import D
from policies.thompson import kernels
from policies.thompson.posterior import LinearPosterior
from policies.types import Arm, ModelState, Objective, Request, Vector

PRIOR_TTFT_S = 0.1
PRIOR_TPOT_S = 0.01
UNKNOWN_STATE = ModelState()


class LatencyModel:
    """Learns how fast and how long each arm's answers are."""

    def __init__(self, arms: Sequence[Arm], forgetting: float):
        self._arms = tuple(arms)
        self._index = {arm.name: k for k, arm in enumerate(arms)}
        terms = [
            (float(arm.context_tokens), arm.prompt_price_usd, arm.output_price_usd)
            for arm in arms
        ]
        self._terms = np.array(terms).T.copy()  # [3, K]
        self.tokens = LinearPosterior(
            np.zeros((len(arms), D)), np.full(D, 1.0), 0.2, forgetting
        )
        precision = np.array([0.5, 4.0, 16.0, 16.0])
        prior = np.array([log(PRIOR_TTFT_S), 0.2, 0.5, 0.2])
        self.ttft = LinearPosterior(
            np.tile(prior, (len(arms), 1)), precision, 0.2, forgetting
        )
        prior = np.array([log(PRIOR_TPOT_S), 0.0, 0.3, 0.2])
        self.tpot = LinearPosterior(
            np.tile(prior, (len(arms), 1)), precision, 0.2, forgetting
        )

    def asked(
        self, requests: Sequence[Request], objectives: Sequence[Objective]
    ) -> Vector:
        """[B, 6] the requests' own numbers, as kernels.expect takes them."""
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

    def expect(
        self, asked: Vector, features: Vector, states: Mapping[str, ModelState]
    ) -> Vector:
        """Expected latency, cost and length of each arm's answers under the present load: see kernels.expect."""
        live = [states.get(arm.name, UNKNOWN_STATE) for arm in self._arms]
        rows = (
            [s.in_flight for s in live],
            [max(1, s.replicas) for s in live],
            [s.wait_s for s in live],
        )
        load = np.array(rows, np.float64)
        total = float(sum([state.in_flight for state in states.values()]))
        posteriors = (
            self.tokens.posterior(),
            self.ttft.posterior(),
            self.tpot.posterior(),
        )
        return kernels.expect(features, asked, load, total, self._terms, *posteriors)

    def learn(self, arm: int, decision: Decision, outcome: Outcome) -> None:
        """Learn from the duration and the length of an answer, as far as the outcome shows them.

        If the client disconnected before the first token, the outcome shows only a lower bound of the latency. It is
        used if it exceeds the expected latency of the whole answer, and then counts as that latency.
        """
        estimate = decision.estimate()
        profile = decision.profile
        at = decision.sequence
        if outcome.status == "disconnected" and outcome.ttft_s <= 0:
            if outcome.latency_s - outcome.waited_s <= _whole_s(
                estimate, estimate.output_tokens
            ):
                return
            outcome = structs.replace(
                outcome, output_tokens=max(1, round(estimate.output_tokens))
            )
        (ttft_s, pace), (by_ttft, by_pace) = _split(estimate, outcome)
        if ttft_s <= 0:
            return
        prompt = float(outcome.prompt_tokens or profile.prompt_tokens)
        x = kernels.pace_features(prompt, estimate.load, estimate.total_load)
        self.ttft.add(arm, x, log(ttft_s), at, weight=by_ttft)
        if pace > 0:
            self.tpot.add(
                arm,
                x,
                log(pace),
                at,
                weight=by_pace * min(1.0, (outcome.output_tokens - 1) / 8),
            )
        if (
            outcome.status == "ok"
            and outcome.output_tokens
            and _shows_length(decision, outcome)
        ):
            beyond = log1p(outcome.output_tokens) - log1p(profile.output_tokens)
            self.tokens.add(arm, profile.features, beyond, at)


def _whole_s(estimate: ArmEstimate, tokens: float) -> float:
    """Expected seconds from leaving the queue to the end of an answer of so many tokens."""
    return estimate.ttft_s + max(tokens - 1, 0) * estimate.tpot_s


def _shows_length(decision: Decision, outcome: Outcome) -> bool:
    """Whether an outcome shows how long such answers get.

    The length of an answer that a limit truncated is only a lower bound. It is used if the decision expected a shorter
    answer.
    """
    expected = decision.estimate().output_tokens
    limit = decision.profile.max_output_tokens or inf
    truncated = outcome.finish_reason == "length"
    return not truncated or (expected or decision.profile.output_tokens) < min(
        outcome.output_tokens, limit
    )


def _split(
    estimate: ArmEstimate, outcome: Outcome
) -> tuple[tuple[float, float], tuple[float, float]]:
    """TTFT and TPOT of an answer in seconds after the queue, 0 if not shown; and how many events each counts for.

    An answer in one piece shows only its whole latency. The latency is divided into the parts in the proportion that
    the decision expected. A part with the share s counts for s² events: log latency changes by s if log TTFT changes
    by 1, so its Fisher information is s² of that of a TTFT observed alone (delta method). Otherwise long answers would
    confirm any estimate of the first token.
    """
    further = max(outcome.output_tokens - 1, 0)
    latency_s = outcome.latency_s - outcome.waited_s
    if outcome.ttft_s > outcome.waited_s:
        # A client that disconnects may have stopped reading some time before, so its answer shows no TPOT.
        pace = 0.0
        if further and outcome.status == "ok":
            pace = (outcome.latency_s - outcome.ttft_s) / further
        return (outcome.ttft_s - outcome.waited_s, pace), (1.0, 1.0)
    expected = _whole_s(estimate, outcome.output_tokens)
    if expected <= 0 or latency_s <= 0:
        return (0.0, 0.0), (0.0, 0.0)
    ratio = latency_s / expected
    share = estimate.ttft_s / expected
    return (estimate.ttft_s * ratio, estimate.tpot_s * ratio if further else 0.0), (
        share**2,
        (1.0 - share) ** 2,
    )
