"""Counterfactual demand: how many requests a model would have in flight, had it been warm and idle.

The autoscaler sees the requests that were sent to a size. It does not see those that went elsewhere because the size
has no replica or is full. This module decides the latest requests once more, under the present load and with one arm
idle. A request that goes to that arm then, and would not now, is its demand; by Little's law it is worth its rate times
its duration in requests in flight. The count is counterfactual, so it can be added to the requests that were sent.

A request counts in proportion to the utility that is lost, so a dear size is not started for crumbs. An arm without a
replica is wanted only if the loss would pay for its start: c is what a replica costs in score points a minute, C the
time that it needs to start, H the time for which demand is expected to last, so the loss a minute must exceed
c (C + H) / H. All of it fades without traffic. The requests before it lost its last replica count only if no arm could
answer them: most of the others went to it, and a model that was stopped for want of requests would be started again at
once.

Variants of a model are arms of one application, so their demand is the model's: it is idle for all of them or for none.
Demand goes by the name of the application, which is that of the model.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf
from typing import NamedTuple

import numpy as np

from policies.base import Policy
from policies.constraints import Exclusion
from policies.events import BACKGROUND, FORCED, Decision, Outcome
from policies.types import ModelState, Request

IDLE = ModelState()
LEAST = 0.01  # requests of an arm that must start


@dataclass(frozen=True)
class DemandSettings:
    """The constants of the rule.

    memory_s: time in which the weight of a request falls to 1/e.
    kept: number of the latest requests that are kept.
    sample: number of these that are decided once more.
    full_gain: score points from which on a request counts in full.
    refused: score points that are lost with a request that no arm could answer.
    replica: c, score points a minute that a replica costs.
    lasts_s: H, time for which demand is expected to last.
    start_s: C of an arm that was not started yet.
    least_s: shortest time over which a rate is measured.
    """

    memory_s: float = 60.0
    kept: int = 512
    sample: int = 32
    full_gain: float = 0.05
    refused: float = 1.0
    replica: float = 0.5
    lasts_s: float = 300.0
    start_s: float = 60.0
    least_s: float = 5.0


class Demand(NamedTuple):
    """What the arms of one application would get, had it been warm and idle.

    requests: that it would have in flight beyond those that it has, each weighed by the utility lost; 0 if it has no
        replica and the loss would not pay for a start.
    loss: score points a minute that are lost because it is cold or full.
    start_s: time from the wish for a first replica to its first token, as learned; 0 if that was never seen.
    """

    requests: float = 0.0
    loss: float = 0.0
    start_s: float = 0.0


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
        that named its arm and got it would not have gone elsewhere.
        """
        named = decision.arm and decision.fallback == FORCED
        if not named and decision.fallback not in (*BACKGROUND, "model", "hedge"):
            self._recent.append((now_s, decision))

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
                arms = [arm for arm, of in self._application.items() if of == name]
                idle = {**states, **dict.fromkeys(arms, IDLE)}
                then = self._decide(policy, window.sample, idle, arms)
                both = [self._of_request(arms, *pair) for pair in zip(now, then)]
                requests, lost = np.dot(window.weights, np.array(both)).tolist()
                found[name] = Demand(
                    requests / window.span_s, 60.0 * lost / window.whole_span_s
                )
        return {
            name: self._of_application(
                name, demand, states.get(name, IDLE).healthy, now_s
            )
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

    def _of_application(
        self, name: str, demand: Demand, ready: bool, now_s: float
    ) -> Demand:
        """The demand of an application with a replica, or of one without; a start that it causes is timed."""
        given = self._settings
        start_s = self.start_s.get(name, 0.0)
        requests = demand.requests
        if ready:
            wished_s = self._wished_s.pop(name, None)
            if wished_s is not None:
                self._ready_s[name] = now_s - wished_s
        else:
            needed = (start_s or given.start_s) + given.lasts_s
            if demand.loss > given.replica * needed / given.lasts_s:
                requests = max(requests, LEAST)
                self._wished_s.setdefault(name, now_s)
            else:
                requests = 0.0
                self._wished_s.pop(name, None)
        return Demand(requests, demand.loss, start_s)


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
