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
    """What is known of K arms.

    Args:
        factors: [K] are the factors of the arms; set to 1, and changed in place by `refresh`.
        forgetting: weight of an answer one decision later.
    """

    def __init__(self, factors: Vector, forgetting: float):
        factors[:] = 1.0
        self.factors = factors
        # [K][3] lists, because numpy takes three times as long to add to one number.
        self._sums = [[0.0, 0.0, 0.0] for _ in factors]
        self._known = [1.0] * len(factors)  # the same as `factors`
        self._stale = set(range(len(factors)))  # arms whose factor is to be computed
        self._forgetting = forgetting
        self._reference = 0.0  # sequence at which an answer has weight 1

    def advance(self, sequence: float) -> None:
        """Set the forgetting clock to this decision."""
        if sequence - self._reference >= RESCALE_EVERY:
            fade = self._forgetting ** (sequence - self._reference)
            self._reference = float(sequence)
            for arm in range(len(self._sums)):
                self._scale(arm, fade)

    def add(self, arm: int, actual: float, expected: float, sequence: float) -> None:
        """Add an answer: its tokens or seconds, and the expected ones without the factor."""
        weight = self._forgetting ** (self._reference - sequence)
        sums = self._sums[arm]
        sums[COUNT] += weight
        sums[ACTUAL] += weight * actual
        sums[EXPECTED] += weight * expected
        self._stale.add(arm)

    def refresh(self) -> None:
        """Compute the factors of the arms whose sums have changed."""
        while self._stale:
            arm = self._stale.pop()
            self._known[arm] = self.factors[arm] = _factor(*self._sums[arm])

    def factor(self, arm: int) -> float:
        """The factor of an arm, as of the latest `refresh`."""
        return self._known[arm]

    def _scale(self, arm: int, by: float) -> None:
        """Multiply the weight of an arm's answers so far."""
        self._sums[arm] = [by * total for total in self._sums[arm]]
        self._stale.add(arm)

    def discount(self, arm: int, keep: float) -> None:
        """Reduce the weight of an arm's answers so far to at most `keep` answers."""
        self._scale(arm, keep / max(keep, self._sums[arm][COUNT]))

    def state(self) -> dict[str, Vector]:
        """The sums and their clock."""
        return {
            "sums": np.array(self._sums),
            "reference": np.array([self._reference]),
        }

    def restore(self, state: dict[str, Vector]) -> None:
        """Restore a `state()`; the empty state of an earlier release begins anew.

        Raises:
            ValueError: an array is missing, has another shape, or is not finite.
        """
        if not state:
            state = {"sums": np.zeros((len(self._sums), 3)), "reference": np.zeros(1)}
        for name, mine in self.state().items():
            given = state.get(name)
            if given is None or given.shape != mine.shape:
                raise ValueError(f"'{name}' must have shape {mine.shape}")
            if not np.isfinite(given).all():
                raise ValueError(f"'{name}' holds numbers that are not finite")
        self._sums = state["sums"].tolist()
        self._reference = float(state["reference"][0])
        self._stale.update(range(len(self._sums)))


def _factor(count: float, actual: float, expected: float) -> float:
    """The factor that follows from the sums of an arm."""
    if count <= FORGOTTEN or expected <= 0.0:
        return 1.0
    prior = PRIOR * expected / count
    return min(max((actual + prior) / (expected + prior), LEAST), MOST)
