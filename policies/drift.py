"""Notices that an arm's answers have become better or worse than what was learned of them.

Page's cumulative sums (Continuous inspection schemes, Biometrika 1954), one for each side and arm, of log likelihood
ratios: of a score y in [0, 1] whose expected value is p, against odds that are e times higher or lower,

    S ← max(0, S + y log(q / p) + (1 - y) log((1 - q) / (1 - p))),   an alarm at S > h.

For any scores that are on the mean as expected, the exponential of a summand is at most 1 on the mean, so a false alarm
of a side comes after e^h scores at the soonest on the mean (Lorden, Annals of Mathematical Statistics 1971, theorem 2).
What was expected is what the decision itself logged, so that a replay of the journal finds the same. A score that comes
late says nothing new if the policy has learned much of the arm since: at least as much as it knew, or that it changed.
"""

from math import e, log

import numpy as np

from policies.types import Vector

THRESHOLD = log(20_000.0)  # h
UP, DOWN = e - 1.0, 1.0 / e - 1.0  # what the odds' factors e and 1/e add to a chance of one


class Drift:
    """The sums of K arms: of scores better and worse than expected.

    Attributes:
        known: [K] scores that count, since the arm last changed.
    """

    def __init__(self, arms: int):
        self.better, self.worse = [0.0] * arms, [0.0] * arms
        self.known = [0] * arms

    def observe(self, arm: int, expected: float, score: float, known: int) -> bool:
        """Take in one score; True, and the arm's sums begin anew, if it has changed by all that is known.

        Args:
            arm: index in [0, K).
            expected: score in [0, 1] that the decision expected.
            score: what was given.
            known: what `known` was of the arm when that was expected; -1, in logs of old, counts as what it is now.
        """
        now = self.known[arm]
        self.known[arm] = now + 1
        if known >= 0 and not known <= now <= 2 * known:
            return False
        p = expected if 0.0 < expected < 1.0 else float(expected > 0.0)
        # the ratios q / p and (1 - q) / (1 - p) differ by the factor of the odds
        better = self.better[arm] + score - log(1.0 + p * UP)
        worse = self.worse[arm] - score - log(1.0 + p * DOWN)
        better, worse = better if better > 0.0 else 0.0, worse if worse > 0.0 else 0.0
        changed = better > THRESHOLD or worse > THRESHOLD
        self.better[arm], self.worse[arm] = (0.0, 0.0) if changed else (better, worse)
        if changed:
            self.known[arm] = 0
        return changed

    def recount(self, arm: int, by: int) -> None:
        """Scores were taken back, or count again or in the place of these."""
        self.known[arm] = max(0, self.known[arm] + by)

    def state(self) -> dict[str, Vector]:
        """The sums and what is known, [K] each."""
        known = np.array(self.known, np.float64)
        return {"better": np.array(self.better), "worse": np.array(self.worse), "known": known}

    def restore(self, state: dict[str, Vector]) -> None:
        """Take over the sums of `state()`; versions from before `known` was kept begin to count anew.

        Raises:
            ValueError: they are missing, have another shape, or are not finite.
        """
        state = {"known": np.zeros(len(self.better))} | state
        for name in ("better", "worse", "known"):
            given = state.get(name)
            if given is None or given.shape != (len(self.better),) or not np.isfinite(given).all():
                raise ValueError(f"'{name}' must be {len(self.better)} finite numbers")
        self.better, self.worse = state["better"].tolist(), state["worse"].tolist()
        self.known = [int(n) for n in state["known"]]
