"""Live statistics of each arm: replicas, requests in flight, moving averages. A restart loses them."""

import time
from collections import Counter, deque
from collections.abc import Collection

import numpy as np

from policies.events import FORCED, IMPLICIT, Decision, Event, Outcome, Record
from policies.types import ModelState

RECENT = 200  # number of the latest routed decisions from which shares are computed
STALE_S = 30.0  # after this time without a report, an ingress counts as having no requests in flight
SMOOTHING = 0.1  # weight of the newest value in a moving average
WINDOW_S = 10.0  # window over which tokens per second are measured


class ArmStats:
    """Replicas, requests in flight, moving averages and shares of each arm.

    Attributes:
        replicas: number of ready replicas of each arm; empty until they were counted once.
        counts: number of decisions and scores, by kind.
    """

    def __init__(self) -> None:
        self.replicas: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self._meters: dict[str, ArmMeter] = {}
        # of each ingress: the monotonic time of its report, and its requests in flight on each arm
        self._in_flight: dict[str, tuple[float, dict[str, int]]] = {}
        self._recent: deque[Decision] = deque(maxlen=RECENT)

    def set_arms(self, arms: Collection[str]) -> None:
        """Replace the arms; arms that stay keep their statistics."""
        self._meters = {name: self._meters.get(name) or ArmMeter() for name in arms}

    def reset(self) -> None:
        """Clear the counts, because the journal is about to be replayed."""
        self._recent.clear()
        self.counts.clear()

    def report_in_flight(self, ingress: str, in_flight: dict[str, int]) -> None:
        """Store the number of requests that an ingress has in flight on each arm."""
        self._in_flight[ingress] = (time.monotonic(), in_flight)

    def record(self, event: Event, record: Record) -> None:
        """Measure an event that changed this decision record."""
        if isinstance(event, Decision):
            self._record_decision(event)
            return
        meter = self._meters.get(record.decision.arm)
        if meter is None:
            return
        if isinstance(event, Outcome):
            meter.observe(event, time.time())
        elif event.source != IMPLICIT:
            meter.score(event.score)
            self.counts["feedback"] += 1

    def _record_decision(self, decision: Decision) -> None:
        forced = decision.fallback == FORCED
        self.counts["forced" if forced else "routed"] += 1
        self.counts["fallback"] += decision.fallback not in ("", FORCED)
        if not forced:
            self._recent.append(decision)

    def states(self, exclude: str = "") -> dict[str, ModelState]:
        """The current state of every arm.

        Args:
            exclude: an ingress whose own requests in flight are left out.
        """
        now = time.time()
        stale_s = time.monotonic() - STALE_S
        self._in_flight = {
            ingress: report
            for ingress, report in self._in_flight.items()
            if report[0] > stale_s
        }
        in_flight = Counter[str]()
        for ingress, (_, counts) in self._in_flight.items():
            if ingress != exclude:
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
        """Each arm's share of the latest routed decisions."""
        counts = Counter(decision.arm for decision in self._recent)
        return {name: counts[name] / max(1, len(self._recent)) for name in self._meters}

    def qualities(self) -> dict[str, float]:
        """Mean quality that the latest routed decisions expected of each arm."""
        if not self._recent:
            return dict.fromkeys(self._meters, 0.0)
        qualities = {}
        for name in self._meters:
            expected = [decision.estimate(name).quality for decision in self._recent]
            qualities[name] = float(np.mean(expected))
        return qualities


class ArmMeter:
    """Moving averages of one arm. The caller passes the time."""

    def __init__(self) -> None:
        self._averages: dict[str, float] = {}
        self._tokens: deque[tuple[float, int]] = deque()  # time and output tokens
        self._window_tokens = 0  # sum of _tokens, kept because every decision reads it

    def _average(self, name: str, value: float) -> None:
        before = self._averages.get(name, value)
        self._averages[name] = before + SMOOTHING * (value - before)

    def observe(self, outcome: Outcome, time_s: float) -> None:
        """Measure an outcome that arrived at this time."""
        if outcome.status == "rejected":
            return
        self._average("error_rate", float(outcome.status == "error"))
        if outcome.status != "ok":
            return
        if outcome.ttft_s > 0:
            self._average("ttft_s", outcome.ttft_s)
            if outcome.output_tokens > 1:
                decoding_s = outcome.latency_s - outcome.ttft_s
                self._average("tpot_s", decoding_s / (outcome.output_tokens - 1))
        self._tokens.append((time_s, outcome.output_tokens))
        self._window_tokens += outcome.output_tokens

    def score(self, score: float) -> None:
        """Measure the score of one answer."""
        self._average("accuracy", score)

    def state(
        self, time_s: float, in_flight: int, replicas: int, healthy: bool
    ) -> ModelState:
        """The state of the arm at this time."""
        while self._tokens and self._tokens[0][0] < time_s - WINDOW_S:
            _, tokens = self._tokens.popleft()
            self._window_tokens -= tokens
        return ModelState(
            in_flight=in_flight,
            replicas=replicas,
            tokens_per_s=self._window_tokens / WINDOW_S,
            healthy=healthy,
            **self._averages,
        )
