"""What another policy would have earned, judged from the log of the one that decided: off-policy evaluation.

With propensities e_t, a target policy π, a guess q_t made before decision t, and weights W_t = π(A_t|X_t) / e_t(A_t),

    IPS    Γ_t = W_t R_t                               (Horvitz and Thompson, JASA 1952)
    SNIPS  Σ W_t R_t / Σ W_t                           (Swaminathan and Joachims, NeurIPS 2015)
    DR     Γ_t = Σ_a π(a|X_t) q_t(X_t, a) + W_t (R_t - q_t(X_t, A_t))       (Dudík, Langford and Li, ICML 2011)

are each, less the value of π, martingale differences, though a learning policy makes e_t depend on all that came
before. But their variance moves with e_t, and the plain average is then not normal. So decisions are weighted by 1 over
a predictable guess of their standard deviation (Hadad, Hirshberg, Zhan, Wager and Athey, PNAS 2021; Bibaut et al.,
NeurIPS 2021; Zhan, Hadad, Hirshberg and Athey, KDD 2021), here the root of the recent average of Σ_a π(a|x)² / e(a|x):
the papers evaluate each logging policy on other contexts, too, which a log of propensities cannot. The studentised
average is asymptotically normal for contexts that come independently of each other.

The confidence sequence needs neither asymptotics nor one look only, and contexts may drift: it bounds the mean of the
values so far (Waudby-Smith, Wu, Ramdas, Karampatziakis and Mineiro, ACM/IMS Journal of Data Science 2024). It is wider.

A target must not have learned from the very rewards that judge it: judge a version on the decisions after it was made.
"""

from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from policies.confidence import lower_sequence
from policies.overlap import MIN_ESS, Log, Terms, UnanswerableError, check_target, of_chosen, require_overlap, terms_of
from policies.types import Vector

ESTIMATORS = ("ips", "snips", "dr")
WEIGHTS = ("stabilised", "uniform")
HALF_LIFE = 100.0  # decisions over which the guess of the variance forgets by half
CHUNK = 10_000  # decisions; more in one sum would overflow
LEAST = 0.1  # of its average so far, below which that guess does not go
CUT = 5.0  # what a prediction may take off one term of a confidence sequence
FIRST_FIT, GROWTH = 32, 1.15  # decisions before the first fit of the outcome model; how much more before the next


@dataclass(frozen=True)
class Estimate:
    """The value of a policy, or of the difference between two, in units of the reward.

    value, standard_error: of the estimator.
    low, high: the interval, for one look at the log.
    level: probability with which it holds.
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
    data: Log, target: Vector, estimator: str = "dr", weights: str = "stabilised", level: float = 0.95
) -> Estimate:
    """The value of a target policy, with an interval for one look at the log.

    Args:
        data: what was decided.
        target: [N, K] probabilities with which the target takes each arm.
        estimator: one of ESTIMATORS.
        weights: one of WEIGHTS; only with "stabilised" does the interval hold for logs of a policy that learned.
        level: probability of the interval.

    Raises:
        UnanswerableError: the log cannot answer; the message says why.
        ValueError: unknown estimator or weights, or the target does not fit the log.
    """
    require_overlap(data, target)
    return _estimate(data, (target,), estimator, weights, level)


def difference(
    data: Log,
    champion: Vector,
    challenger: Vector,
    estimator: str = "dr",
    weights: str = "stabilised",
    level: float = 0.95,
) -> Estimate:
    """The value of the challenger less that of the champion, decision by decision on the same log.

    Where the two decide alike they differ by nothing, so this is much narrower than two intervals apart.

    Args:
        data: what was decided, by either of them or by a third.
        champion: [N, K] probabilities with which it takes each arm.
        challenger: [N, K] likewise.
        estimator: one of ESTIMATORS.
        weights: one of WEIGHTS.
        level: probability of the interval.

    Raises:
        UnanswerableError: the log cannot answer for one of them; the message says which, and why.
        ValueError: unknown estimator or weights, or a target does not fit the log.
    """
    _require_both(data, champion, challenger)
    return _estimate(data, (challenger, champion), estimator, weights, level)


def _require_both(data: Log, champion: Vector, challenger: Vector) -> None:
    for name, target in (("champion", champion), ("challenger", challenger)):
        try:
            require_overlap(data, target)
        except UnanswerableError as error:
            raise UnanswerableError(f"{name}: {error}") from None
    terms = signed(data, (challenger, champion))
    apart, feedback = float(np.abs(terms.delta).sum(axis=1).mean()), int((~np.isnan(data.rewards)).sum())
    if apart > 1e-6 and (ess := feedback * apart**2 / max(float(terms.load.mean()), 1e-12)) < MIN_ESS:
        raise UnanswerableError(
            f"where champion and challenger differ, the {feedback} rewards are worth {ess:.0f}; {MIN_ESS:g} needed"
        )


def _estimate(data: Log, targets: tuple[Vector, ...], estimator: str, weights: str, level: float) -> Estimate:
    """Of the first target, less that of the second if there is one."""
    if estimator not in ESTIMATORS or weights not in WEIGHTS:
        wanted = f"{', '.join(ESTIMATORS)} with weights {', '.join(WEIGHTS)}"
        raise ValueError(f"unknown estimator '{estimator}' with weights '{weights}'; choose one of: {wanted}")
    both = signed(data, targets)
    h = stabilisers(both.load) if weights == "stabilised" else np.ones(len(both.load))
    value, influence = 0.0, np.zeros(len(h))
    for sign, target in zip((1.0, -1.0), targets, strict=False):
        terms = both if len(targets) == 1 else signed(data, (target,))
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
    low, span = data.bounds[0], data.bounds[1] - data.bounds[0]
    offset = low if len(targets) == 1 else 0.0
    return Estimate(
        estimator,
        offset + span * value,
        span * error,
        offset + span * (value - reach),
        offset + span * (value + reach),
        level,
    )


def _expected_variance(data: Log, terms: Terms, h: Vector) -> float:
    """Variance of the DR average with Σ_a Δ(a)² / e(a) in place of the W² that came.

    Where rare, heavy weights happened not to come, the observed variance is too small just when the estimate is off;
    the propensities still tell of them. The squared residual of an arm is averaged with its weights.
    """
    residual, heavy = terms.reward - of_chosen(terms.predictions, data.chosen), np.abs(terms.weight)
    mine = np.eye(terms.delta.shape[1])[data.chosen] * heavy[:, None]  # [N, K]
    mass = mine.sum(axis=0)
    squares = np.where(mass > 0, (mine * residual[:, None] ** 2).sum(axis=0) / np.maximum(mass, 1e-12), 0.25)
    direct = (terms.delta * terms.predictions).sum(axis=1)
    spread = (terms.full * terms.delta * squares / terms.rate).sum(axis=1) + (
        direct - np.average(direct, weights=h)
    ) ** 2
    return float((h**2 * spread).sum() / h.sum() ** 2)


def signed(data: Log, targets: tuple[Vector, ...]) -> Terms:
    """The log laid out for the first target, less the second if there is one."""
    for target in targets:
        check_target(data, target)
    delta = targets[0] if len(targets) == 1 else targets[0] - targets[1]
    missing = np.sum([1 - target.sum(axis=1) for target in targets], axis=0)
    return terms_of(data, delta, np.maximum(missing, 0.0))


def _scores(data: Log, terms: Terms, estimator: str) -> tuple[Vector, Vector]:
    """[N] numerators Γ and [N] denominators of an estimator."""
    if estimator == "dr":
        direct = (terms.delta * terms.predictions).sum(axis=1)
        residual = terms.reward - of_chosen(terms.predictions, data.chosen)
        return direct + terms.weight * residual, np.ones(len(direct))
    gamma = terms.weight * terms.reward
    return gamma, terms.weight if estimator == "snips" else np.ones(len(gamma))


def stabilisers(load: Vector) -> Vector:
    """[N] weights of the decisions: 1 over the root of the recent average of the loads before each."""
    recent, mass, parts = 1.0, 1.0, []
    for begin in range(0, len(load), CHUNK):
        part = load[begin : begin + CHUNK]
        fade = 0.5 ** (np.arange(len(part) + 1) / HALF_LIFE)
        sums = fade * (recent + np.concatenate([[0.0], np.cumsum(part / fade[1:])]))
        masses = fade * (mass + np.concatenate([[0.0], np.cumsum(1 / fade[1:])]))
        parts.append(sums[:-1] / masses[:-1])
        recent, mass = float(sums[-1]), float(masses[-1])
    average = (1.0 + np.cumsum(load) - load) / np.arange(1, len(load) + 1)
    return np.asarray(np.maximum(np.concatenate([np.zeros(0), *parts]), np.maximum(LEAST * average, 1e-9)) ** -0.5)


def confidence_sequence(
    data: Log, target: Vector, baseline: Vector | None = None, level: float = 0.95
) -> tuple[Vector, Vector]:
    """Lower and upper bounds [N] after each decision, all of them valid at once with this probability.

    They bound the mean value over the decisions so far of the target, or of its difference to a baseline. Exact for
    known propensities and full feedback or a known `feedback_rate`; where only the chosen arm's propensity was
    logged, predictions are not used.

    Args:
        data: what was decided.
        target: [N, K] probabilities with which the target takes each arm.
        baseline: [N, K] likewise; None for the value of the target itself.
        level: probability that all bounds hold.

    Raises:
        ValueError: a target does not fit the log.
    """
    targets = (target,) if baseline is None else (target, baseline)
    terms = signed(data, targets)
    ends = (0.0, 1.0) if baseline is None else (-1.0, 1.0)
    lower = _lower(data, terms, 1.0, ends, (1 - level) / 2)
    upper = -_lower(data, terms, -1.0, (-ends[1], -ends[0]), (1 - level) / 2)
    unknown = np.cumsum(terms.unsupported) / np.arange(1, len(lower) + 1)
    low, span = data.bounds[0], data.bounds[1] - data.bounds[0]
    offset = low if baseline is None else 0.0
    return offset + span * np.maximum(lower - unknown, ends[0]), offset + span * np.minimum(upper + unknown, ends[1])


def _lower(data: Log, terms: Terms, sign: float, ends: tuple[float, float], alpha: float) -> Vector:
    """[N] lower confidence sequence for the mean of sign · Σ_a Δ(a) r(a), rewards r in [0, 1] and the sum in `ends`.

    A term Σ_a Δ(a) q(a) + W (R - q(A)) has no lower end where W and q are large. So q is cut to what can take off at
    most CUT: to CUT / W where W > 0, and to 1 - CUT / |W| where W < 0 and it is R that takes off. The cut q is as well
    known before the reward as q is, and nothing gets biased (as Waudby-Smith et al. 2024 do for W > 0).
    """
    delta, cut = sign * terms.delta, CUT
    if np.isnan(terms.full).any():  # without the propensities of all arms nobody knows where to cut
        q, cut = (delta < 0).astype(np.float64), 0.0
    else:
        most = CUT * terms.rate / np.maximum(np.abs(terms.full), 1e-12)
        q = np.where(delta >= 0, np.minimum(terms.predictions, most), np.maximum(terms.predictions, 1 - most))
    x = (delta * q).sum(axis=1) + sign * terms.weight * (terms.reward - of_chosen(q, data.chosen))
    return lower_sequence(x, ends[0] - cut, ends[1], alpha)


def fit_predictions(
    features: Vector, chosen: NDArray[np.int64], rewards: Vector, arms: int, ridge: float = 1.0
) -> Vector:
    """[N, K] what a ridge regression for each arm, fitted on earlier decisions only, expects of each decision.

    Predictions that never saw the reward they are compared with keep DR free of bias whatever the model, as
    cross-fitting does (Chernozhukov et al., Econometrics Journal 2018), and in a log that learned they must look
    backward only (Bibaut et al. 2021).

    Args:
        features: [N, D] of the decisions in their order; the first is 1.
        chosen: [N] column of the arm.
        rewards: [N] NaN where none came.
        arms: K.
        ridge: prior precision of each weight, but the first.
    """
    n, d = features.shape
    out, moments, sums = np.zeros((n, arms)), np.zeros((arms, d, d)), np.zeros((arms, d))
    penalty = np.diag(np.concatenate([[1e-3], np.full(d - 1, ridge)]))
    start, end = 0, min(n, FIRST_FIT)
    got = ~np.isnan(rewards)
    while start < n:
        weights = np.linalg.solve(moments + penalty, sums[:, :, None])[:, :, 0]  # [K, D], zero at first
        out[start:end] = features[start:end] @ weights.T
        for k in range(arms):
            mine = start + np.flatnonzero((chosen[start:end] == k) & got[start:end])
            moments[k] += features[mine].T @ features[mine]
            sums[k] += rewards[mine] @ features[mine]
        start, end = end, min(n, int(end * GROWTH) + 1)
    return out
