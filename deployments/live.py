"""What the router sees of the arms from moment to moment; nothing of it outlives the process."""

import time
from collections import Counter, deque
from collections.abc import Collection

import numpy as np

from policies.ledger import IMPLICIT, Event, Record
from policies.meter import Meter
from policies.types import FORCED, Decision, ModelState, Outcome

RECENT = 200  # routed decisions over which shares are counted
STALE_S = 30.0  # after which a silent ingress no longer counts as having requests in flight


class Live:
    """Replicas, requests in flight, measured figures and shares of each arm.

    Attributes:
        replicas: that are ready, by arm; empty until somebody has looked.
        counts: of decisions and scores, by kind.
    """

    def __init__(self) -> None:
        self.replicas: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self._meters: dict[str, Meter] = {}
        self._in_flight: dict[str, tuple[float, dict[str, int]]] = {}  # by ingress: when told, and what
        self._recent: deque[Decision] = deque(maxlen=RECENT)

    def heed(self, arms: Collection[str]) -> None:
        """These are the arms from now on."""
        self._meters = {name: self._meters.get(name) or Meter() for name in arms}

    def forget(self) -> None:
        """What was counted will be counted again."""
        self._recent.clear()
        self.counts.clear()

    def told(self, ingress: str, in_flight: dict[str, int]) -> None:
        """How many requests of its own each arm is answering for an ingress now."""
        self._in_flight[ingress] = time.monotonic(), in_flight

    def note(self, event: Event, record: Record) -> None:
        """Measure what happened."""
        if isinstance(event, Decision):
            self.counts["forced" if event.fallback == FORCED else "routed"] += 1
            self.counts["fallback"] += event.fallback not in ("", FORCED)
            if event.fallback != FORCED:
                self._recent.append(event)
        elif (meter := self._meters.get(record.decision.arm)) is not None:
            if isinstance(event, Outcome):
                meter.observe(event, time.time())
            elif event.source != IMPLICIT:
                meter.score(event.score)
                self.counts["feedback"] += 1

    def states(self, but: str = "") -> dict[str, ModelState]:
        """Of each arm now; without what this ingress has in flight."""
        now, in_flight, silent_s = time.time(), Counter[str](), time.monotonic() - STALE_S
        self._in_flight = {
            ingress: (told, counts) for ingress, (told, counts) in self._in_flight.items() if told > silent_s
        }
        for ingress, (_, counts) in self._in_flight.items():
            if ingress != but:
                in_flight.update(counts)
        return {
            name: meter.state(
                now,
                in_flight[name],
                replicas=self.replicas.get(name, 1),
                healthy=not self.replicas or self.replicas.get(name, 0) > 0,
            )
            for name, meter in self._meters.items()
        }

    def shares(self) -> dict[str, float]:
        """Of the latest routed decisions, by arm."""
        counts = Counter(decision.arm for decision in self._recent)
        return {name: counts[name] / max(1, len(self._recent)) for name in self._meters}

    def qualities(self) -> dict[str, float]:
        """What these decisions expected of each arm, on the mean."""
        return {
            name: float(np.mean([d.estimate(name).quality for d in self._recent])) if self._recent else 0.0
            for name in self._meters
        }
