"""The stateful router actor: the one owner of what is learned.

All methods are `async def` and do not await between reading and writing the policy, so each is atomic without a
lock. What happened is put into the journal before anybody is told that it was accepted.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, replace
from math import inf
from typing import Any

import numpy as np

from deployments import logs
from deployments.journal import Journal, Snapshot
from deployments.refit import Refitter
from deployments.settings import GatewaySettings
from deployments.telemetry import Telemetry
from policies.base import realign
from policies.forecast import Forecaster
from policies.ledger import ACCEPTED, UNKNOWN, Ledger, Record
from policies.meter import Meter
from policies.pacer import Pacer, paced
from policies.registry import make_policy
from policies.types import FORCED, Decision, Feedback, ModelState, Outcome, Request

SNAPSHOT_EVERY = 500  # rows of the journal
RECENT = 200  # routed decisions over which shares are counted
STALE_S = 30.0  # after which a silent ingress no longer counts as having requests in flight
log = logging.getLogger(__name__)

Watch = Callable[[], dict[str, int]]


class Router:
    """Decides, observes, takes feedback, and explains; survives its own death through the journal.

    Args:
        settings: of the gateway.
        watch: blocking call that gives the number of ready replicas of each arm.
    """

    def __init__(self, settings: GatewaySettings, watch: Watch):
        logs.configure("router")
        self._watch, self._telemetry = watch, Telemetry()
        self._journal = Journal(settings.journal)
        self._refitter = Refitter(settings.arms(), self._journal)
        self._rng = np.random.default_rng()  # fresh after a restart, or it would repeat its own exploration
        self._sequence = self._version = 0
        self._replicas: dict[str, int] = {}
        self._in_flight: dict[str, tuple[float, dict[str, int]]] = {}  # by ingress: when told, and what
        self._recent: deque[Decision] = deque(maxlen=RECENT)
        self._counts: Counter[str] = Counter()
        self._build(settings)
        self._restore()
        self._watching: asyncio.Task[None] | None = None

    def _build(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._policy = make_policy(settings.policy.name, settings.arms(), settings.policy.options)
        self._meters = {arm.name: Meter() for arm in self._policy.arms}
        self._pacer = Pacer(settings.max_mean_cost_usd or inf)

    def _restore(self) -> None:
        """The last snapshot, then every row after it."""
        row, snapshot = self._journal.snapshot()
        if snapshot is not None:
            self._take(snapshot)
        horizon = row
        self._ledger = Ledger(find=lambda decision_id: self._find(decision_id, horizon))
        for number, event in self._journal.replay(after=row):
            horizon = number - 1  # a record looked up now must not yet contain this event
            self._apply(event)
        self._ledger = Ledger(find=self._find)
        self._snapshot_row = row
        self._restored = self._sequence > 0

    def _take(self, snapshot: Snapshot) -> None:
        self._sequence, self._version = max(self._sequence, snapshot.sequence), snapshot.version
        if snapshot.policy == self._policy.name:
            names = [arm.name for arm in self._policy.arms]
            self._policy.restore(realign(snapshot.state, snapshot.arms, names, self._policy.state()))
        if snapshot.pacer:
            self._pacer.restore(snapshot.pacer)
        self._refitter.take(snapshot.state, snapshot.arms)

    def _find(self, decision_id: str, horizon: int | None = None) -> Record | None:
        found = Ledger()
        for event in self._journal.find(decision_id, horizon):
            found.apply(event, policy=None)
        return found.get(decision_id)

    def _apply(self, event: Decision | Outcome | Feedback) -> str:
        """Fold one event into all that is learned and measured."""
        status = self._ledger.apply(event, self._policy)
        if status != ACCEPTED:
            return status
        if isinstance(event, Decision):
            self._sequence = max(self._sequence, event.sequence + 1)
            self._pacer.decided(event)
            self._counts["forced" if event.fallback == FORCED else "routed"] += 1
            self._counts["fallback"] += event.fallback not in ("", FORCED)
            if event.fallback != FORCED:
                self._recent.append(event)
            return status
        record = self._ledger.get(event.decision_id)
        if record is not None and (meter := self._meters.get(record.decision.arm)) is not None:
            if isinstance(event, Outcome):
                meter.observe(event, time.time())
                self._pacer.finished(record.decision, event)
            else:
                meter.score(event.score)
                self._counts["feedback"] += 1
        return status

    async def _keep_watch(self) -> None:
        """Every other second: how many replicas are ready; what is queued goes to disk; the profiler's forecasts are
        refitted, and a snapshot is taken, when due.
        """
        while True:
            try:
                self._replicas = await asyncio.to_thread(self._watch)
                self._telemetry.live(self._states(), self._shares(), self._qualities())
                self._telemetry.watched(time.time(), self._journal.waiting_rows, self._policy.name, self._version)
                refitted = await self._refitter.turn()
                if refitted or self._journal.last_row - self._snapshot_row >= SNAPSHOT_EVERY:
                    self._snapshot_row = self._journal.last_row
                    self._journal.put_snapshot(self._snapshot())
                await self._journal.flush()
            except Exception:
                log.exception("the router's watch failed; it goes on")
            await asyncio.sleep(2.0)

    def _states(self) -> dict[str, ModelState]:
        now, in_flight = time.time(), Counter[str]()
        for told, counts in self._in_flight.values():
            if now - told < STALE_S:
                in_flight.update(counts)
        return {
            name: meter.state(
                now,
                in_flight[name],
                replicas=self._replicas.get(name, 1),
                healthy=not self._replicas or self._replicas.get(name, 0) > 0,
            )
            for name, meter in self._meters.items()
        }

    def _shares(self) -> dict[str, float]:
        counts = Counter(decision.arm for decision in self._recent)
        return {name: counts[name] / max(1, len(self._recent)) for name in self._meters}

    def _qualities(self) -> dict[str, float]:
        return {
            name: float(np.mean([d.estimate(name).quality for d in self._recent])) if self._recent else 0.0
            for name in self._meters
        }

    def _snapshot(self) -> Snapshot:
        names = tuple(arm.name for arm in self._policy.arms)
        state = self._policy.state() | self._refitter.state()
        return Snapshot(self._policy.name, names, self._sequence, self._version, state, self._pacer.state())

    @property
    def _version_name(self) -> str:
        return f"{self._policy.name}-v{self._version}"

    async def configure(self, settings: GatewaySettings) -> None:
        """Take over changed settings; what was learned about the arms that stay is kept."""
        if settings == self._settings:
            return
        before = self._snapshot()
        self._build(settings)
        self._refitter.configure(settings.arms())
        self._take(before)

    async def decide(self, requests: list[Request], ingress: str, in_flight: dict[str, int]) -> list[Decision]:
        """Decide a batch.

        Args:
            requests: what to decide.
            ingress: who asks.
            in_flight: how many requests of its own each arm is answering for it now.
        """
        began = time.perf_counter()
        self._in_flight[ingress] = (time.time(), in_flight)
        requests = paced(requests, self._pacer.cost_weight)
        decided = self._policy.decide(requests, self._states(), self._rng, self._sequence)
        self._sequence += len(decided)
        now, version = time.time(), self._version_name
        decisions = [
            replace(d, policy_version=version, time_s=now, fallback=FORCED if request.forced else request.fallback)
            for d, request in zip(decided, requests, strict=True)
        ]
        for decision in decisions:
            if decision.arm:
                self._apply(decision)
                self._journal.put(decision)
        self._telemetry.decided(decisions, time.perf_counter() - began)
        return decisions

    async def observe(self, finished: list[tuple[Decision, Outcome]], ingress: str, in_flight: dict[str, int]) -> None:
        """Learn from answers; returns when they are durable. The decisions travel with them, in case this actor
        died in between or never saw them.
        """
        self._in_flight[ingress] = (time.time(), in_flight)
        for decision, outcome in finished:
            for event in (decision, outcome):
                if self._apply(event) == ACCEPTED:
                    self._journal.put(event)
                    if isinstance(event, Outcome):
                        self._telemetry.observed(decision, event)
        await self._journal.flush()

    async def feedback(self, items: list[Feedback]) -> list[str]:
        """Learn from scores; returns what became of each (accepted, duplicate, unknown) when all is durable."""
        statuses = []
        for item in items:
            status = self._apply(item)
            if status == ACCEPTED:
                self._journal.put(item)
            self._telemetry.scored(item.source, status)
            statuses.append(status)
        if any(status != UNKNOWN for status in statuses):
            await self._journal.flush()
        return statuses

    async def record(self, decision_id: str) -> Record | None:
        """All that is known of a decision."""
        return self._ledger.get(decision_id)

    async def snapshot(self) -> tuple[Snapshot, dict[str, ModelState], str]:
        """All that was learned, the live states and the version's name: enough to decide without this actor."""
        if self._watching is None:  # a constructor has no event loop yet; every ingress asks for this at its start
            self._watching = asyncio.create_task(self._keep_watch())
        return self._snapshot(), self._states(), self._version_name

    async def forecaster(self, version: int) -> Forecaster | None:
        """What the profiler says of answers; None if the caller's version is the present one."""
        present = self._refitter.forecaster
        return None if present.version == version else present

    async def adopt(self, snapshot: Snapshot) -> bool:
        """Start from a published version, unless something was learned here already."""
        if self._restored or self._sequence > 0:
            return False
        self._take(snapshot)
        self._restored = True
        self._journal.put_snapshot(self._snapshot())
        await self._journal.flush()
        return True

    async def published(self, version: int) -> None:
        """The present state is now this version in the registry."""
        self._version = version
        self._journal.put_snapshot(self._snapshot())
        await self._journal.flush()

    async def summary(self) -> dict[str, Any]:
        """What an operator wants to see at a glance, as plain data."""
        states, shares, qualities = self._states(), self._shares(), self._qualities()
        arms = {arm.name: arm for arm in self._policy.arms}
        return {
            "policy": self._policy.name,
            "policy_version": self._version_name,
            "decisions": self._sequence,
            "counts": dict(self._counts),
            "budget": self._pacer.summary(),
            "profiler": self._refitter.forecaster.reliability(),
            "models": {
                name: {
                    **asdict(state),
                    "share": shares[name],
                    "expected_quality": qualities[name],
                    "prompt_price_usd": arms[name].prompt_price_usd,
                    "output_price_usd": arms[name].output_price_usd,
                    "tasks": arms[name].tasks,
                }
                for name, state in states.items()
            },
        }
