"""Overlap: how much a log of decisions tells about another policy, and when it does not suffice.

A missing reward does not count as zero: the observed rewards are divided by the rate at which they are observed
(Horvitz and Thompson, JASA 1952; feedback_rates.py). An arm that the log hardly ever tried, or whose answers to a kind
of request have no scores, gets no weight. Its value may be anything within the bounds, so it widens every interval by
its share of the target's choices (Manski's bounds; for off-policy evaluation Khan, Saveski and Ugander, ICML 2024).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from policies.evaluation.feedback_rates import (
    FeedbackRates,
    estimated_rates,
    known_rates,
)
from policies.types import Vector

T = TypeVar("T", bound=np.generic)
# An arm counts as never tried if its propensity is so small that the whole log would hold fewer than TRIES tries, or
# if it is below FLOOR.
TRIES = 10.0
FLOOR = 1e-3
MIN_FEEDBACK = 100
MIN_ESS = 50.0
MAX_UNSUPPORTED = 0.05


class UnanswerableError(ValueError):
    """The log does not suffice to estimate what the target policy would earn; the message says why."""


@dataclass(frozen=True, eq=False)
class LoggedDecisions:
    """N decisions among K arms, in their order.

    chosen: [N] column of the chosen arm.
    propensities: [N, K] of every arm, or [N] of the chosen arm, in [0, 1].
    rewards: [N] within `bounds`; NaN where no reward arrived.
    predictions: [N, K] expected rewards of each arm, made before the decision's own reward was known; None uses each
        arm's mean so far.
    feedback_rate: [N] known probability in (0, 1] that a reward arrives; None estimates it by arm and kind.
    bounds: the lowest and the highest possible reward.
    kinds: [N] number of each request's kind, from 0; None if all are of one kind.
    always_seen: [N] whether the reward is one that no sampling hides, as that of a visible flaw; None if none is.
    answers: [N] expected reward of the answer, given all that is seen without its score, as that it has no flaw. None
        uses the chosen arm's prediction.
    answered_by: [N] column of the arm that gave the answer, if a hedge did; None if it was always the chosen arm.

    Raises:
        ValueError: shapes do not agree, or numbers are out of their range.
    """

    chosen: NDArray[np.int64]
    propensities: Vector
    rewards: Vector
    predictions: Vector | None = None
    feedback_rate: Vector | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    kinds: NDArray[np.int64] | None = None
    always_seen: NDArray[np.bool_] | None = None
    answers: Vector | None = None
    answered_by: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        n = len(self.chosen)
        low, high = self.bounds
        seen = self.rewards[~np.isnan(self.rewards)]
        if not low < high:
            raise ValueError(
                f"bounds are {self.bounds}; give the lowest reward, then the highest"
            )
        if (
            self.rewards.shape != (n,)
            or self.propensities.shape[:1] != (n,)
            or self.propensities.ndim > 2
        ):
            shapes = f"{self.chosen.shape}, {self.propensities.shape} and {self.rewards.shape}"
            raise ValueError(
                f"chosen, propensities and rewards have shapes {shapes}; give [N], [N, K] or [N], and [N]"
            )
        if not ((self.propensities >= 0) & (self.propensities <= 1 + 1e-9)).all():
            raise ValueError("propensities must be numbers in [0, 1]")
        if len(seen) and not (seen.min() >= low and seen.max() <= high):
            raise ValueError(
                f"rewards from {seen.min():g} to {seen.max():g}; clip them to the bounds {self.bounds}"
            )
        rate = self.feedback_rate
        if rate is not None and not (
            rate.shape == (n,) and ((rate > 0) & (rate <= 1)).all()
        ):
            raise ValueError(
                "feedback_rate must have one number in (0, 1] for each decision"
            )
        for name in ("kinds", "always_seen", "answers", "answered_by"):
            value = getattr(self, name)
            if value is not None and value.shape != (n,):
                raise ValueError(f"{name} has shape {value.shape}; give ({n},)")

    @property
    def sampled(self) -> NDArray[np.bool_]:
        """[N] whether the reward could be missing."""
        if self.always_seen is None:
            return np.ones(len(self.chosen), dtype=bool)
        return ~self.always_seen

    @property
    def scores(self) -> int:
        """Number of rewards that arrived although they could be missing."""
        return int((~np.isnan(self.rewards) & self.sampled).sum())

    def head(self, n: int) -> "LoggedDecisions":
        """The first n decisions."""

        def first(values: NDArray[T] | None) -> NDArray[T] | None:
            return None if values is None else values[:n]

        return LoggedDecisions(
            chosen=self.chosen[:n],
            propensities=self.propensities[:n],
            rewards=self.rewards[:n],
            predictions=first(self.predictions),
            feedback_rate=first(self.feedback_rate),
            bounds=self.bounds,
            kinds=first(self.kinds),
            always_seen=first(self.always_seen),
            answers=first(self.answers),
            answered_by=first(self.answered_by),
        )

    def rates(self, arms: int) -> FeedbackRates:
        """The feedback rates among so many arms."""
        known = self._rates.get(arms)
        if known is None:
            known = self._rates[arms] = self._estimate_rates(arms)
        return known

    @cached_property
    def _rates(self) -> dict[int, FeedbackRates]:
        return {}

    def _estimate_rates(self, arms: int) -> FeedbackRates:
        if self.feedback_rate is not None:
            rates = known_rates(self.feedback_rate, arms)
            return replace(rates, rate=np.where(self.sampled, rates.rate, 1.0))
        n = len(self.chosen)
        answered_by = self.chosen if self.answered_by is None else self.answered_by
        kinds = np.zeros(n, dtype=np.int64) if self.kinds is None else self.kinds
        got = ~np.isnan(self.rewards)
        return estimated_rates(answered_by, kinds, got, self.sampled, arms)


@dataclass(frozen=True)
class Overlap:
    """How much the log knows about a target policy.

    decisions, feedback: number of decisions, and number of those with a reward that could be missing.
    ess: effective sample size: the number of decisions over the expected W² (Kong, 1992). The sum of the observed W²
        would be less useful: it is smallest if the rare, large weights happen to be missing.
    smallest_propensity: of the arms that the target chooses with a probability of at least 1 %.
    largest_weight: largest weight of a decision.
    top_share: share of all weight that the 1 % heaviest decisions have.
    unsupported: share of the target's choices that the log hardly ever tried.
    """

    decisions: int
    feedback: int
    ess: float
    smallest_propensity: float
    largest_weight: float
    top_share: float
    unsupported: float


@dataclass(frozen=True, eq=False)
class EstimatorTerms:
    """The arrays of a log and a signed target Δ [N, K] for all estimators; rewards are scaled to [0, 1].

    bare: [N] Δ(A) / e(A); 0 without support.
    seen: [N] 1 / feedback rate where a reward arrived, otherwise 0. Its mean is 1.
    reward: [N] 0 where no reward arrived.
    predictions: [N, K] of each arm's reward.
    answers: [N] of the reward, given all that is seen without a score; the reward itself where it is always seen.
    delta: [N, K] Δ.
    full: [N, K] Δ / e, 0 without support; NaN where only the chosen propensity is known.
    unsupported: [N] |Δ| of the arms that were hardly ever tried, or never scored.
    load: [N] Σ_a Δ² / e, or an estimate of it.
    sampled_load: [N] Σ_a Δ² / (e · feedback rate), or an estimate of it.
    rate: [N, K] feedback rates.
    cell: [N] see FeedbackRates.
    """

    bare: Vector
    seen: Vector
    reward: Vector
    predictions: Vector
    answers: Vector
    delta: Vector
    full: Vector
    unsupported: Vector
    load: Vector
    sampled_load: Vector
    rate: Vector
    cell: NDArray[np.int64]

    @property
    def weight(self) -> Vector:
        """[N] the weight of each reward: Δ(A) / (e(A) · feedback rate), 0 without a reward."""
        return np.asarray(self.bare * self.seen)


def at_chosen(table: NDArray[T], chosen: NDArray[np.int64]) -> NDArray[T]:
    """[N] the chosen arms' entries of a table [N, K]."""
    picked: NDArray[T] = table[np.arange(len(chosen)), chosen]
    return picked


def row_sums(one: Vector, other: Vector) -> Vector:
    """[N] the sums of one · other [N, K] over the arms; quicker than numpy's sum over so short an axis."""
    return np.asarray(np.einsum("nk,nk->n", one, other))


def check_target(data: LoggedDecisions, target: Vector) -> None:
    """Check that a target fits a log.

    Raises:
        ValueError: the target has another shape, or its rows are not probabilities.
    """
    k = data.propensities.shape[1] if data.propensities.ndim == 2 else target.shape[-1]
    if target.shape != (len(data.chosen), k):
        raise ValueError(
            f"the target's probabilities have shape {target.shape}; give {(len(data.chosen), k)}"
        )
    if not ((target >= -1e-9).all() and (target.sum(axis=1) <= 1 + 1e-6).all()):
        raise ValueError(
            "the target's probabilities must be in [0, 1], with a sum of at most 1 for each decision"
        )


def running_means(data: LoggedDecisions, arms: int) -> Vector:
    """[N, K] each arm's mean reward before each decision; the middle of the bounds counts as one more reward."""
    got = ~np.isnan(data.rewards)
    mine = (data.chosen[:, None] == np.arange(arms)) & got[:, None]
    middle = (data.bounds[0] + data.bounds[1]) / 2
    sums = np.cumsum(np.where(mine, data.rewards[:, None], 0.0), axis=0)
    counts = np.cumsum(mine, axis=0)
    means = (middle + sums) / (1 + counts)
    return np.vstack([np.full((1, arms), middle), means[:-1]])[: len(got)]


def terms_of(data: LoggedDecisions, delta: Vector, missing: Vector) -> EstimatorTerms:
    """The estimator terms of a log.

    Args:
        data: the logged decisions.
        delta: [N, K] probabilities of a target, or those of one target less those of another.
        missing: [N] probability with which a target chooses no arm.
    """
    n = len(data.chosen)
    low, high = data.bounds
    got = ~np.isnan(data.rewards)
    floor = max(FLOOR, TRIES / max(1, n))
    rates = data.rates(delta.shape[1])
    scored = ~rates.unsupported  # [N, K]
    e = data.propensities if data.propensities.ndim == 2 else None
    e_chosen = at_chosen(e, data.chosen) if e is not None else data.propensities
    safe = np.maximum(e_chosen, floor)
    usable = (e_chosen >= floor) & at_chosen(scored, data.chosen)
    bare = np.where(usable, at_chosen(delta, data.chosen) / safe, 0.0)
    if e is not None:
        tried = (e >= floor) & scored
        full = np.where(tried, delta / np.maximum(e, floor), 0.0)
        unsupported = row_sums(np.where(tried, 0.0, 1.0), np.abs(delta))
        load = row_sums(full, delta)
        sampled_load = row_sums(full, delta / rates.table)
    else:
        full = np.full(delta.shape, np.nan)
        # Without all propensities, Σ_a π(a) - E[W] is the share of what was never tried.
        never = 0.0
        if n:
            never = float(np.abs(delta).sum(axis=1).mean() - np.abs(bare).mean())
        unsupported = np.full(n, max(0.0, never))
        load = bare**2
        sampled_load = load / rates.rate
    q = (
        running_means(data, delta.shape[1])
        if data.predictions is None
        else data.predictions
    )
    q = np.clip((q - low) / (high - low), 0.0, 1.0)
    reward = np.where(got, (data.rewards - low) / (high - low), 0.0)
    answers = at_chosen(q, data.chosen)
    if data.answers is not None:
        answers = np.clip((data.answers - low) / (high - low), 0.0, 1.0)
    # A hedge whose answers have no scores gave the answer.
    unsupported = unsupported + np.abs(bare) * rates.hidden
    # Values below 1e-9 are rounding errors.
    unsupported = np.where(unsupported + missing > 1e-9, unsupported + missing, 0.0)
    return EstimatorTerms(
        bare=bare,
        seen=np.where(got, 1.0 / rates.rate, 0.0),
        reward=reward,
        predictions=q,
        answers=np.where(got & ~data.sampled, reward, answers),
        delta=delta,
        full=full,
        unsupported=unsupported,
        load=load,
        sampled_load=sampled_load,
        rate=rates.table,
        cell=rates.cell,
    )


def overlap(data: LoggedDecisions, target: Vector) -> Overlap:
    """How much the log knows about a target policy; see Overlap.

    Args:
        data: the logged decisions.
        target: [N, K] the target's probabilities.

    Raises:
        ValueError: the target does not fit the log.
    """
    check_target(data, target)
    terms = terms_of(data, target, 1 - target.sum(axis=1))
    got = ~np.isnan(data.rewards)
    weight = np.sort(terms.weight[got])[::-1]
    total = float(weight.sum())
    load = float(terms.sampled_load.mean()) if got.any() else 0.0
    e = data.propensities if data.propensities.ndim == 2 else data.propensities[:, None]
    wanted = (
        target if e.shape == target.shape else at_chosen(target, data.chosen)[:, None]
    ) >= 0.01
    return Overlap(
        decisions=len(got),
        feedback=data.scores,
        ess=len(got) / load if load else 0.0,
        smallest_propensity=float(e[wanted].min()) if wanted.any() else 0.0,
        largest_weight=float(weight[0]) if len(weight) else 0.0,
        top_share=float(weight[: max(1, len(weight) // 100)].sum() / total)
        if total
        else 0.0,
        unsupported=float(terms.unsupported.mean()) if len(got) else 1.0,
    )


def require_overlap(data: LoggedDecisions, target: Vector) -> Overlap:
    """The overlap, if the log suffices for this target.

    Selection effect: where most logs are refused, one that passes is unusually favourable and its interval
    undercovers. Over all logs together, the interval is wrong no more often than elsewhere
    (benchmarks/statistics/offpolicy.py).

    Raises:
        UnanswerableError: there is too little feedback, the log never tried some choices, the effective sample is too
            small, or the choices do not fit the logged propensities.
        ValueError: the target does not fit the log.
    """
    found = overlap(data, target)
    if found.feedback < MIN_FEEDBACK:
        raise UnanswerableError(
            f"{found.feedback} of {found.decisions} decisions have a reward; {MIN_FEEDBACK} needed"
        )
    if found.unsupported > MAX_UNSUPPORTED:
        kind = (
            "made without chance: it"
            if (data.propensities.max(axis=-1) > 0.999).mean() > 0.99
            else "one that"
        )
        raise UnanswerableError(
            f"the log is {kind} hardly ever tried {found.unsupported:.0%} of what the target would do, or has no "
            "scores of it; let a policy that explores decide for a while"
        )
    if found.ess < MIN_ESS:
        worth = f"worth {found.ess:.0f} of the target's own; {MIN_ESS:g} needed"
        raise UnanswerableError(f"the {found.feedback} rewards are {worth}")
    if data.propensities.ndim == 2:
        _require_real(data, target)
    return found


def _require_real(data: LoggedDecisions, target: Vector) -> None:
    """Check that the weights have the mean they should have, by Freedman's inequality at one in a million."""
    terms = terms_of(data, target, np.zeros(len(target)))
    supported = np.where(terms.full > 0, target, 0.0).sum(axis=1)
    difference = abs(float((at_chosen(terms.full, data.chosen) - supported).sum()))
    spread = float((terms.load - supported**2).sum())
    largest = float(terms.full.max(initial=0.0))
    doubt = log(2e6)
    if difference > np.sqrt(
        2 * max(spread, 0.0) * doubt
    ) + 2 * largest * doubt / 3 + 1e-6 * len(target):
        average = float(at_chosen(terms.full, data.chosen).mean())
        raise UnanswerableError(
            f"weights average {average:.2f} where {supported.mean():.2f} is due: the logged propensities are not "
            "those with which the arms were chosen"
        )
