"""Counterfactual demand: how many requests a model would have in flight, had it been warm and idle, and whether a
replica of it is worth its price.

The autoscaler sees the requests that were sent to a size. It does not see those that went elsewhere because the size
has no replica or is full. This module decides the latest requests once more, under the present load and with one arm
idle. A request that goes to that arm then, and would not now, is its demand; by Little's law it is worth its rate times
its duration in requests in flight. The count is counterfactual, so it can be added to the requests that were sent.

A request counts in proportion to the utility that is lost, so a dear size is not started for crumbs. A model without a
replica is wanted only once the loss has paid for one, and its last replica only as long as it saves what it costs; both
are decided by one account (account.py). While it has its last replica, the latest requests are decided once more
without it. A request that only this model can answer fills its account. All of it fades without traffic. The requests
before it lost its last replica are no demand unless no arm could answer them: most of the others went to it.

Variants of a model are arms of one application, so their demand is the model's: it is idle for all of them or for none.
Demand goes by the name of the application, which is that of the model.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf
from typing import NamedTuple

import numpy as np

from policies.account import Account
from policies.base import Policy
from policies.constraints import Exclusion
from policies.events import BACKGROUND, CALIBRATION, FORCED, Decision, Outcome
from policies.types import ModelState, Request

IDLE = ModelState()
GONE = ModelState(replicas=0, healthy=False)
LEAST = 0.01  # requests that say no more than that a model should have a replica


@dataclass(frozen=True)
class DemandSettings:
    """The constants of the rule.

    memory_s: time in which the weight of a request falls to 1/e.
    kept: number of the latest requests that are kept.
    sample: number of these that are decided once more.
    full_gain: score points from which on a request counts in full.
    refused: score points that are lost with a request that no arm could answer.
    replica: c, score points a minute that a replica costs.
    stays_s: H, time for which a replica should stay to be worth a start.
    start_s: C of an arm that was not started yet.
    least_s: shortest time over which a rate is measured.
    """

    memory_s: float = 60.0
    kept: int = 512
    sample: int = 32
    full_gain: float = 0.05
    refused: float = 1.0
    replica: float = 0.5
    stays_s: float = 600.0
    start_s: float = 60.0
    least_s: float = 5.0


class Demand(NamedTuple):
    """What the arms of one application would get, had it been warm and idle.

    requests: that it would have in flight beyond those that it has, each weighed by the utility lost; 0 if it has no
        replica and none is wanted.
    loss: score points a minute that are lost because it is cold or full.
    start_s: time from the wish for a first replica to its first token, as learned; 0 if that was never seen.
    saved: score points a minute that would be lost without its last replica; None if it has none, or several.
    balance: of its account, in score points (account.py); None if it has several replicas.
    spare: whether its last replica is not worth its price.
    """

    requests: float = 0.0
    loss: float = 0.0
    start_s: float = 0.0
    saved: float | None = None
    balance: float | None = None
    spare: bool = False

    @property
    def wish(self) -> float:
        """What the autoscaler gets: the requests, at least LEAST for a last replica that is worth its price, and
        -1 for one that is not.
        """
        if self.spare:
            return -1.0
        return self.requests if self.saved is None else max(self.requests, LEAST)


class DemandMeter:
    """Measures the demand of all applications from the decisions of one router. The caller passes the time.

    Attributes:
        start_s: by application, the time from the wish for a first replica to its first token, as far as it was seen.

    Args:
        settings: see DemandSettings.
    """

    def __init__(self, settings: DemandSettings = DemandSettings()):
        self.start_s: dict[str, float] = {}
        self._settings = settings
        self._recent: deque[tuple[float, Decision]] = deque(maxlen=settings.kept)
        self._accounts: dict[str, Account] = {}  # by application
        # requests since the accounts were booked: the latest of them, their number, and the arms that some need
        self._new: deque[Decision] = deque(maxlen=settings.kept)
        self._came = 0
        self._needed: set[str] = set()
        self._booked_s = inf
        self._application: dict[str, str] = {}  # by arm
        # by application that had a replica, since when it has none; inf while it has one
        self._lost_s: dict[str, float] = {}
        self._wished_s: dict[
            str, float
        ] = {}  # by application, since when a start is wanted
        # by application, the time from the wish to the first replica, of which no answer was seen yet
        self._ready_s: dict[str, float] = {}

    def decided(self, decision: Decision, now_s: float) -> None:
        """Take note of a request: one that the router decided, or one that no arm could answer.

        Second answers in the background and second tries leave out the first arm, so they say nothing here. A request
        that named its arm and got it would not have gone elsewhere; it needs its arm, as a calibration does.
        """
        if decision.arm and decision.fallback in (FORCED, CALIBRATION):
            self._needed.add(decision.arm)
        elif decision.fallback not in (*BACKGROUND, "model", "hedge"):
            self._recent.append((now_s, decision))
            self._new.append(decision)
            self._came += 1
            self._booked_s = min(self._booked_s, now_s)
            eligible = [e.arm for e in decision.estimates if not e.removed_by]
            if len({self._application.get(arm, arm) for arm in eligible}) == 1:
                self._needed.add(eligible[0])

    def counted(self, ready: Mapping[str, int], now_s: float) -> None:
        """Take note of how many replicas are ready.

        Args:
            ready: by application.
            now_s: monotonic; when the count began.
        """
        for name, replicas in ready.items():
            if replicas > 0:
                self._lost_s[name] = inf
            elif self._lost_s.get(name) == inf:
                self._lost_s[name] = now_s

    def measure(
        self, policy: Policy, states: Mapping[str, ModelState], now_s: float
    ) -> dict[str, Demand]:
        """The demand of each application.

        Args:
            policy: decides; it does not learn from this.
            states: the present states of the arms.
            now_s: monotonic.
        """
        given = self._settings
        while self._recent and self._recent[0][0] < now_s - 5.0 * given.memory_s:
            self._recent.popleft()
        self._application = {arm.name: arm.application for arm in policy.arms}
        found = dict.fromkeys(self._application.values(), Demand())
        self._book(policy, states, now_s)
        busy = [
            name
            for name, state in ((name, states.get(name, IDLE)) for name in found)
            if not state.healthy or state.in_flight > 0 or state.price > 0
        ]
        for since_s, names in self._by_loss(busy).items():
            window = _Window(given, self._recent, since_s, now_s)
            if not window.sample:
                continue
            now = self._decide(policy, window.sample, states)
            for name in names:
                arms = self._arms_of(name)
                idle = {**states, **dict.fromkeys(arms, IDLE)}
                then = self._decide(policy, window.sample, idle, arms)
                both = [self._of_request(arms, *pair) for pair in zip(now, then)]
                requests, lost = np.dot(window.weights, np.array(both)).tolist()
                found[name] = Demand(
                    requests / window.span_s, 60.0 * lost / window.whole_span_s
                )
        return {
            name: self._of_application(name, demand, states.get(name, IDLE), now_s)
            for name, demand in found.items()
        }

    def answered(self, arm: str, outcome: Outcome) -> None:
        """Take note of an answer: the first one of a replica that was wished for ends its start."""
        name = self._application.get(arm, arm)
        if name in self._ready_s and outcome.status == "ok":
            first_s = outcome.ttft_s or outcome.latency_s
            seconds = self._ready_s.pop(name) + first_s - outcome.waited_s
            known = self.start_s.get(name, seconds)
            self.start_s[name] = 0.5 * (known + seconds)

    def _arms_of(self, application: str) -> list[str]:
        return [arm for arm, of in self._application.items() if of == application]

    def _book(
        self, policy: Policy, states: Mapping[str, ModelState], now_s: float
    ) -> None:
        """Book the requests since the last time, and the price of that time, to the account of each application."""
        given = self._settings
        every = -(-len(self._new) // given.sample) or 1
        sample = list(self._new)[::-every]
        scale = self._came / max(1, len(sample))
        minutes = max(0.0, now_s - self._booked_s) / 60.0
        needed = {self._application.get(arm, arm) for arm in self._needed}
        self._new.clear()
        self._came = 0
        self._needed.clear()
        self._booked_s = now_s
        now = self._decide(policy, sample, states) if sample else []
        for name in set(self._application.values()):
            state = states.get(name, IDLE)
            most = given.replica * (self._start_s(name) + given.stays_s) / 60.0
            account = self._accounts.get(name)
            if account is None or account.ready != state.healthy:
                # it begins anew with a start and with a stop
                account = Account.of(state.healthy, most)
                self._accounts[name] = account
                if state.healthy:
                    continue
            several = state.healthy and state.replicas > 1
            paid, alone = 0.0, False
            if sample and not several:
                paid, alone = self._paid(policy, name, sample, now, states)
            account.book(
                scale * paid, given.replica, most, minutes, given.memory_s / 60.0
            )
            if several or alone or name in needed:
                account.fill(most)

    def _paid(
        self,
        policy: Policy,
        name: str,
        sample: list[Decision],
        now: list[Decision],
        states: Mapping[str, ModelState],
    ) -> tuple[float, bool]:
        """Score points that requests lose because an application has no replica, or would lose without its last one,
        and whether no other one could answer some of them.
        """
        arms = self._arms_of(name)
        if states.get(name, IDLE).healthy:
            without = {**states, **dict.fromkeys(arms, GONE)}
            before, after = self._decide(policy, sample, without), now
        else:
            idle = {**states, **dict.fromkeys(arms, IDLE)}
            before, after = now, self._decide(policy, sample, idle, arms)
        gains = [self._of_request(arms, *pair)[1] for pair in zip(before, after)]
        refused = [gain > 0.0 and not one.arm for gain, one in zip(gains, before)]
        return sum(gains), any(refused)

    def _by_loss(self, applications: Sequence[str]) -> dict[float, list[str]]:
        """Applications by the time since which they have no replica; -inf for the others and those never ready."""
        grouped: dict[float, list[str]] = {}
        for name in applications:
            since_s = self._lost_s.get(name, inf)
            grouped.setdefault(-inf if since_s == inf else since_s, []).append(name)
        return grouped

    def _decide(
        self,
        policy: Policy,
        decisions: list[Decision],
        states: Mapping[str, ModelState],
        idle: Sequence[str] = (),
    ) -> list[Decision]:
        """Decide requests once more; `idle` are arms whose queue has room, although it was full for them."""
        requests = []
        for decision in decisions:
            objective = decision.objective
            if idle and objective.unavailable:
                left = tuple(
                    (arm, why)
                    for arm, why in objective.unavailable
                    if arm not in idle or Exclusion.of(why) is not Exclusion.QUEUE_FULL
                )
                objective = replace(objective, unavailable=left)
            requests.append(
                Request(decision.id, decision.profile, objective, score_chance=0.0)
            )
        # at sequence 0 nothing is forgotten, so the policy stays as it is
        return policy.decide(requests, states, np.random.default_rng(0), 0)

    def _of_request(
        self, arms: Sequence[str], before: Decision, after: Decision
    ) -> tuple[float, float]:
        """The seconds for which a request would occupy the idle arms, weighed, and the score points that are lost."""
        idle = [after.estimate(arm) for arm in arms]
        chosen = sum(e.propensity for e in idle)
        moved = chosen - sum(before.estimate(arm).propensity for arm in arms)
        if moved <= 0.0 or not after.arm:
            return 0.0, 0.0
        if not before.arm or all(e.latency_s <= 0.0 for e in idle):
            # it was refused, or a rule decides, which does not say what it gains
            gain = self._settings.refused * moved
        else:
            gain = max(0.0, _value(after) - _value(before))
        weight = min(1.0, gain / (moved * self._settings.full_gain))
        seconds = sum(e.propensity * e.answer_s for e in idle) / chosen
        return weight * moved * seconds, gain

    def _start_s(self, application: str) -> float:
        return self.start_s.get(application, 0.0) or self._settings.start_s

    def _of_application(
        self, name: str, demand: Demand, state: ModelState, now_s: float
    ) -> Demand:
        """The demand of an application with a replica, or of one without; a start that it causes is timed."""
        account = self._accounts[name]
        start_s = self.start_s.get(name, 0.0)
        requests = demand.requests
        if state.healthy:
            wished_s = self._wished_s.pop(name, None)
            if wished_s is not None:
                self._ready_s[name] = now_s - wished_s
            if state.replicas > 1:
                return Demand(requests, demand.loss, start_s)
            saved, spare = account.rate, not account.wanted
        else:
            saved, spare = None, False
            if account.wanted:
                requests = max(requests, LEAST)
                self._wished_s.setdefault(name, now_s)
            else:
                requests = 0.0
                self._wished_s.pop(name, None)
        return Demand(requests, demand.loss, start_s, saved, account.balance, spare)


class _Window:
    """The requests since a time, and the earlier ones that no arm could answer.

    sample: some of them, spread evenly over all of them.
    weights: of the sample.
    span_s: the time by which a sum of weights is divided to give a rate.
    whole_span_s: the same, if the time before the oldest request counts as one without requests. Otherwise a surge
        would look like less than it is until it has lasted for the whole memory.
    """

    def __init__(
        self,
        given: DemandSettings,
        recent: Sequence[tuple[float, Decision]],
        since_s: float,
        now_s: float,
    ):
        part = [
            (at_s, decision)
            for at_s, decision in recent
            if at_s >= since_s or not decision.arm
        ]
        every = -(-len(part) // given.sample) or 1
        chosen = part[::-every]
        scale = len(part) / max(1, len(chosen))
        self.sample = [decision for _, decision in chosen]
        self.weights = [
            scale * exp((at_s - now_s) / given.memory_s) for at_s, _ in chosen
        ]
        oldest_s = inf
        if part:
            oldest_s = max(given.least_s, now_s - max(since_s, part[0][0]))
        self.span_s = given.memory_s * (1.0 - exp(-oldest_s / given.memory_s))
        full = len(recent) == given.kept  # older ones were dropped
        self.whole_span_s = self.span_s if full else given.memory_s


def _value(decision: Decision) -> float:
    """The expected utility of a request before its arm is drawn."""
    return sum(e.propensity * decision.expected_reward(e) for e in decision.estimates)
