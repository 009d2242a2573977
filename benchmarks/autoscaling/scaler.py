"""A rule at work in the simulated cluster: it counts requests and demand, and starts and stops replicas."""

from collections import deque
from collections.abc import Mapping, Sequence
from math import inf

from benchmarks.autoscaling.rules import Controller, Rule
from benchmarks.cluster.fleet import Pool
from benchmarks.cluster.hardware import Size
from policies.base import Policy
from policies.demand import DemandMeter, DemandSettings
from policies.events import Decision, Outcome
from policies.types import ModelState

CALL_PAUSE_S = 60.0  # between the end of a wake-up request and the next one
CALL_TIMEOUT_S = 900.0
NEED = DemandSettings()  # its price says when a larger size is needed, for every rule
NEED_S = 300.0  # time in which the loss must pay for a replica and its start


class RuleScaler:
    """Runs a rule for all sizes, and notes how long the larger ones were needed before a replica was ready.

    A larger size without a ready replica is needed once the loss of the last minute would pay for a start by the
    product's default settings. The need begins with the first request of that minute, and ends with the first ready
    replica. All rules are measured by the same bound.

    Attributes:
        waits_s: of each need, the time until the first replica was ready.

    Args:
        rule: see Rule.
        sizes: K sizes, each with its largest number of replicas.
        every_s: time between two looks.
    """

    def __init__(self, rule: Rule, sizes: Sequence[Size], every_s: float = 1.0):
        self.every_s = every_s
        self.waits_s: list[float] = []
        self._rule = rule
        self._meter = DemandMeter(DemandSettings(replica=rule.replica))
        self._controllers = {
            size.name: Controller(
                size.name,
                rule.config(1 if k == 0 else rule.least, size.replicas),
                rule.demand,
            )
            for k, size in enumerate(sizes)
        }
        self._larger = {size.name: size.engine.start_s for size in sizes[1:]}
        self._at_zero_s = dict.fromkeys(self._larger, 0.0)  # since when
        self._needed_s: dict[str, float] = {}  # since when
        self._came_s: deque[float] = deque()
        self._calls_s: dict[str, float] = {}  # when a wake-up request began
        self._next_s: dict[str, float] = {}

    @property
    def unmet(self) -> int:
        """Number of needs for which no replica came to be ready."""
        return len(self._needed_s)

    def initial(self, sizes: Sequence[Size]) -> tuple[int, ...]:
        """[K] replicas that are ready at the beginning."""
        return tuple(self._controllers[size.name].target for size in sizes)

    def decided(self, decision: Decision, now_s: float) -> None:
        """Count a request; it may send wake-up requests."""
        self._meter.decided(decision, now_s)
        self._came_s.append(now_s)
        if self._rule.wake_up:
            for name, since_s in self._at_zero_s.items():
                free = now_s >= self._next_s.get(name, 0.0)
                if since_s < inf and name not in self._calls_s and free:
                    self._calls_s[name] = now_s

    def answered(self, decision: Decision, outcome: Outcome) -> None:
        """An answer tells how long a start took."""
        self._meter.answered(decision.arm, outcome)

    def look(
        self,
        pools: Sequence[Pool],
        router: Policy,
        states: Mapping[str, ModelState],
        now_s: float,
    ) -> None:
        """Start and stop replicas."""
        ready = {pool.size.name: len(pool.ready) for pool in pools}
        self._meter.counted(ready, now_s)
        demands = self._meter.measure(router, states, now_s)
        self._end_calls(ready, now_s)
        for pool in pools:
            name = pool.size.name
            demand = demands[name].wish if self._rule.demand else 0.0
            sent = pool.places.running + (name in self._calls_s)
            wanted = self._controllers[name].look(sent, demand, ready[name], now_s)
            pool.resize(wanted)
        while self._came_s and self._came_s[0] < now_s - NEED.memory_s:
            self._came_s.popleft()
        for name in self._larger:
            self._note_need(name, demands[name].loss, ready[name], now_s)

    def _end_calls(self, ready: Mapping[str, int], now_s: float) -> None:
        for name, began_s in list(self._calls_s.items()):
            if ready[name] or now_s - began_s > CALL_TIMEOUT_S:
                del self._calls_s[name]
                self._next_s[name] = now_s + CALL_PAUSE_S

    def _note_need(self, name: str, loss: float, ready: int, now_s: float) -> None:
        if ready:
            self._at_zero_s[name] = inf
            if name in self._needed_s:
                self.waits_s.append(now_s - self._needed_s.pop(name))
            return
        self._at_zero_s[name] = min(self._at_zero_s[name], now_s)
        bound = NEED.replica * (self._larger[name] + NEED_S) / NEED_S
        if loss > bound and name not in self._needed_s:
            since_s = self._at_zero_s[name]
            first = next((s for s in self._came_s if s >= since_s), None)
            if first is not None:  # the loss may be that of requests before
                self._needed_s[name] = first
