"""The price of a scarce arm: what a request must gain on it to take a place from another one.

Each arm has a price for a request of usual work. It is the dual variable of the arm's capacity, found by projected
subgradient steps (Nedić and Ozdaglar, IEEE TAC 2009): it rises while more requests are in flight than the arm is meant
to have, and falls to 0 while there is room. Its unit is what the duration of a usual answer costs, by the weights of
the requests on latency, because a request that fills an arm costs the others time (Pigou, The Economics of Welfare,
1920). Where time is worth nothing, so is a place.

A request pays in proportion to its work: its prompt tokens, and its expected output tokens with a factor (`work`). So a
scarce arm keeps the requests that gain much from it for little work, as in the knapsack problem (Dantzig, Operations
Research 1957). A price removes no arm.

Variants of a model are arms of one application and have one price: they take places from each other. A token costs
them the same, so one that answers with fewer tokens pays less.

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
EVERY = 8  # decisions, of which one shows the usual durations and the usual work
# An output token takes a replica with a full batch about as long as so many prompt tokens. In the list prices of hosted
# models it costs three to five times as much as one; a factor of 2 or 8 decides nearly the same (benchmarks/LOG.md).
OUTPUT_WORK = 4.0


def work(prompt_tokens: float, output_tokens: float) -> float:
    """How much of a replica with a full batch a request takes, in thousands of prompt tokens."""
    return (prompt_tokens + OUTPUT_WORK * output_tokens) / 1000.0


@dataclass(frozen=True)
class ScarcitySettings:
    """The constants of the rule.

    target: share of its slots that an arm is meant to have in flight.
    step: by how much the dual changes in the duration of a usual answer while an arm has twice its target in flight.
    gain: by how much the price is higher at once while an arm has twice its target in flight. It damps the oscillation
        that the delay between a choice and its end would cause.
    most: the highest price. Prices are in units of what the duration of a usual answer costs.
    memory: number of decisions over which the usual duration and work are averaged.
    """

    target: float = 0.125
    step: float = 0.2
    gain: float = 2.0
    most: float = 10.0
    memory: float = 500.0


@dataclass
class Usual:
    """The usual request of an application: means over the latest ones that were seen.

    seconds: from leaving the queue to the last token. delay: the score points that these seconds cost, by the weight of
    the latency in its objective. work: see `work`. seen: number of requests.
    """

    seconds: float = 0.0
    delay: float = 0.0
    work: float = 0.0
    seen: int = 0

    def add(self, seconds: float, delay: float, taken: float, most: float) -> None:
        """Take note of a request; the mean is over about so many (`most`)."""
        self.seen += 1
        weight = 1.0 / min(self.seen, most)
        self.seconds += weight * (seconds - self.seconds)
        self.delay += weight * (delay - self.delay)
        self.work += weight * (taken - self.work)


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
        self._duals = [0.0] * len(tasks)  # units, see ScarcitySettings
        self._usual = [Usual() for _ in tasks]
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
                # an arm whose last replica will stop has a higher price already
                price = max(price, state.price)
                priced[name] = structs.replace(state, price=price)
        return priced

    def _step(
        self, excess: list[float], passed_s: float
    ) -> Iterator[tuple[int, float]]:
        """Move the duals; gives the numbers of the applications that have a price, and the price of a unit of work in
        score points.

        Args:
            excess: of each application, the load beyond its target as a share of that; infinite without a replica.
            passed_s: time since the last step.
        """
        given = self._settings
        for rivals, members in self._groups:
            common = max(0.0, min([excess[n] for n in rivals]))
            for k in members:
                usual = self._usual[k]
                beyond = excess[k] - common
                if not usual.work or excess[k] == inf:
                    continue
                share = passed_s / usual.seconds
                if beyond > 0.0 and share > 1.0:
                    share = 1.0  # a longer gap says nothing of the load within it
                dual = self._duals[k] + given.step * min(beyond, 1.0) * share
                self._duals[k] = dual = min(max(dual, 0.0), given.most)
                price = min(dual + given.gain * beyond, given.most)
                if price > 0.0:
                    yield k, price * usual.delay / usual.work

    def decided(self, decision: Decision) -> None:
        """Take note of the duration and the work of a request at each application; most decisions are skipped to save
        time.
        """
        self._decisions += 1
        if self._decisions % EVERY != 1:
            return
        most = self._settings.memory / EVERY
        prompt_tokens = decision.profile.prompt_tokens
        for usual, names in zip(self._usual, self._served):
            shares = _shares([decision.estimate(name) for name in names])
            if not shares:
                continue
            seconds = sum(share * e.answer_s for share, e in shares)
            tokens = sum(share * e.output_tokens for share, e in shares)
            delay = decision.objective.latency_weight * seconds
            usual.add(seconds, delay, work(prompt_tokens, tokens), most)


def _shares(estimates: list[ArmEstimate]) -> list[tuple[float, ArmEstimate]]:
    """The estimates of the arms of one application that have one, with their shares of its requests.

    The arms count by their propensities, or equally if none could be chosen.
    """
    known = [e for e in estimates if e.answer_s > 0.0]
    total = sum(e.propensity for e in known)
    if total <= 0.0:
        return [(1.0 / len(known), e) for e in known]
    return [(e.propensity / total, e) for e in known]
