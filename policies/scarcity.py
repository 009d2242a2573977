"""The price of a scarce arm: what a request must gain on it to take a place from another one.

Each arm has a price in score points for a request of usual duration. It is the dual variable of the arm's capacity,
found by projected subgradient steps (Nedić and Ozdaglar, IEEE TAC 2009): it rises while more requests are in flight
than the arm is meant to have, and falls to 0 while there is room. A request pays in proportion to the time for which it
will hold its place. So requests that gain little from a scarce arm leave it first. A price removes no arm.

Variants of a model are arms of one application and have one price: they take places from each other. A second costs
them the same, so one that answers in a shorter time pays less.

The steps are in proportion to the time that passes, so several ingresses that see the same load find the same prices,
and an old price fades.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from msgspec import structs

from policies.events import ArmEstimate, Decision
from policies.types import Arm, ModelState

IDLE = ModelState()
EVERY = 8  # decisions, of which one shows the usual durations


@dataclass(frozen=True)
class ScarcitySettings:
    """The constants of the rule.

    target: share of its slots that an arm is meant to have in flight.
    step: score points by which the dual changes in one usual duration while an arm has twice its target in flight.
    gain: score points by which the price is higher at once while an arm has twice its target in flight. It damps the
        oscillation that the delay between a choice and its end would cause.
    most: highest price in score points.
    memory: number of decisions over which the usual duration is averaged.
    """

    target: float = 0.25
    step: float = 0.02
    gain: float = 0.2
    most: float = 1.0
    memory: float = 500.0


class ScarcityPrices:
    """The prices of the arms, from the load that one ingress or the router sees.

    Args:
        arms: all arms.
        settings: see ScarcitySettings.
    """

    def __init__(
        self, arms: Sequence[Arm] = (), settings: ScarcitySettings = ScarcitySettings()
    ):
        self._settings = settings
        # by application, the arms that it serves
        served: dict[str, list[Arm]] = {}
        for arm in arms:
            served.setdefault(arm.application, []).append(arm)
        self._served = [[arm.name for arm in own] for own in served.values()]
        tasks = [{task for arm in own for task in arm.tasks} for own in served.values()]
        # applications with the same alternatives, each group with those that share a task with it
        groups: dict[tuple[int, ...], list[int]] = {}
        for n, own_tasks in enumerate(tasks):
            rivals = [not other.isdisjoint(own_tasks) for other in tasks]
            groups.setdefault(
                tuple(k for k, is_one in enumerate(rivals) if is_one), []
            ).append(n)
        self._groups = list(groups.items())
        # of each application
        self._duals = [0.0] * len(tasks)  # score points
        self._usual_s = [0.0] * len(tasks)  # 0: not known yet
        self._at_s = 0.0
        self._decisions = 0

    def priced(
        self, states: dict[str, ModelState], now_s: float, slots: float
    ) -> dict[str, ModelState]:
        """The states with their prices, moved by one step for the time since the last call.

        If all arms for a task have more than their target, only what an arm has more than the others counts, because a
        request must go to one of them.

        Args:
            states: of the arms before a decision, by name. An arm without a state is idle.
            now_s: monotonic.
            slots: requests that a replica may have at once, over all ingresses; 0 switches the prices off.
        """
        passed_s = now_s - self._at_s
        self._at_s = now_s
        target = self._settings.target * slots
        if target <= 0.0:
            self._duals = [0.0] * len(self._duals)
            return states
        for state in states.values():
            if state.in_flight > target * state.replicas:
                break
        else:
            if not any(self._duals):
                return states
        live = [states.get(names[0], IDLE) for names in self._served]
        excess = [
            s.in_flight / (target * (s.replicas or 1)) - 1.0 if s.healthy else inf
            for s in live
        ]
        priced = dict(states)
        for k, price in self._step(excess, passed_s):
            for name in self._served[k]:
                state = states.get(name, IDLE)
                priced[name] = structs.replace(state, price=price)
        return priced

    def _step(
        self, excess: list[float], passed_s: float
    ) -> Iterator[tuple[int, float]]:
        """Move the duals; gives the numbers of the applications that have a price, and the price of a second.

        Args:
            excess: of each application, the load beyond its target as a share of that; infinite without a replica.
            passed_s: time since the last step.
        """
        given = self._settings
        for rivals, members in self._groups:
            common = max(0.0, min([excess[n] for n in rivals]))
            for k in members:
                usual_s = self._usual_s[k]
                beyond = excess[k] - common
                if not usual_s or excess[k] == inf:
                    continue
                share = passed_s / usual_s
                if beyond > 0.0 and share > 1.0:
                    share = 1.0  # a longer gap says nothing of the load within it
                dual = self._duals[k] + given.step * min(beyond, 1.0) * share
                self._duals[k] = dual = min(max(dual, 0.0), given.most)
                price = min(dual + given.gain * beyond, given.most)
                if price > 0.0:
                    yield k, price / usual_s

    def decided(self, decision: Decision) -> None:
        """Take note of how long a request would hold a place at each application; most decisions are skipped to save
        time.
        """
        self._decisions += 1
        if self._decisions % EVERY != 1:
            return
        weight = EVERY / self._settings.memory
        for k, names in enumerate(self._served):
            seconds = _expected_s([decision.estimate(name) for name in names])
            if seconds > 0.0:
                usual_s = self._usual_s[k] or seconds
                self._usual_s[k] = usual_s + weight * (seconds - usual_s)


def _expected_s(estimates: list[ArmEstimate]) -> float:
    """How long a request would hold a place at the application of these arms; 0 if no arm has an estimate.

    The arms count by their propensities, or equally if none could be chosen.
    """
    known = [e for e in estimates if e.answer_s > 0.0]
    if not known:
        return 0.0
    total = sum(e.propensity for e in known)
    if total <= 0.0:
        return sum(e.answer_s for e in known) / len(known)
    return sum(e.propensity * e.answer_s for e in known) / total
