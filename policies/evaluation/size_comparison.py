"""Compares the sizes on prompts that all of them answered: quality, latency, tokens, cost, and what a size is worth.

All intervals have the same level. The mean score of a size has Wilson's interval (JASA 1927), which is a little too
wide for scores between 0 and 1. Other means have Student's interval. Two sizes are compared on the prompts that both
answered, so that the difficulty of the prompts cancels. The interval of such a difference is that of Agresti and Min
(Statistics in Medicine 2005): two prompts are added, one on which the sizes are equal and one on which they are as
likely better as worse by a whole score. Without it, ten equal answers would prove that two sizes are equal.

A size is worth its price where its utility, score - latency_weight · latency - cost_weight · cost, is higher than that
of the best of the cheaper sizes.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from statistics import NormalDist

import numpy as np

from policies.events import CALIBRATION, Record
from policies.types import Objective, Vector

LEVEL = 0.95
ALL = "all"  # the name of all kinds together
WORTH = "worth its price"
NOT_WORTH = "not worth its price"
UNCLEAR = "not clear yet"


@dataclass(frozen=True)
class SizeAnswer:
    """The answer of one size to one prompt.

    prompt: identifies the prompt.
    kind: of work, one of features.KINDS.
    failed: the size gave no answer, or one with a visible flaw.
    score: in [0, 1], 0 if it failed; None if it has no grade.
    latency_s: without the wait in the queue.
    """

    prompt: str
    arm: str
    kind: str
    failed: bool
    score: float | None
    latency_s: float
    prompt_tokens: int
    output_tokens: int
    cost_usd: float


def answer_of(record: Record, prompt: str) -> SizeAnswer | None:
    """The answer in the record of a calibration's decision; None while there is no outcome."""
    outcome = record.outcome
    if outcome is None:
        return None
    failed = outcome.status != "ok" or bool(record.flaw)
    return SizeAnswer(
        prompt=prompt,
        arm=record.decision.arm,
        kind=record.decision.profile.kind,
        failed=failed,
        score=0.0 if failed else record.scores.get(CALIBRATION),
        latency_s=max(0.0, outcome.latency_s - outcome.waited_s),
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        cost_usd=outcome.cost_usd,
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over n values with its interval; None where n is too small."""

    mean: float | None
    lower: float | None
    upper: float | None
    n: int


@dataclass(frozen=True)
class SizeFigures:
    """The figures of one size on one kind of work.

    failed: number of answers that failed.
    score: over all answers with a grade and all failed ones.
    latency_s, prompt_tokens, output_tokens, cost_usd: over the answers that did not fail.
    latency_p95_s: 95th percentile of the latency; None without answers.
    utility: under the report's objective, over the answers in `score`.
    """

    arm: str
    kind: str
    failed: int
    score: Estimate
    latency_s: Estimate
    latency_p95_s: float | None
    prompt_tokens: Estimate
    output_tokens: Estimate
    cost_usd: Estimate
    utility: Estimate


@dataclass(frozen=True)
class Comparison:
    """A size beside the best of the cheaper sizes, on the prompts of one kind that both answered.

    cheaper: the cheaper size with the highest utility.
    score, utility: how much the size has more.
    latency_s, cost_usd: how much more it takes, on the mean.
    worth_up_to: the cost weight up to which the size is worth its price, at the report's latency weight; None if it is
        at none, or costs no more.
    verdict: WORTH or NOT_WORTH if the interval of the utility says so, otherwise UNCLEAR.
    """

    arm: str
    kind: str
    cheaper: str
    score: Estimate
    latency_s: float
    cost_usd: float
    utility: Estimate
    worth_up_to: float | None
    verdict: str


@dataclass(frozen=True)
class SizeReport:
    """The comparison of all sizes.

    level: of all intervals.
    arms: the sizes, cheapest first.
    kinds: the kinds of work, ALL first, then by number of prompts.
    best: by kind, the size with the highest mean utility.
    """

    level: float
    latency_weight: float
    cost_weight: float
    arms: tuple[str, ...]
    kinds: tuple[str, ...]
    figures: tuple[SizeFigures, ...]
    comparisons: tuple[Comparison, ...]
    best: dict[str, str]

    def figures_of(self, arm: str, kind: str) -> SizeFigures | None:
        """The figures of a size on a kind; None if it answered none."""
        for figures in self.figures:
            if figures.arm == arm and figures.kind == kind:
                return figures
        return None

    def plain(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def compare_sizes(
    answers: Sequence[SizeAnswer], objective: Objective, level: float = LEVEL
) -> SizeReport:
    """The report on these answers."""
    by_kind: dict[str, list[SizeAnswer]] = {ALL: list(answers)}
    for answer in answers:
        by_kind.setdefault(answer.kind, []).append(answer)
    kinds = sorted(by_kind, key=lambda kind: (kind != ALL, -len(by_kind[kind]), kind))
    arms = _cheapest_first(answers)
    figures: list[SizeFigures] = []
    comparisons: list[Comparison] = []
    best: dict[str, str] = {}
    for kind in kinds:
        of_arm: dict[str, list[SizeAnswer]] = defaultdict(list)
        for answer in by_kind[kind]:
            of_arm[answer.arm].append(answer)
        present = [arm for arm in arms if arm in of_arm]
        found = {arm: _figures(of_arm[arm], kind, objective, level) for arm in present}
        figures += found.values()
        for i, arm in enumerate(present[1:], 1):
            cheaper = _highest({name: found[name] for name in present[:i]})
            if cheaper:
                comparison = _compare(
                    of_arm[arm], of_arm[cheaper], kind, objective, level
                )
                comparisons += [comparison] if comparison else []
        if winner := _highest(found):
            best[kind] = winner
    return SizeReport(
        level=level,
        latency_weight=objective.latency_weight,
        cost_weight=objective.cost_weight,
        arms=arms,
        kinds=tuple(kinds),
        figures=tuple(figures),
        comparisons=tuple(comparisons),
        best=best,
    )


def _cheapest_first(answers: Sequence[SizeAnswer]) -> tuple[str, ...]:
    """The sizes by their mean cost; those that cost the same in the order of their first answer."""
    costs: dict[str, list[float]] = {}
    for answer in answers:
        costs.setdefault(answer.arm, [])
        if not answer.failed:
            costs[answer.arm].append(answer.cost_usd)
    means = {
        arm: float(np.mean(given)) if given else 0.0 for arm, given in costs.items()
    }
    return tuple(sorted(means, key=lambda arm: means[arm]))


def _highest(figures: dict[str, SizeFigures]) -> str:
    """The size with the highest mean utility; "" without any."""
    known = {
        arm: found.utility.mean
        for arm, found in figures.items()
        if found.utility.mean is not None
    }
    return max(known, key=lambda arm: known[arm]) if known else ""


def _utility(answer: SizeAnswer, objective: Objective) -> float:
    return objective.utility(answer.score or 0.0, answer.latency_s, answer.cost_usd)


def _figures(
    answers: Sequence[SizeAnswer], kind: str, objective: Objective, level: float
) -> SizeFigures:
    scored = [a for a in answers if a.score is not None]
    whole = [a for a in answers if not a.failed]

    def mean(value: Callable[[SizeAnswer], float]) -> Estimate:
        found = mean_interval(np.array([value(a) for a in whole]), level)
        # none of these quantities is negative
        lower = None if found.lower is None else max(0.0, found.lower)
        return replace(found, lower=lower)

    latencies = [a.latency_s for a in whole]
    return SizeFigures(
        arm=answers[0].arm,
        kind=kind,
        failed=len(answers) - len(whole),
        score=score_interval(np.array([a.score for a in scored], np.float64), level),
        latency_s=mean(lambda a: a.latency_s),
        latency_p95_s=float(np.quantile(latencies, 0.95)) if latencies else None,
        prompt_tokens=mean(lambda a: a.prompt_tokens),
        output_tokens=mean(lambda a: a.output_tokens),
        cost_usd=mean(lambda a: a.cost_usd),
        utility=mean_interval(
            np.array([_utility(a, objective) for a in scored]), level
        ),
    )


def _compare(
    answers: Sequence[SizeAnswer],
    cheaper: Sequence[SizeAnswer],
    kind: str,
    objective: Objective,
    level: float,
) -> Comparison | None:
    """A size beside a cheaper one; None if they share no prompt with grades."""
    others = {a.prompt: a for a in cheaper if a.score is not None}
    pairs = [
        (a, others[a.prompt])
        for a in answers
        if a.score is not None and a.prompt in others
    ]
    if not pairs:
        return None
    score = np.array([(a.score or 0.0) - (b.score or 0.0) for a, b in pairs])
    latency_s = float(np.mean([a.latency_s - b.latency_s for a, b in pairs]))
    cost_usd = float(np.mean([a.cost_usd - b.cost_usd for a, b in pairs]))
    utility = np.array(
        [_utility(a, objective) - _utility(b, objective) for a, b in pairs]
    )
    price = float(utility.mean() - score.mean())  # of latency and cost, in score points
    gained = difference_interval(utility, price, level)
    worth = float(score.mean()) - objective.latency_weight * latency_s
    verdict = UNCLEAR
    if gained.lower is not None and gained.upper is not None:
        if gained.lower > 0:
            verdict = WORTH
        elif gained.upper < 0:
            verdict = NOT_WORTH
    return Comparison(
        arm=answers[0].arm,
        kind=kind,
        cheaper=cheaper[0].arm,
        score=difference_interval(score, 0.0, level),
        latency_s=latency_s,
        cost_usd=cost_usd,
        utility=gained,
        worth_up_to=worth / cost_usd if worth > 0 and cost_usd > 0 else None,
        verdict=verdict,
    )


# --- intervals ---------------------------------------------------------------------------------------------------


def score_interval(scores: Vector, level: float) -> Estimate:
    """The mean of N scores in [0, 1] with Wilson's interval."""
    n = len(scores)
    if not n:
        return Estimate(None, None, None, 0)
    mean = float(scores.mean())
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Estimate(mean, max(0.0, center - half), min(1.0, center + half), n)


def mean_interval(values: Vector, level: float) -> Estimate:
    """The mean of N values with Student's interval, which needs two values."""
    n = len(values)
    if n < 2:
        return Estimate(float(values[0]) if n else None, None, None, n)
    mean = float(values.mean())
    half = (
        student_quantile((1 + level) / 2, n - 1) * float(values.std(ddof=1)) / sqrt(n)
    )
    return Estimate(mean, mean - half, mean + half, n)


def difference_interval(differences: Vector, price: float, level: float) -> Estimate:
    """The mean of N differences between two sizes, with the interval of Agresti and Min.

    Args:
        differences: [N] of score less price, for each prompt.
        price: the mean difference of two sizes whose scores are equal; 0 for scores alone.
        level: of the interval.
    """
    n = len(differences)
    if not n:
        return Estimate(None, None, None, 0)
    total = n + 2
    center = (float(differences.sum()) + 2 * price) / total
    # the added prompts: one has the difference `price`, one half each `price + 1` and `price - 1`
    added = (price - center) ** 2
    squares = float(((differences - center) ** 2).sum()) + 2 * added + 1.0
    half = NormalDist().inv_cdf((1 + level) / 2) * sqrt(squares) / total
    return Estimate(float(differences.mean()), center - half, center + half, n)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution (Abramowitz and Stegun, 26.7.5; exact for 1 and 2 degrees of freedom)."""
    if freedom == 1:
        return float(np.tan(np.pi * (probability - 0.5)))
    if freedom == 2:
        a = 2 * probability - 1
        return float(a * sqrt(2 / (1 - a * a)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum([term / float(freedom) ** (i + 1) for i, term in enumerate(terms)])
