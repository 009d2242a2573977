"""Off-policy evaluation: estimates what another policy would have earned, from the log of the policy that decided.

With propensities e_t, a target policy π, a guess q_t made before decision t, and weights W_t = π(A_t|X_t) / e_t(A_t),

    IPS    Γ_t = W_t R_t                               (Horvitz and Thompson, JASA 1952)
    SNIPS  Σ W_t R_t / Σ W_t                           (Swaminathan and Joachims, NeurIPS 2015)
    DR     Γ_t = Σ_a π(a|X_t) q_t(X_t, a) + W_t (R_t - q_t(X_t, A_t))       (Dudík, Langford and Li, ICML 2011)

Each of these, less the value of π, is a martingale difference, although the e_t of a learning policy depends on the
past. But their variance changes with e_t, and then the plain average is not normal. So each decision has the weight 1
over a predictable guess of its standard deviation (Hadad, Hirshberg, Zhan, Wager and Athey, PNAS 2021; Bibaut et al.,
NeurIPS 2021; Zhan, Hadad, Hirshberg and Athey, KDD 2021). The guess is the root of the recent average of
Σ_a π(a|x)² / e(a|x); the papers also evaluate each logging policy on other contexts, for which a log holds no
propensities. The studentised average is asymptotically normal if the contexts are independent of each other.

A reward may be missing. With C_t = 1 where it is always seen, and 1{seen} / ρ where it is seen at the rate ρ, C_t R_t
replaces R_t. For DR there are two steps, because some of an answer is always seen, such as a flaw. With V_t the
reward that is expected of the answer as far as it is seen, R_t - q_t becomes V_t - q_t + C_t (R_t - V_t) (Robins,
Rotnitzky and Zhao, JASA 1994). An estimated rate makes the estimate more exact than a known one, since it corrects
for the share that happened to be scored (Hirano, Imbens and Ridder, Econometrica 2003). So the influence of each
decision is taken less its projection on the score of the rate: in a cell of n decisions, with g_t the influence of
the reward, less (C_t - 1) Σ g_t / n.

The confidence sequence needs no asymptotics, allows any number of looks, and contexts may drift: it bounds the mean of
the values so far (Waudby-Smith, Wu, Ramdas, Karampatziakis and Mineiro, ACM/IMS Journal of Data Science 2024). It is
wider.

A target must not have learned from the rewards that evaluate it: evaluate a version on the decisions after it was made.
"""

from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from policies.evaluation.confidence import lower_sequence
from policies.evaluation.overlap import (
    MIN_ESS,
    EstimatorTerms,
    LoggedDecisions,
    UnanswerableError,
    at_chosen,
    check_target,
    require_overlap,
    row_sums,
    terms_of,
)
from policies.types import Vector

ESTIMATORS = ("ips", "snips", "dr")
WEIGHTS = ("stabilised", "uniform")
HALF_LIFE = 100.0  # decisions over which the guess of the variance forgets by half
CHUNK = 10_000  # decisions; more in one sum would overflow
LEAST = 0.1  # smallest value of that guess, as a share of its average so far
CLIP = 5.0  # largest amount that a prediction may subtract from one term of a confidence sequence


@dataclass(frozen=True)
class Estimate:
    """The estimated value of a policy, or of the difference between two policies, in units of the reward.

    value, standard_error: of the estimator.
    low, high: the interval, for one look at the log.
    level: coverage of the interval.
    """

    estimator: str
    value: float
    standard_error: float
    low: float
    high: float
    level: float

    def as_dict(self) -> dict[str, float | str]:
        """Plain data."""
        return asdict(self)


def estimate(
    data: LoggedDecisions,
    target: Vector,
    estimator: str = "dr",
    weights: str = "stabilised",
    level: float = 0.95,
) -> Estimate:
    """The value of a target policy, with an interval for one look at the log.

    Args:
        data: the logged decisions.
        target: [N, K] probabilities with which the target chooses each arm.
        estimator: one of ESTIMATORS.
        weights: one of WEIGHTS. For the log of a policy that learned, the interval holds only with "stabilised".
        level: coverage of the interval.

    Raises:
        UnanswerableError: the log cannot answer; the message says why.
        ValueError: unknown estimator or weights, or the target does not fit the log.
    """
    require_overlap(data, target)
    return _estimate(data, (target,), estimator, weights, level)


def difference(
    data: LoggedDecisions,
    champion: Vector,
    challenger: Vector,
    estimator: str = "dr",
    weights: str = "stabilised",
    level: float = 0.95,
) -> Estimate:
    """The value of the challenger less that of the champion, decision by decision on the same log.

    Where both decide alike the difference is zero, so this interval is much narrower than that of two single estimates.

    Args:
        data: the logged decisions of either policy or of a third one.
        champion: [N, K] probabilities with which the champion chooses each arm.
        challenger: [N, K] probabilities of the challenger.
        estimator: one of ESTIMATORS.
        weights: one of WEIGHTS.
        level: coverage of the interval.

    Raises:
        UnanswerableError: the log cannot answer for one of them; the message says which, and why.
        ValueError: unknown estimator or weights, or a target does not fit the log.
    """
    _require_both(data, champion, challenger)
    return _estimate(data, (challenger, champion), estimator, weights, level)


def _require_both(data: LoggedDecisions, champion: Vector, challenger: Vector) -> None:
    for name, target in (("champion", champion), ("challenger", challenger)):
        try:
            require_overlap(data, target)
        except UnanswerableError as error:
            raise UnanswerableError(f"{name}: {error}") from None
    terms = signed_terms(data, (challenger, champion))
    apart = float(np.abs(terms.delta).sum(axis=1).mean())
    load = max(float(terms.sampled_load.mean()), 1e-12)
    ess = len(data.chosen) * apart**2 / load
    if apart > 1e-6 and ess < MIN_ESS:
        raise UnanswerableError(
            f"where champion and challenger differ, the {data.scores} rewards are worth {ess:.0f}; {MIN_ESS:g} needed"
        )


def _estimate(
    data: LoggedDecisions,
    targets: tuple[Vector, ...],
    estimator: str,
    weights: str,
    level: float,
) -> Estimate:
    """The value of the first target, less that of the second if there is one."""
    if estimator not in ESTIMATORS or weights not in WEIGHTS:
        wanted = f"{', '.join(ESTIMATORS)} with weights {', '.join(WEIGHTS)}"
        raise ValueError(
            f"unknown estimator '{estimator}' with weights '{weights}'; choose one of: {wanted}"
        )
    both = signed_terms(data, targets)
    h = stabilisers(both.load) if weights == "stabilised" else np.ones(len(both.load))
    value = 0.0
    influence = np.zeros(len(h))
    of_rewards = np.zeros(len(h))
    for sign, target in zip((1.0, -1.0), targets, strict=False):
        terms = both if len(targets) == 1 else signed_terms(data, (target,))
        gamma, unit = _scores(terms, data.chosen, estimator)
        scale = sign * h / (h * unit).sum()
        mine = float((h * gamma).sum() / (h * unit).sum())
        value += sign * mine
        influence += scale * (gamma - mine * unit)
        rest = terms.reward - (terms.answers if estimator == "dr" else 0.0)
        if estimator == "snips":
            rest = terms.reward - mine
        of_rewards += scale * terms.weight * rest
    influence -= _explained_by_rates(both, of_rewards)
    variance = float((influence**2).sum())
    if estimator == "dr" and not np.isnan(both.full).any():
        variance = max(variance, _expected_variance(data, both, h))
    error = float(np.sqrt(variance))
    unknown = float(np.average(both.unsupported, weights=h))
    reach = NormalDist().inv_cdf((1 + level) / 2) * error + unknown
    low = data.bounds[0]
    span = data.bounds[1] - data.bounds[0]
    offset = low if len(targets) == 1 else 0.0
    return Estimate(
        estimator,
        offset + span * value,
        span * error,
        offset + span * (value - reach),
        offset + span * (value + reach),
        level,
    )


def _explained_by_rates(terms: EstimatorTerms, of_rewards: Vector) -> Vector:
    """[N] the part of each decision's influence that the estimated feedback rate of its cell explains.

    Args:
        terms: of the log.
        of_rewards: [N] the influence of the rewards, as far as they could be missing.
    """
    cell = terms.cell
    estimated = cell >= 0
    if not estimated.any():
        return np.zeros(len(cell))
    count = np.bincount(cell[estimated])
    total = np.bincount(cell[estimated], of_rewards[estimated])
    mean = total / np.maximum(count, 1)
    return np.asarray(np.where(estimated, (terms.seen - 1.0) * mean[cell], 0.0))


def _expected_variance(
    data: LoggedDecisions, terms: EstimatorTerms, h: Vector
) -> float:
    """Variance of the DR average with Σ_a Δ(a)² / e(a) in place of the observed W².

    If rare, large weights happen to be missing from the log, the observed variance is too small exactly when the
    estimate is wrong. The propensities still include them. The squared residuals of an arm are averaged with its
    weights: of what is always seen, and of what a score adds to it. An estimated rate takes the mean out of the latter.
    """
    arms = terms.delta.shape[1]
    first = terms.answers - at_chosen(terms.predictions, data.chosen)
    second = terms.reward - terms.answers
    shift = np.zeros(arms)
    if data.feedback_rate is None:
        shift = _means(second, np.abs(terms.weight), data.chosen, arms, 0.0)
    second = second - shift[data.chosen]
    first = first + shift[data.chosen]
    squares = [
        _means(first**2, np.abs(terms.bare), data.chosen, arms, 0.0),
        _means(second**2, np.abs(terms.weight), data.chosen, arms, 0.25),
    ]
    direct = row_sums(terms.delta, terms.predictions)
    spread = (terms.full * terms.delta * (squares[0] + squares[1] / terms.rate)).sum(
        axis=1
    ) + (direct - np.average(direct, weights=h)) ** 2
    return float((h**2 * spread).sum() / h.sum() ** 2)


def _means(
    values: Vector,
    weights: Vector,
    chosen: NDArray[np.int64],
    arms: int,
    default: float,
) -> Vector:
    """[K] the weighted mean of the values of each arm's decisions; the default without any."""
    mass = np.bincount(chosen, weights, minlength=arms)
    total = np.bincount(chosen, weights * values, minlength=arms)
    return np.asarray(
        np.divide(total, mass, out=np.full(arms, default), where=mass > 0)
    )


def signed_terms(data: LoggedDecisions, targets: tuple[Vector, ...]) -> EstimatorTerms:
    """The estimator terms of the first target, less the second if there is one."""
    for target in targets:
        check_target(data, target)
    delta = targets[0] if len(targets) == 1 else targets[0] - targets[1]
    missing = np.sum([1 - target.sum(axis=1) for target in targets], axis=0)
    return terms_of(data, delta, np.maximum(missing, 0.0))


def _scores(
    terms: EstimatorTerms, chosen: NDArray[np.int64], estimator: str
) -> tuple[Vector, Vector]:
    """[N] numerators Γ and [N] denominators of an estimator."""
    if estimator == "dr":
        direct = row_sums(terms.delta, terms.predictions)
        first = terms.answers - at_chosen(terms.predictions, chosen)
        residual = first + terms.seen * (terms.reward - terms.answers)
        return direct + terms.bare * residual, np.ones(len(direct))
    gamma = terms.weight * terms.reward
    return gamma, terms.weight if estimator == "snips" else np.ones(len(gamma))


def stabilisers(load: Vector) -> Vector:
    """[N] weights of the decisions: 1 over the root of the recent average of the loads before each."""
    recent = 1.0
    mass = 1.0
    parts = []
    for begin in range(0, len(load), CHUNK):
        part = load[begin : begin + CHUNK]
        fade = 0.5 ** (np.arange(len(part) + 1) / HALF_LIFE)
        sums = fade * (recent + np.concatenate([[0.0], np.cumsum(part / fade[1:])]))
        masses = fade * (mass + np.concatenate([[0.0], np.cumsum(1 / fade[1:])]))
        parts.append(sums[:-1] / masses[:-1])
        recent = float(sums[-1])
        mass = float(masses[-1])
    average = (1.0 + np.cumsum(load) - load) / np.arange(1, len(load) + 1)
    return np.asarray(
        np.maximum(
            np.concatenate([np.zeros(0), *parts]), np.maximum(LEAST * average, 1e-9)
        )
        ** -0.5
    )


def confidence_sequence(
    data: LoggedDecisions,
    target: Vector,
    baseline: Vector | None = None,
    level: float = 0.95,
) -> tuple[Vector, Vector]:
    """Lower and upper bounds [N] after each decision, all of them valid at once with this probability.

    They bound the mean value over the decisions so far of the target, or of its difference to a baseline. They are
    exact for known propensities and full feedback or a known `feedback_rate`. If only the chosen arm's propensity was
    logged, predictions are not used.

    Args:
        data: the logged decisions.
        target: [N, K] probabilities with which the target chooses each arm.
        baseline: [N, K] probabilities of the baseline; None for the value of the target itself.
        level: probability that all bounds hold.

    Raises:
        ValueError: a target does not fit the log.
    """
    targets = (target,) if baseline is None else (target, baseline)
    terms = signed_terms(data, targets)
    ends = (0.0, 1.0) if baseline is None else (-1.0, 1.0)
    lower = _lower(data, terms, 1.0, ends, (1 - level) / 2)
    upper = -_lower(data, terms, -1.0, (-ends[1], -ends[0]), (1 - level) / 2)
    unknown = np.cumsum(terms.unsupported) / np.arange(1, len(lower) + 1)
    low = data.bounds[0]
    span = data.bounds[1] - data.bounds[0]
    offset = low if baseline is None else 0.0
    return offset + span * np.maximum(
        lower - unknown, ends[0]
    ), offset + span * np.minimum(upper + unknown, ends[1])


def _lower(
    data: LoggedDecisions,
    terms: EstimatorTerms,
    sign: float,
    ends: tuple[float, float],
    alpha: float,
) -> Vector:
    """[N] lower confidence sequence for the mean of sign · Σ_a Δ(a) r(a), rewards r in [0, 1] and the sum in `ends`.

    A term Σ_a Δ(a) q(a) + W (V - q(A) + C (R - V)) has no lower bound if W C and the guesses q and V are large. So
    these are clipped such that they subtract at most CLIP: to CLIP ρ / |W| where W > 0, and to at least 1 - CLIP
    ρ / |W| where W < 0 and R subtracts. The clipped guesses, too, are known before the reward, so this causes no
    bias (Waudby-Smith et al. 2024 do it for q and W > 0).
    """
    delta = sign * terms.delta
    weight = sign * terms.bare
    clip = CLIP
    if np.isnan(terms.full).any():
        # Without the propensities of all arms the bound for clipping is unknown.
        q = (delta < 0).astype(np.float64)
        answers = at_chosen(q, data.chosen)
        clip = 0.0
    else:
        # A hedge may have answered at its own rate, so the smallest rate of the row counts.
        least = terms.rate.min(axis=1, keepdims=True)
        most = CLIP * least / np.maximum(np.abs(terms.full), 1e-12)
        q = np.where(
            delta >= 0,
            np.minimum(terms.predictions, most),
            np.maximum(terms.predictions, 1 - most),
        )
        own = at_chosen(most, data.chosen)
        answers = np.where(
            weight >= 0,
            np.minimum(terms.answers, own),
            np.maximum(terms.answers, 1 - own),
        )
    # what is always seen needs no guess
    answers = np.where((terms.cell < 0) & (terms.seen == 1.0), terms.reward, answers)
    first = answers - at_chosen(q, data.chosen)
    residual = first + terms.seen * (terms.reward - answers)
    x = row_sums(delta, q) + weight * residual
    return lower_sequence(x, ends[0] - clip, ends[1], alpha)
