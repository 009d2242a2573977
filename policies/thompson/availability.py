"""Availability: the probability that an arm's answer arrives without a visible flaw.

Every answer shows whether it failed, was empty, malformed or cut off; a score comes for few. So the two are learned
apart: the expected score is availability · quality of an unflawed answer.

An arm is well or down, which is a hidden Markov chain along its latest WINDOW outcomes; the forward recursion gives the
probability p that the arm was well at each of them (Rabiner, Proceedings of the IEEE 1989). While it is down nearly
every answer is flawed. An arm that is down recovers with a rate per decision of any arm, so an arm that is not asked
any more is tried again. With w = γ^(now - sequence), the availability of an arm that is well is

    Beta(GOOD + Σ p w [no flaw], FLAWED + Σ p w [flaw]).

So an outage is noticed at once and says nothing of the time after it, whereas a higher rate of failures is learned
from the latest outcomes, at any share of the traffic.

The window keeps the outcomes with the highest sequence numbers, so it does not depend on the order of arrival.
"""

from math import exp, log

import numpy as np
from numpy.typing import NDArray

from policies.thompson.compiling import compiled
from policies.types import Vector

WINDOW = 128  # latest outcomes of an arm
DECAY = 1 - 1 / 500  # γ, for each decision of any arm
# Counts of the prior Beta distribution.
GOOD = 19.95
FLAWED = 0.05
# The hidden chain: probability that an arm goes down before an outcome, decisions after which an arm that is down
# recovers, and the probability of a flaw while it is well and while it is down.
GOES_DOWN = 1 / 1000
RECOVERS_AFTER = 50.0
WELL = 0.05
DOWN = 0.9
LOG_DECAY = log(DECAY)
# Factors for a distance in decisions, [DISTANCES] each, because the recursion needs two at every outcome. The last ones
# are 1e-7 and 0.
DISTANCES = 8192
FADES = np.array([exp(n * LOG_DECAY) for n in range(DISTANCES)])
STAYS_DOWN = np.array([exp(-n / RECOVERS_AFTER) for n in range(DISTANCES)])
# See `estimate`.
Observed = tuple[Vector, NDArray[np.bool_], Vector, float]
OBSERVED = "f8[:, :, ::1], b1[::1], f8[:, ::1], f8"
# Columns of a window.
SEQUENCE, IS_FLAWED, WEIGHT = range(3)


class Availability:
    """The state of K arms, each of which is well or down."""

    def __init__(self, arms: int):
        # [K, WINDOW, 3] by ascending sequence; empty places have the weight 0.
        self.window = np.tile([-1.0, 0.0, 0.0], (arms, WINDOW, 1))
        self._now = 0.0
        # [K, 4] see `_filter`
        self._found = np.zeros((arms, 4))
        self._changed = np.ones(arms, np.bool_)

    def advance(self, sequence: int) -> None:
        """Set the clock to this decision."""
        if sequence > self._now:
            self._now = float(sequence)

    def observe(self, arm: int, sequence: int, flawed: bool) -> None:
        """Record one outcome of an arm; one that is older than a full window is ignored."""
        _insert(self.window, self._changed, arm, sequence, flawed)

    def discount(self, arm: int, keep: float) -> None:
        """Reduce the weight of an arm's outcomes so far to at most `keep` outcomes; the arm counts as well."""
        weight = self.window[arm, :, WEIGHT]
        weight *= keep / max(keep, float(weight.sum()) + 1e-9)
        self._changed[arm] = True

    def predict(self) -> tuple[Vector, Vector]:
        """Mean and variance [K] of the availability."""
        return estimate(*self.observed())

    def observed(self) -> Observed:
        """The arguments of `estimate`."""
        return self.window, self._changed, self._found, self._now

    def state(self) -> dict[str, Vector]:
        """The windows, from which everything else follows."""
        return {"window": self.window.copy()}

    def restore(self, state: dict[str, Vector]) -> None:
        """Restore the windows of `state()`; without them, as in the state of an earlier release, they are empty.

        Raises:
            ValueError: they have another shape or are not finite.
        """
        given = state.get("window", Availability(len(self.window)).window)
        if given.shape != self.window.shape or not np.isfinite(given).all():
            raise ValueError(
                f"'window' must be finite numbers of shape {self.window.shape}"
            )
        self.window = np.array(given, np.float64, order="C")
        self._changed[:] = True


@compiled("void(f8[:, :, ::1], b1[::1], i8, f8, b1)")
def _insert(
    window: Vector,
    changed: NDArray[np.bool_],
    arm: int,
    sequence: float,
    flawed: bool,
) -> None:
    """Insert an outcome into the window [K, WINDOW, 3] of one arm, in place; the oldest one leaves it."""
    changed[arm] = True
    rows = window[arm]
    if sequence <= rows[0, SEQUENCE] and rows[0, WEIGHT] > 0.0:
        return
    place = 0
    while place + 1 < len(rows) and rows[place + 1, SEQUENCE] <= sequence:
        place += 1
        for column in range(3):
            rows[place - 1, column] = rows[place, column]
    rows[place, SEQUENCE] = sequence
    rows[place, IS_FLAWED] = 1.0 if flawed else 0.0
    rows[place, WEIGHT] = 1.0


@compiled("i8(f8)")
def _place(distance: float) -> int:
    """The place in FADES and STAYS_DOWN of a distance in decisions; their ends stand for longer ones."""
    return min(max(int(distance), 0), DISTANCES - 1)


@compiled("void(f8[:, ::1], f8[::1])")
def _filter(window: Vector, found: Vector) -> None:
    """Forward recursion over the window [WINDOW, 3] of one arm.

    Outcomes with a weight below 1 are older than a change of the arm: they count, but do not belong to the chain.

    Args:
        window: the outcomes.
        found: [4] is set to the sequence of the latest outcome, the probability that the arm was down then, and Σ p w
            and Σ p w [flaw] at that sequence.
    """
    latest = max(window[len(window) - 1, SEQUENCE], 0.0)
    before = -1.0
    down = 0.0
    counted = 0.0
    flawed = 0.0
    for n in range(len(window)):
        weight = window[n, WEIGHT]
        if weight <= 0.0:
            continue
        well = 1.0
        if weight >= 1.0:
            if before >= 0.0 and down > 1e-12:
                down *= STAYS_DOWN[_place(window[n, SEQUENCE] - before)]
            down += (1.0 - down) * GOES_DOWN
            flaw = window[n, IS_FLAWED] > 0.0
            if_down = down * (DOWN if flaw else 1.0 - DOWN)
            if_well = (1.0 - down) * (WELL if flaw else 1.0 - WELL)
            down = if_down / (if_down + if_well)
            before = window[n, SEQUENCE]
            well = 1.0 - down
        share = well * weight * FADES[_place(latest - window[n, SEQUENCE])]
        counted += share
        flawed += share * window[n, IS_FLAWED]
    found[0] = latest
    found[1] = down
    found[2] = counted
    found[3] = flawed


@compiled(f"UniTuple(f8[::1], 2)({OBSERVED})")
def estimate(
    window: Vector, changed: NDArray[np.bool_], found: Vector, now: float
) -> tuple[Vector, Vector]:
    """Mean and variance [K] of the availability at this decision.

    Args:
        window: [K, WINDOW, 3].
        changed: [K] whether the window has changed since the last call; reset in place.
        found: [K, 4] results of `_filter`, updated in place.
        now: number of decisions.
    """
    arms = len(window)
    means = np.empty(arms)
    variances = np.empty(arms)
    for k in range(arms):
        if changed[k]:
            _filter(window[k], found[k])
            changed[k] = False
        age = max(now - found[k, 0], 0.0)
        fade = exp(age * LOG_DECAY)
        total = GOOD + FLAWED + fade * found[k, 2]
        well = 1.0 - (FLAWED + fade * found[k, 3]) / total
        down = found[k, 1] * exp(-age / RECOVERS_AFTER)
        apart = well - (1.0 - DOWN)
        means[k] = (1.0 - down) * well + down * (1.0 - DOWN)
        variances[k] = (1.0 - down) * (
            well * (1.0 - well) / (total + 1.0) + down * apart * apart
        )
    return means, variances
