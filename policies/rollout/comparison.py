"""Compares a rule and the policy that is tried beside it, on requests for which a coin decided between them.

Both choose an arm for each request before the coin is thrown. Where they choose the same arm the coin changes nothing,
so the difference is exactly zero. Where they differ, the coin makes a randomised experiment, whatever the two policies
have learned meanwhile. With d, the share of the requests for which they differ,

    gain of the policy, per request = d · (mean reward where it acted - mean reward where the rule acted).

A visible flaw is always seen and a score is seen for a sample, which may depend on the arm and the kind of work. So
each mean is post-stratified: the mean of the scored answers of an arm and kind counts for all unflawed answers of that
arm and kind, and the flaws count as they are (Holt and Smith, JRSS A 1979).

A policy that explores where it expects a score is measured while it explores. Elsewhere it serves its best estimate, so
it is somewhat better than the measured mean, and the gate is somewhat too strict. An answer that lost to its hedge, or
whose client left, does not count.

The interval is normal for one look. For any number of looks it is the asymptotic confidence sequence of Waudby-Smith,
Arbour, Sinha, Kennedy and Ramdas (Annals of Statistics 2024).
"""

from dataclasses import dataclass
from math import log, sqrt
from statistics import NormalDist

import msgspec

from policies.events import Record

FLAWED = ("", "")  # the cell of all answers with a visible flaw
PRIOR_VARIANCE = 0.25  # of a reward that is 0 or 1 with the same probability
TUNED_FOR = 100.0  # rewards of the policy with fewer; at this number the confidence sequence is narrowest
LARGEST_GAIN = 2.0  # largest possible difference of two rewards, which are in [-1, 1]
FEW = 3.0  # 95 % bound of the mean of a Poisson count that was 0


class Cell(msgspec.Struct):
    """The answers of one arm and kind, or all flawed ones, where the two choices differed and one policy acted.

    tried: whether the policy that is tried acted, and not the rule.
    arm, kind: see FLAWED.
    answered: number of answers.
    rewarded: number of those with a reward.
    total, squares: sums of the rewards and of their squares.
    """

    tried: bool
    arm: str
    kind: str
    answered: int = 0
    rewarded: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def variance(self) -> float:
        """Variance of a reward. PRIOR_VARIANCE counts as one more observation: few equal rewards do not make it 0."""
        n = max(1, self.rewarded)
        within = max(0.0, self.squares - self.total**2 / n)
        return (within + PRIOR_VARIANCE) / n


@dataclass(frozen=True)
class Difference:
    """The measured gain of the policy over the rule, per request, in units of the reward.

    value: None while one of the two has no reward where the choices differ.
    lower, upper: bounds of the gain.
    level: coverage of the bounds.
    most: the largest gain or loss that the share of differing choices allows.
    differed: share of the requests for which the choices differ; None without any request.
    requests: number of requests, whether the choices differ or not.
    rewards, rule_rewards: number of rewards where the choices differ and the policy, or the rule, acted.
    """

    value: float | None
    lower: float
    upper: float
    level: float
    most: float
    differed: float | None
    requests: int
    rewards: int
    rule_rewards: int


@dataclass(frozen=True)
class _Mean:
    """The post-stratified mean reward of one policy, the variance of that mean, and the number of rewards."""

    value: float
    variance: float
    rewards: int


class RandomisedComparison:
    """The rewards of a rule and of a policy, for the requests of one stage of a rollout.

    Attributes:
        requests: number of requests that leave a choice.
        differed: those for which the two choose different arms.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.differed = 0
        self._cells: dict[tuple[bool, str, str], Cell] = {}

    def add_request(self, differs: bool) -> None:
        """Count a request that leaves a choice."""
        self.requests += 1
        self.differed += differs

    def add_answer(self, record: Record, tried: bool) -> None:
        """Count an answer, with a flaw or without, where the choices differ."""
        self._cell(record, tried).answered += 1

    def add_reward(self, record: Record, tried: bool, reward: float) -> None:
        """Count the reward of an answer that was counted before."""
        cell = self._cell(record, tried)
        cell.rewarded += 1
        cell.total += reward
        cell.squares += reward * reward

    def _cell(self, record: Record, tried: bool) -> Cell:
        decision = record.decision
        arm, kind = FLAWED if record.flaw else (decision.arm, decision.profile.kind)
        key = tried, arm, kind
        if key not in self._cells:
            self._cells[key] = Cell(tried, arm, kind)
        return self._cells[key]

    def rewards(self, tried: bool) -> int:
        """Number of rewards of the policy or of the rule, where the choices differ."""
        return sum(c.rewarded for c in self._cells.values() if c.tried == tried)

    def difference(self, level: float = 0.95, repeated: bool = False) -> Difference:
        """The gain of the policy over the rule, with an interval.

        Before both have rewards, and always if they are narrower, the bounds are those that follow from the share of
        differing choices alone.

        Args:
            level: coverage of the interval.
            repeated: whether the interval must hold for any number of looks.
        """
        n = self.requests
        # Where hardly any choice differs, hardly anything can change.
        most = LARGEST_GAIN * min(1.0, (self.differed + FEW) / n) if n else LARGEST_GAIN
        share = self.differed / n if n else None
        means = self._mean(True), self._mean(False)
        counts = self.rewards(True), self.rewards(False)
        if share is None or means[0] is None or means[1] is None:
            return Difference(None, -most, most, level, most, share, n, *counts)
        gain = means[0].value - means[1].value
        variance = share**2 * (means[0].variance + means[1].variance)
        variance += gain**2 * share * (1 - share) / n
        reach = _width(level, min(counts), repeated) * sqrt(variance)
        value = share * gain
        return Difference(
            value,
            max(value - reach, -most),
            min(value + reach, most),
            level,
            most,
            share,
            n,
            *counts,
        )

    def _mean(self, tried: bool) -> _Mean | None:
        cells = [c for c in self._cells.values() if c.tried == tried and c.answered]
        answered = sum(cell.answered for cell in cells)
        rewarded = [cell for cell in cells if cell.rewarded]
        count = sum(cell.rewarded for cell in rewarded)
        if not count:
            return None
        unflawed = [c for c in rewarded if (c.arm, c.kind) != FLAWED]
        scores = sum(cell.rewarded for cell in unflawed)
        if not scores and len(rewarded) < len(cells):
            return None  # flaws alone do not tell what the other answers are worth
        pooled = sum(cell.total for cell in unflawed) / max(1, scores)
        means = [c.total / c.rewarded if c.rewarded else pooled for c in cells]
        weights = [cell.answered / answered for cell in cells]
        value = sum(w * m for w, m in zip(weights, means, strict=True))
        variance = 0.0
        for cell, weight, mean in zip(cells, weights, means, strict=True):
            variance += weight**2 * cell.variance / max(1, cell.rewarded)
            variance += weight * (mean - value) ** 2 / answered
        return _Mean(value, variance, count)

    def state(self) -> list[Cell]:
        """The cells, for `restore`."""
        return list(self._cells.values())

    def restore(self, requests: int, differed: int, cells: list[Cell]) -> None:
        """Continue from these counts and the cells of `state`."""
        self.requests = requests
        self.differed = differed
        self._cells = {(c.tried, c.arm, c.kind): c for c in cells}


def _width(level: float, rewards: int, repeated: bool) -> float:
    """Half the width of the interval, in standard errors of the difference."""
    if not repeated:
        return NormalDist().inv_cdf((1 + level) / 2)
    doubt = max(1.0, -2 * log(1 - level))
    x = (doubt + log(doubt) + 1) * max(1, rewards) / TUNED_FOR
    return sqrt(2 * (x + 1) / x * log(sqrt(x + 1) / (1 - level)))
