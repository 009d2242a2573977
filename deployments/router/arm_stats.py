"""Live statistics of each arm: replicas, requests in flight, throughput, and what its latest decisions show.

After a restart the windows are restored from the journal (Learner), the totals from its snapshot. Requests in flight
and throughput start anew.
"""

import time
from collections import Counter, deque
from collections.abc import Collection, Sequence

import numpy as np

from policies.budget import NOTHING, Spending
from policies.evaluation.kind_figures import (
    FigureTable,
    RecentFigures,
    Totals,
    is_routed,
)
from policies.evaluation.recent_metrics import SIZE, Window
from policies.events import Decision, Event, Outcome, Record
from policies.scarcity import ScarcityPrices
from policies.types import Arm, ModelState

STALE_S = 30.0  # after this time without a report, an ingress counts as having no requests in flight
# Time after which the notice of a replica that will stop counts no more.
LEAVING_S = 5.0
# Of a thousand tokens there, in score points: only requests that no other arm can answer go there.
LEAVING_PRICE = 1000.0
WINDOW_S = 10.0  # window over which tokens per second are measured


class ArmStats:
    """Replicas, requests in flight, shares and figures of each arm.

    Attributes:
        priced_slots: of one ingress, see Tuning.priced_slots.
        replicas: number of ready replicas of each application; empty until they were counted once.
        target_replicas: number of replicas that each application should have; 1 if it is not known.
        lacks: the capabilities that each arm does not have (policies/capabilities.py).
        totals: numbers of decisions, answers and scores since the journal began.
    """

    def __init__(self) -> None:
        self.priced_slots = 0.0
        self.replicas: dict[str, int] = {}
        self.target_replicas: dict[str, int] = {}
        self.lacks: dict[str, frozenset[str]] = {}
        self.totals = Totals()
        self._meters: dict[str, ArmMeter] = {}  # by application
        self._applications: dict[str, str] = {}  # by arm
        # of each ingress: the monotonic time of its report, and its requests in flight on each application
        self._in_flight: dict[str, tuple[float, dict[str, int]]] = {}
        # of each ingress: the decisions that the router did not have at that time
        self._undelivered: dict[str, Spending] = {}
        self._leaving_s: dict[str, float] = {}  # by application, when it was reported
        self._recent: deque[Decision] = deque(maxlen=SIZE)
        self._figures = RecentFigures()
        self._window = Window()
        self._prices = ScarcityPrices()

    def set_arms(self, arms: Sequence[Arm]) -> None:
        """Replace the arms; arms that stay keep their statistics, and the prices start anew."""
        self._applications = {arm.name: arm.application for arm in arms}
        self._meters = {
            name: self._meters.get(name) or ArmMeter()
            for name in self._applications.values()
        }
        self._prices = ScarcityPrices(arms)

    def reset(self) -> None:
        """Clear the totals and the windows, because the whole journal is about to be replayed."""
        self._recent.clear()
        self._figures.clear()
        self._window = Window()
        self.totals = Totals()

    def take_over(self, other: "ArmStats") -> None:
        """Replace the totals and the windows by those of another instance."""
        self.totals = other.totals
        self._recent = other._recent
        self._figures = other._figures

    def forget_decisions(self, gone: Collection[str]) -> None:
        """Remove these decisions from the windows; the totals stay."""
        kept = [decision for decision in self._recent if decision.id not in gone]
        self._recent = deque(kept, maxlen=SIZE)
        self._figures.remove(gone)

    def report_in_flight(self, ingress: str, in_flight: dict[str, int]) -> None:
        """Store the number of requests that an ingress has in flight on each application."""
        self._in_flight[ingress] = (time.monotonic(), in_flight)

    def report_undelivered(self, ingress: str, undelivered: Spending) -> None:
        """Store what an ingress has decided, and the router does not have yet."""
        self._undelivered[ingress] = undelivered

    def report_leaving(self, application: str, leaves: bool) -> None:
        """Store whether the last replica of an application will stop soon, so that no request is sent there that
        another one can answer.
        """
        if leaves:
            self._leaving_s[application] = time.monotonic()
        else:
            self._leaving_s.pop(application, None)

    def undelivered(self, exclude: str) -> Spending:
        """What the router lacks of the ingresses that have reported lately, without one of them."""
        total = NOTHING
        for ingress in self._in_flight:
            if ingress != exclude:
                total += self._undelivered.get(ingress, NOTHING)
        return total

    @property
    def ingresses(self) -> int:
        """Number of ingresses that have reported lately."""
        return len(self._in_flight)

    def record(self, event: Event, record: Record) -> None:
        """Measure an event that changed this decision record."""
        self.totals.add(event, record)
        self.rebuild(event, record)
        if isinstance(event, Decision):
            self._prices.decided(event)
        if isinstance(event, Outcome):
            application = self._applications.get(record.decision.arm, "")
            meter = self._meters.get(application)
            if meter is not None:
                meter.observe(event, time.time())

    def rebuild(self, event: Event, record: Record) -> None:
        """Take an event into the windows alone, because the totals contain it already."""
        self._figures.record(event, record)
        self._window.add(event, record)
        if isinstance(event, Decision) and is_routed(event):
            self._recent.append(event)

    def states(self, exclude: str = "") -> dict[str, ModelState]:
        """The current state of every arm.

        Args:
            exclude: an ingress whose own requests in flight are left out. It finds the prices by itself.
        """
        now = time.time()
        stale_s = time.monotonic() - STALE_S
        self._in_flight = {
            ingress: report
            for ingress, report in self._in_flight.items()
            if report[0] > stale_s
        }
        for ingress in self._undelivered.keys() - self._in_flight.keys():
            del self._undelivered[ingress]
        left_s = time.monotonic() - LEAVING_S
        leaving = {name for name, at_s in self._leaving_s.items() if at_s > left_s}
        in_flight = Counter[str]()
        for ingress, (_, counts) in self._in_flight.items():
            if ingress != exclude:
                in_flight.update(counts)
        states = {
            name: ModelState(
                in_flight=in_flight[application],
                replicas=self.replicas.get(application, 1),
                tokens_per_s=self._meters[application].tokens_per_s(now),
                healthy=not self.replicas or self.replicas.get(application, 0) > 0,
                lacks=self.lacks.get(name, frozenset()),
                price=LEAVING_PRICE if application in leaving else 0.0,
                target_replicas=self.target_replicas.get(application, 1),
            )
            for name, application in self._applications.items()
        }
        if exclude:
            return states
        slots = self.priced_slots * max(1, self.ingresses)
        return self._prices.priced(states, time.monotonic(), slots)

    @property
    def recent(self) -> int:
        """Number of routed decisions from which shares and expected qualities are computed."""
        return len(self._recent)

    def shares(self) -> dict[str, float | None]:
        """Each arm's share of the latest routed decisions; None without any."""
        if not self._recent:
            return dict.fromkeys(self._applications, None)
        counts = Counter(decision.arm for decision in self._recent)
        return {name: counts[name] / len(self._recent) for name in self._applications}

    def qualities(self) -> dict[str, float | None]:
        """Mean quality that the latest routed decisions expected of each arm; None if none of them estimated it.

        Decisions about embeddings say nothing here: no score of an embedding is ever learned.
        """
        qualities: dict[str, float | None] = {}
        for name in self._applications:
            expected = [
                estimate.quality
                for decision in self._recent
                if decision.profile.task != "embed"
                for estimate in decision.shadow_estimates or decision.estimates
                if estimate.arm == name and not estimate.removed_by
            ]
            qualities[name] = float(np.mean(expected)) if expected else None
        return qualities

    def figures(self) -> FigureTable:
        """The figures of the latest decisions, by arm and kind."""
        return self._figures.table()

    def routed_metrics(self) -> dict[str, float]:
        """The metrics of the latest routed decisions (Window.figures), as in MLflow; unknown ones are left out."""
        metrics = self._window.figures()
        return {name: value for name, value in metrics.items() if "_total" not in name}


class ArmMeter:
    """Throughput of one application. The caller passes the time."""

    def __init__(self) -> None:
        self._tokens: deque[tuple[float, int]] = deque()  # time and output tokens
        self._window_tokens = 0  # sum of _tokens, kept because every decision reads it

    def observe(self, outcome: Outcome, time_s: float) -> None:
        """Measure an outcome that arrived at this time."""
        if outcome.status == "ok":
            self._tokens.append((time_s, outcome.output_tokens))
            self._window_tokens += outcome.output_tokens

    def tokens_per_s(self, time_s: float) -> float:
        """Output tokens per second at this time."""
        while self._tokens and self._tokens[0][0] < time_s - WINDOW_S:
            _, tokens = self._tokens.popleft()
            self._window_tokens -= tokens
        return self._window_tokens / WINDOW_S
