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
    terms_of,
)
from policies.types import Vector

ESTIMATORS = ("ips", "snips", "dr")
WEIGHTS = ("stabilised", "uniform")
HALF_LIFE = 100.0  # decisions over which the guess of the variance forgets by half
CHUNK = 10_000  # decisions; more in one sum would overflow
LEAST = 0.1  # smallest value of that guess, as a share of its average so far
CLIP = 5.0  # largest amount that a prediction may subtract from one term of a confidence sequence
FIRST_FIT = 32  # decisions before the first fit of the outcome model
GROWTH = 1.15  # growth of the number of decisions from one fit to the next


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
    feedback = int((~np.isnan(data.rewards)).sum())
    ess = feedback * apart**2 / max(float(terms.load.mean()), 1e-12)
    if apart > 1e-6 and ess < MIN_ESS:
        raise UnanswerableError(
            f"where champion and challenger differ, the {feedback} rewards are worth {ess:.0f}; {MIN_ESS:g} needed"
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
    for sign, target in zip((1.0, -1.0), targets, strict=False):
        terms = both if len(targets) == 1 else signed_terms(data, (target,))
        gamma, unit = _scores(data, terms, estimator)
        mine = float((h * gamma).sum() / (h * unit).sum())
        value += sign * mine
        influence += sign * h * (gamma - mine * unit) / (h * unit).sum()
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


def _expected_variance(
    data: LoggedDecisions, terms: EstimatorTerms, h: Vector
) -> float:
    """Variance of the DR average with Σ_a Δ(a)² / e(a) in place of the observed W².

    If rare, large weights happen to be missing from the log, the observed variance is too small exactly when the
    estimate is wrong. The propensities still include them. The squared residual of an arm is averaged with its weights.
    """
    residual = terms.reward - at_chosen(terms.predictions, data.chosen)
    heavy = np.abs(terms.weight)
    mine = np.eye(terms.delta.shape[1])[data.chosen] * heavy[:, None]  # [N, K]
    mass = mine.sum(axis=0)
    squares = np.where(
        mass > 0,
        (mine * residual[:, None] ** 2).sum(axis=0) / np.maximum(mass, 1e-12),
        0.25,
    )
    direct = (terms.delta * terms.predictions).sum(axis=1)
    spread = (terms.full * terms.delta * squares / terms.rate).sum(axis=1) + (
        direct - np.average(direct, weights=h)
    ) ** 2
    return float((h**2 * spread).sum() / h.sum() ** 2)


def signed_terms(data: LoggedDecisions, targets: tuple[Vector, ...]) -> EstimatorTerms:
    """The estimator terms of the first target, less the second if there is one."""
    for target in targets:
        check_target(data, target)
    delta = targets[0] if len(targets) == 1 else targets[0] - targets[1]
    missing = np.sum([1 - target.sum(axis=1) for target in targets], axis=0)
    return terms_of(data, delta, np.maximum(missing, 0.0))


def _scores(
    data: LoggedDecisions, terms: EstimatorTerms, estimator: str
) -> tuple[Vector, Vector]:
    """[N] numerators Γ and [N] denominators of an estimator."""
    if estimator == "dr":
        direct = (terms.delta * terms.predictions).sum(axis=1)
        residual = terms.reward - at_chosen(terms.predictions, data.chosen)
        return direct + terms.weight * residual, np.ones(len(direct))
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

    A term Σ_a Δ(a) q(a) + W (R - q(A)) has no lower bound if W and q are large. So q is clipped such that it subtracts
    at most CLIP: to CLIP / W where W > 0, and to 1 - CLIP / |W| where W < 0 and R subtracts. The clipped q, too, is
    known before the reward, so this causes no bias (Waudby-Smith et al. 2024 do it for W > 0).
    """
    delta = sign * terms.delta
    clip = CLIP
    if np.isnan(terms.full).any():
        # Without the propensities of all arms the bound for clipping is unknown.
        q = (delta < 0).astype(np.float64)
        clip = 0.0
    else:
        most = CLIP * terms.rate / np.maximum(np.abs(terms.full), 1e-12)
        q = np.where(
            delta >= 0,
            np.minimum(terms.predictions, most),
            np.maximum(terms.predictions, 1 - most),
        )
    x = (delta * q).sum(axis=1) + sign * terms.weight * (
        terms.reward - at_chosen(q, data.chosen)
    )
    return lower_sequence(x, ends[0] - clip, ends[1], alpha)


def fit_predictions(
    features: Vector,
    chosen: NDArray[np.int64],
    rewards: Vector,
    arms: int,
    ridge: float = 1.0,
) -> Vector:
    """[N, K] predictions of a ridge regression for each arm, each fitted on earlier decisions only.

    Such predictions do not depend on the reward they are compared with, so DR is free of bias whatever the model, as
    with cross-fitting (Chernozhukov et al., Econometrics Journal 2018). In the log of a policy that learned they must
    use the past only (Bibaut et al. 2021).

    Args:
        features: [N, D] of the decisions in their order; the first is 1.
        chosen: [N] column of the arm.
        rewards: [N] NaN where no reward arrived.
        arms: K.
        ridge: prior precision of each weight except the first.
    """
    n, d = features.shape
    out = np.zeros((n, arms))
    moments = np.zeros((arms, d, d))
    sums = np.zeros((arms, d))
    penalty = np.diag(np.concatenate([[1e-3], np.full(d - 1, ridge)]))
    start = 0
    end = min(n, FIRST_FIT)
    got = ~np.isnan(rewards)
    while start < n:
        # [K, D], zero before the first fit
        weights = np.linalg.solve(moments + penalty, sums[:, :, None])[:, :, 0]
        out[start:end] = features[start:end] @ weights.T
        for k in range(arms):
            mine = start + np.flatnonzero((chosen[start:end] == k) & got[start:end])
            moments[k] += features[mine].T @ features[mine]
            sums[k] += rewards[mine] @ features[mine]
        start = end
        end = min(n, int(end * GROWTH) + 1)
    return out
