"""Smearing: factors by which an arm's answers are longer or slower, on the mean, than log-normal models expect.

The models of latency.py expect exp(mean + variance / 2). Where one answer in ten is thirty times as long, as with long
reasoning, the logarithm of the length is not normal, and the mean is far above that. Where short streams arrive at
once, the logarithm of the time per token scatters, and the mean is far below it. The factor

    f = Σ actual / Σ expected

of the tokens, or of the seconds after the first token, corrects the mean whatever the distribution (the ratio form of
Duan's smearing estimate, JASA 1983). Each decision records the factors in its estimate, so what is expected without
them follows from the record alone, and events commute. The first answers of an arm do not count, because they were
expected before anything was known of it.
"""

import numpy as np

from policies.types import Vector

ENOUGH = 20.0  # answers of an arm from which the model has learned before the factor is learned
PRIOR = 20.0  # answers for which the factor 1 counts
LEAST, MOST = 0.25, 4.0
RESCALE_EVERY = 64  # decisions
FORGOTTEN = 1e-9  # weight of all answers below which nothing is known
# Columns of the sums.
COUNT, ACTUAL, EXPECTED = range(3)


class Smearing:
    """What is known of K arms; `factors` [K] are their factors.

    Args:
        arms: K.
        forgetting: weight of an answer one decision later.
    """

    def __init__(self, arms: int, forgetting: float):
        self.sums = np.zeros((arms, 3))
        self.factors = np.ones(arms)  # [K]
        self._forgetting = forgetting
        self._reference = 0.0  # sequence at which an answer has weight 1

    def advance(self, sequence: float) -> None:
        """Set the forgetting clock to this decision."""
        if sequence - self._reference >= RESCALE_EVERY:
            self.sums *= self._forgetting ** (sequence - self._reference)
            self._reference = float(sequence)
            self._update_all()

    def add(self, arm: int, actual: float, expected: float, sequence: float) -> None:
        """Add an answer: its tokens or seconds, and the expected ones without the factor."""
        weight = self._forgetting ** (self._reference - sequence)
        sums = self.sums[arm]
        sums[COUNT] += weight
        sums[ACTUAL] += weight * actual
        sums[EXPECTED] += weight * expected
        self._update(arm)

    def _update(self, arm: int) -> None:
        """Compute the factor of an arm from its sums."""
        count, actual, expected = self.sums[arm].tolist()
        factor = 1.0
        if count > FORGOTTEN and expected > 0.0:
            prior = PRIOR * expected / count
            factor = min(max((actual + prior) / (expected + prior), LEAST), MOST)
        self.factors[arm] = factor

    def _update_all(self) -> None:
        for arm in range(len(self.sums)):
            self._update(arm)

    def discount(self, arm: int, keep: float) -> None:
        """Reduce the weight of an arm's answers so far to at most `keep` answers."""
        self.sums[arm] *= keep / max(keep, float(self.sums[arm, COUNT]))
        self._update(arm)

    def state(self) -> dict[str, Vector]:
        """The sums and their clock."""
        return {"sums": self.sums.copy(), "reference": np.array([self._reference])}

    def restore(self, state: dict[str, Vector]) -> None:
        """Restore a `state()`; the empty state of an earlier release begins anew.

        Raises:
            ValueError: an array is missing, has another shape, or is not finite.
        """
        if not state:
            state = {"sums": np.zeros_like(self.sums), "reference": np.zeros(1)}
        for name, mine in self.state().items():
            given = state.get(name)
            if given is None or given.shape != mine.shape:
                raise ValueError(f"'{name}' must have shape {mine.shape}")
            if not np.isfinite(given).all():
                raise ValueError(f"'{name}' holds numbers that are not finite")
        self.sums = state["sums"].copy()
        self._reference = float(state["reference"][0])
        self._update_all()
