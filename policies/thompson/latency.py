"""Expected latency and cost of each arm's answer: Bayesian linear models of the logarithms of its parts.

Log TTFT and log TPOT depend on prompt length and load. The logarithm of the output tokens, less that of the usual
number in the profile, depends on the features. The means of TPOT and of the length have a factor, because their
logarithms are not normal (smearing.py). Latency is the wait in the queue, which the dispatcher estimates, + TTFT +
further tokens · TPOT. Cost is tokens · price. The variance of the latency follows from those of its logarithms to first
order. The variance of the number of tokens is left out, because every answer teaches it.
"""

from collections.abc import Sequence
from math import erfc, exp, inf, log, log1p, pi, sqrt

import numpy as np
from msgspec import structs

from policies.events import ArmEstimate, Decision, Outcome
from policies.profiling.features import D
from policies.scarcity import work
from policies.thompson import kernels
from policies.thompson.posterior import LinearPosterior
from policies.thompson.smearing import ENOUGH, Smearing
from policies.types import Arm, ModelState, Objective, Request, TaskProfile, Vector

PRIOR_TTFT_S = 0.1
PRIOR_TPOT_S = 0.01
UNKNOWN_STATE = ModelState()
MOST_LOG_S = 8.0  # largest logarithm of a duration, as in kernels.expect
LARGE = 10.0


class LatencyModel:
    """Learns how fast and how long each arm's answers are."""

    def __init__(self, arms: Sequence[Arm], forgetting: float):
        self._arms = tuple(arms)
        self._index = {arm.name: k for k, arm in enumerate(arms)}
        terms = [
            (float(arm.context_tokens), arm.prompt_price_usd, arm.output_price_usd)
            for arm in arms
        ]
        ones = [1.0] * len(terms)
        self._terms = np.array([*zip(*terms), ones, ones])  # [5, K]
        self.smearing = Smearing(self._terms[3], forgetting)
        self.pace_smearing = Smearing(self._terms[4], forgetting)
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
        """[B, 9] the requests' own numbers, as kernels.expect and kernels.draw take them."""
        rows = [
            (
                request.profile.prompt_tokens,
                request.profile.output_tokens,
                request.profile.max_output_tokens or inf,
                self._index.get(objective.models[0], -1) if request.forced else -1,
                objective.latency_weight,
                objective.cost_weight,
                request.score_chance,
                request.explore,
                request.pays_price,
            )
            for request, objective in zip(requests, objectives)
        ]
        return np.array(rows, np.float64)

    def expect(
        self, asked: Vector, features: Vector, live: Sequence[ModelState], total: float
    ) -> Vector:
        """Expected latency, cost and length of each arm's answers under the present load: see kernels.expect.

        Args:
            asked: see `asked`.
            features: [B, D].
            live: [K] state of each arm.
            total: requests in flight over all arms.
        """
        rows = (
            [s.in_flight for s in live],
            [max(1, s.replicas) for s in live],
            [s.wait_s for s in live],
            [s.price * work(1.0, 0.0) for s in live],
            [s.price * work(0.0, 1.0) for s in live],
        )
        load = np.array(rows, np.float64)
        posteriors = (
            self.tokens.posterior(),
            self.ttft.posterior(),
            self.tpot.posterior(),
        )
        self.smearing.refresh()
        self.pace_smearing.refresh()
        return kernels.expect(features, asked, load, total, self._terms, *posteriors)

    def recorded_factors(self, arm: int) -> tuple[float, float]:
        """What a decision records of an arm's factors on length and TPOT, after `expect`.

        A factor is 0 if it must not be learned from.
        """
        length = self.smearing.factor(arm) if self.tokens.count[arm] >= ENOUGH else 0.0
        pace = self.pace_smearing.factor(arm) if self.tpot.count[arm] >= ENOUGH else 0.0
        return length, pace

    def _learn_pace(
        self, arm: int, decision: Decision, estimate: ArmEstimate, outcome: Outcome
    ) -> None:
        """Compare the time after the first token of a stream with the expected one of as many tokens."""
        further = outcome.output_tokens - 1
        if further > 0 and decision.pace_smearing > 0:
            expected_s = further * estimate.tpot_s / decision.pace_smearing
            actual_s = outcome.latency_s - outcome.ttft_s
            self.pace_smearing.add(arm, actual_s, expected_s, decision.sequence)

    def _learn_tail(
        self, arm: int, decision: Decision, estimate: ArmEstimate, outcome: Outcome
    ) -> None:
        """Compare an answer's length with the expected one, if no limit bounded the expectation."""
        expected = estimate.output_tokens
        profile = decision.profile
        room = self._arms[arm].context_tokens - profile.prompt_tokens
        limit = min(profile.max_output_tokens or inf, room)
        if decision.smearing > 0 and 1.0 < expected < limit:
            self.smearing.add(
                arm,
                outcome.output_tokens,
                expected / decision.smearing,
                decision.sequence,
            )

    def learn(self, arm: int, decision: Decision, outcome: Outcome) -> None:
        """Learn from the duration and the length of an answer, as far as the outcome shows them.

        If the client left, or a hedge won, before the first token, the outcome shows only a lower bound: of the TTFT
        if the answer is a stream, otherwise of the whole latency. It counts as the expected value above that bound.
        """
        estimate = decision.estimate()
        profile = decision.profile
        at = decision.sequence
        certainty = 1.0
        if outcome.status == "disconnected" and outcome.ttft_s <= 0:
            # the learned σ² would make the event depend on the order of the others
            outcome, certainty = _above_bound(estimate, outcome, self.ttft.prior_noise)
        (ttft_s, pace), (by_ttft, by_pace) = _split(estimate, outcome)
        by_ttft *= certainty
        by_pace *= certainty
        if ttft_s <= 0 or certainty <= 0:
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
        if outcome.status == "ok" and outcome.output_tokens:
            self._learn_tail(arm, decision, estimate, outcome)
            if outcome.ttft_s > outcome.waited_s:
                self._learn_pace(arm, decision, estimate, outcome)
            if _shows_length(profile, estimate, outcome):
                beyond = log1p(outcome.output_tokens) - log1p(profile.output_tokens)
                self.tokens.add(arm, profile.features, beyond, at)


def _above_bound(
    estimate: ArmEstimate, outcome: Outcome, noise: float
) -> tuple[Outcome, float]:
    """The outcome with the expected duration, given that it exceeds a bound, and the number of events it counts for.

    The logarithm T of the duration is normal with mean μ and variance σ². With z = (log bound - μ) / σ and the hazard
    h = φ(z) / (1 - Φ(z)), E[T | T > log bound] = μ + σ h, and the bound has the share h (h - z) of the Fisher
    information of an observed duration (expectation maximisation for censored data: Aitkin, Technometrics 1981).
    So an early bound counts for little, and a late one for a whole event.
    """
    bound_s = outcome.latency_s - outcome.waited_s
    expected_s = estimate.ttft_s
    if not outcome.streamed:
        expected_s = _whole_s(estimate, estimate.output_tokens)
    if bound_s <= 0 or expected_s <= 0:
        return outcome, 0.0
    deviation = sqrt(noise)
    middle = log(expected_s) - noise / 2
    z = (log(bound_s) - middle) / deviation
    hazard = _hazard(z)
    seconds = outcome.waited_s + exp(min(middle + deviation * hazard, MOST_LOG_S))
    if outcome.streamed:
        outcome = structs.replace(outcome, ttft_s=seconds, latency_s=seconds)
    else:
        tokens = max(1, round(estimate.output_tokens))
        outcome = structs.replace(outcome, output_tokens=tokens, latency_s=seconds)
    return outcome, max(0.0, min(1.0, hazard * (hazard - z)))


def _hazard(z: float) -> float:
    """φ(z) / (1 - Φ(z)) of the standard normal distribution."""
    if z > LARGE:  # Mills' ratio; erfc would underflow
        return z + 1.0 / z
    return exp(-0.5 * z * z) / (sqrt(pi / 2.0) * erfc(z / sqrt(2.0)))


def _whole_s(estimate: ArmEstimate, tokens: float) -> float:
    """Expected seconds from leaving the queue to the end of an answer of so many tokens."""
    return estimate.ttft_s + max(tokens - 1, 0) * estimate.tpot_s


def _shows_length(
    profile: TaskProfile, estimate: ArmEstimate, outcome: Outcome
) -> bool:
    """Whether an outcome shows how long such answers get.

    The length of an answer that a limit truncated is only a lower bound. It is used if the decision expected a shorter
    answer.
    """
    if outcome.finish_reason != "length":
        return True
    expected = estimate.output_tokens or profile.output_tokens
    limit = profile.max_output_tokens or inf
    return expected < min(outcome.output_tokens, limit)


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
