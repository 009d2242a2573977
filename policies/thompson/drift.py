"""Detects drift: an arm's answers have become better or worse than the policy expects.

Page's cumulative sums (Continuous inspection schemes, Biometrika 1954), one for each side and arm, of log likelihood
ratios: of a score y in [0, 1] whose expected value is p, against odds that are e times higher or lower,

    S ← max(0, S + y log(q / p) + (1 - y) log((1 - q) / (1 - p))),   an alarm at S > h.

If the scores have the expected mean, the exponential of a summand has a mean of at most 1. So the mean number of
scores until a false alarm of one side is at least e^h (Lorden, Annals of Mathematical Statistics 1971, theorem 2). The
expected value is the one that the decision logged, so a replay of the journal finds the same. A decision has one
summand, and only an answer without a visible flaw has any, because a failure says nothing of the quality of the other
answers. A late score is ignored if, since its decision, the arm was found changed or its number of scores has doubled.
"""

from math import e, log

import numpy as np

from policies.types import Vector

THRESHOLD = log(20_000.0)  # h
# Factors of the odds, e and 1/e, less 1.
UP = e - 1.0
DOWN = 1.0 / e - 1.0


class Drift:
    """The cumulative sums of K arms, one for scores better and one for scores worse than expected.

    Attributes:
        known: [K] number of scores that count since the arm last changed.
    """

    def __init__(self, arms: int):
        self.better = [0.0] * arms
        self.worse = [0.0] * arms
        self.known = [0] * arms

    def observe(self, arm: int, expected: float, score: float, known: int) -> bool:
        """Record one score. Returns whether the arm is found changed; its sums then restart at zero.

        Args:
            arm: index in [0, K).
            expected: score in [0, 1] that the decision expected.
            score: the score that was given.
            known: the arm's `known` at the decision; -1, as in old logs, counts as the present value.
        """
        now = self.known[arm]
        self.known[arm] = now + 1
        if known >= 0 and not known <= now <= 2 * known:
            return False
        p = expected if 0.0 < expected < 1.0 else float(expected > 0.0)
        # The ratios q / p and (1 - q) / (1 - p) differ by the factor of the odds.
        better = self.better[arm] + score - log(1.0 + p * UP)
        worse = self.worse[arm] - score - log(1.0 + p * DOWN)
        better = better if better > 0.0 else 0.0
        worse = worse if worse > 0.0 else 0.0
        changed = better > THRESHOLD or worse > THRESHOLD
        if changed:
            better = worse = 0.0
            self.known[arm] = 0
        self.better[arm] = better
        self.worse[arm] = worse
        return changed

    def recount(self, arm: int, by: int) -> None:
        """Change the number of known scores, because scores were withdrawn, restored or replaced."""
        self.known[arm] = max(0, self.known[arm] + by)

    def state(self) -> dict[str, Vector]:
        """The sums and the numbers of known scores, [K] each."""
        known = np.array(self.known, np.float64)
        return {
            "better": np.array(self.better),
            "worse": np.array(self.worse),
            "known": known,
        }

    def restore(self, state: dict[str, Vector]) -> None:
        """Restore the sums of `state()`; in a state without `known`, as old versions have it, the count restarts at 0.

        Raises:
            ValueError: they are missing, have another shape, or are not finite.
        """
        state = {"known": np.zeros(len(self.better))} | state
        for name in ("better", "worse", "known"):
            given = state.get(name)
            if (
                given is None
                or given.shape != (len(self.better),)
                or not np.isfinite(given).all()
            ):
                raise ValueError(f"'{name}' must be {len(self.better)} finite numbers")
        self.better = state["better"].tolist()
        self.worse = state["worse"].tolist()
        self.known = [int(n) for n in state["known"]]
