"""Notices that an arm's answers have become better or worse than what was learned of them.

Page's cumulative sums (Continuous inspection schemes, Biometrika 1954), one for each side and arm, of the scores'
standardised surprise z = (score - expected) / √(expected (1 - expected)), which is clipped: S ← max(0, S ± z - k), an
alarm at S > h. What was expected is what the decision itself logged, so that a replay of the journal finds the same.
"""

from math import sqrt

import numpy as np

from policies.types import Vector

REFERENCE = 0.25  # k: half of the smallest shift worth noticing, in standard deviations
THRESHOLD = 15.0  # h: at k and no shift, an alarm in about 10⁴ scores
CLIP = 3.0  # a single surprise says no more than this
LEAST_VARIANCE = 0.05  # of a score


class Drift:
    """The sums of K arms: of scores better and worse than expected."""

    def __init__(self, arms: int):
        self.better, self.worse = [0.0] * arms, [0.0] * arms

    def observe(self, arm: int, expected: float, score: float) -> bool:
        """Take in one score; True, and the arm's sums begin anew, if it has changed by all that is known.

        Args:
            arm: index in [0, K).
            expected: score in [0, 1] that the decision expected.
            score: what was given.
        """
        expected = min(max(expected, 0.0), 1.0)
        surprise = (score - expected) / sqrt(max(expected * (1.0 - expected), LEAST_VARIANCE))
        surprise = min(max(surprise, -CLIP), CLIP)
        better = max(0.0, self.better[arm] + surprise - REFERENCE)
        worse = max(0.0, self.worse[arm] - surprise - REFERENCE)
        changed = max(better, worse) > THRESHOLD
        self.better[arm], self.worse[arm] = (0.0, 0.0) if changed else (better, worse)
        return changed

    def state(self) -> dict[str, Vector]:
        """The sums, [K] each."""
        return {"better": np.array(self.better), "worse": np.array(self.worse)}

    def restore(self, state: dict[str, Vector]) -> None:
        """Take over the sums of `state()`.

        Raises:
            ValueError: they are missing, have another shape, or are not finite.
        """
        for name in ("better", "worse"):
            given = state.get(name)
            if given is None or given.shape != (len(self.better),) or not np.isfinite(given).all():
                raise ValueError(f"'{name}' must be {len(self.better)} finite numbers")
        self.better, self.worse = state["better"].tolist(), state["worse"].tolist()
