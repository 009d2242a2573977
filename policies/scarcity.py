"""The price of a scarce arm: what a request must gain on it to take a place from another one.

Each arm has a price in score points for a request of usual duration. It is the dual variable of the arm's capacity,
found by projected subgradient steps (Nedić and Ozdaglar, IEEE TAC 2009): it rises while more requests are in flight
than the arm is meant to have, and falls to 0 while there is room. A request pays in proportion to the time for which it
will hold its place. So requests that gain little from a scarce arm leave it first. A price removes no arm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.types import ModelState, Vector


@dataclass(frozen=True)
class ScarcitySettings:
    """What an operator can tune.

    step: score points by which the price changes at a decision while an arm has twice its target in flight.
    gain: score points by which the price is higher at once while an arm has twice its target in flight. It damps the
        oscillation that the delay between a choice and its end would cause.
    most: highest price in score points.
    memory: number of decisions over which the usual duration is averaged.
    """

    step: float = 0.0005
    gain: float = 0.2
    most: float = 1.0
    memory: float = 500.0


class ScarcityPrices:
    """The prices of K arms, from the load that the router sees.

    Args:
        targets: [K] requests in flight per replica that each arm is meant to have.
        settings: see ScarcitySettings.
    """

    def __init__(
        self, targets: Sequence[float], settings: ScarcitySettings = ScarcitySettings()
    ):
        self.prices: Vector = np.zeros(len(targets))
        self._duals: Vector = np.zeros(len(targets))
        self._targets = np.array(targets, float)
        self._settings = settings
        self._usual_s: Vector = np.zeros(len(targets))  # 0: not known yet

    def observe(self, states: Sequence[ModelState]) -> None:
        """Move the prices by one step, by the states [K] of the arms before a decision.

        If every arm has more than its target, only what an arm has more than the others counts, because a request must
        go to one of them.
        """
        loads = [state.in_flight / max(1, state.replicas) for state in states]
        given = self._settings
        excess = np.maximum(np.array(loads) / self._targets - 1.0, -1.0)
        excess -= max(0.0, float(excess.min()))
        moved = self._duals + given.step * np.minimum(excess, 1.0)
        self._duals = np.clip(moved, 0.0, given.most)
        self.prices = np.clip(self._duals + given.gain * excess, 0.0, given.most)

    def charges(self, seconds: Vector) -> Vector:
        """[K] score points that a request pays on each arm.

        Args:
            seconds: [K] expected time for which it holds its place.
        """
        known = self._usual_s > 0
        weight = 1.0 / self._settings.memory
        averaged = self._usual_s + weight * (seconds - self._usual_s)
        self._usual_s = np.where(known, averaged, seconds)
        return np.asarray(self.prices * seconds / np.maximum(self._usual_s, 1e-9))
