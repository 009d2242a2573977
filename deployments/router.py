"""The stateful router actor: the one owner of what is learned.

All methods are `async def` and do not await between reading and writing the policy, so each is atomic without a
lock. What happened is put into the journal before anybody is told that it was accepted.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from math import inf
from types import MappingProxyType
from typing import Any

import numpy as np

from deployments import collector, logs
from deployments.journal import DAY_S, Journal
from deployments.live import Live
from deployments.memory import Memory
from deployments.refit import Refitter
from deployments.rollout import Rollout, champion_of
from deployments.seating import operate
from deployments.settings import GatewaySettings, latest
from deployments.snapshot import Snapshot
from deployments.telemetry import Telemetry
from policies.base import as_meant
from policies.forecast import Forecaster
from policies.ledger import Event, Record
from policies.pacer import Pacer, paced
from policies.roles import CHAMPION, Roles
from policies.types import Decision, Feedback, ModelState, Outcome, Request

SNAPSHOT_EVERY = 500  # rows of the journal
AHEAD_S = 3600.0  # by so much a clock that jumps is believed, where rows are let go by their age
SETTINGS = "settings"  # the fact of the journal that has those that were handed over last
log = logging.getLogger(__name__)

Watch = Callable[[Collection[str]], dict[str, int]]


class Router:
    """Decides, observes, takes feedback, and explains; survives its own death through the journal.

    Args:
        settings: of the gateway, when this actor was made; those that were handed over since then are in the journal,
            which matters when Ray restarts the actor with the same arguments.
        watch: blocking call that gives the number of ready replicas of each of these arms.
    """

    def __init__(self, settings: GatewaySettings, watch: Watch):
        logs.configure("router")
        self._born_s = time.time() - time.monotonic()
        self._watch, self._telemetry = watch, Telemetry()
        self._rng = np.random.default_rng()  # fresh after a restart, or it would repeat its own exploration
        self._live = Live()
        self._watching: asyncio.Task[None] | None = None
        self._configuring = asyncio.Lock()
        self._journal = Journal(settings.journal)
        settings = latest(self._journal.fact(SETTINGS), settings)
        self._heed(settings)
        self._refitter = Refitter(settings.arms(), self._journal, rest=100.0)
        self._snapshot_row, snapshot = self._journal.snapshot()
        self._rollout = Rollout(settings, snapshot)
        window_s = settings.feedback_window_days * DAY_S
        self._memory = Memory(self._journal, self._rollout.make, self._note, window_s, self._complete, self._taken)
        self._restored = self._sequence > 0

    def _heed(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._live.heed(settings.models)
        self._pacer = Pacer(settings.max_mean_cost_usd or inf)
        self._journal.keep_days, self._journal.max_rows = settings.journal_keep_days, settings.journal_max_rows

    def _complete(self, snapshot: Snapshot) -> Snapshot:
        """What else is learned here, in the same snapshot."""
        state = snapshot.state | self._refitter.state()
        return self._rollout.complete(replace(snapshot, state=state, pacer=self._pacer.state()))

    def _taken(self, snapshot: Snapshot) -> None:
        if snapshot.pacer:
            self._pacer.restore(snapshot.pacer)
        self._refitter.take(snapshot.state, snapshot.arms)
        self._rollout.take(snapshot)

    @property
    def _policy(self) -> Roles:
        return self._rollout.roles

    @property
    def _sequence(self) -> int:
        return self._memory.sequence

    def _note(self, event: Event, record: Record) -> None:
        """Measure what was folded into the policy."""
        self._rollout.note(event, record)
        self._live.note(event, record)
        if isinstance(event, Decision):
            self._pacer.decided(event)
        elif isinstance(event, Outcome) and record.decision.arm in self._settings.models:
            self._pacer.finished(record.decision, event)

    async def _keep_watch(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:
                log.exception("the router's watch failed; it goes on")
            await asyncio.sleep(2.0)

    async def _look(self) -> None:
        """Every other second: how many replicas are ready; what is queued goes to disk; the profiler's forecasts are
        refitted, and a snapshot is taken, when due.
        """
        self._live.replicas = await asyncio.to_thread(self._watch, tuple(self._settings.models))
        await self._memory.serve(getattr(self._watch, "digests", {}))
        self._telemetry.live(self._live.states(), self._live.shares(), self._live.qualities())
        self._telemetry.watched(time.time(), self._journal.waiting_rows, self._policy.name, self._rollout.version)
        refitted = await self._refitter.turn(self._memory.silenced)
        if refitted or self._rollout.changed or self._journal.last_row - self._snapshot_row >= SNAPSHOT_EVERY:
            self._snapshot_row, self._rollout.changed = self._journal.last_row, False
            self._memory.put_snapshot()
        await self._journal.flush()
        await self._memory.retire(min(time.time(), self._born_s + time.monotonic() + AHEAD_S))

    async def configure(self, settings: GatewaySettings) -> None:
        """Take over changed settings; what was learned about the arms that stay is kept."""
        async with self._configuring:  # of many ingresses that start together
            await self._configure(settings)

    async def _configure(self, settings: GatewaySettings) -> None:
        if settings == self._settings and self._rollout.knows(settings) and self._memory.whole:
            return
        before = self._memory.snapshot()
        if settings.policy.name != self._settings.policy.name:
            self._live.forget()  # what the journal is replayed for will be counted again
        self._heed(settings)
        self._refitter.configure(settings.arms())
        self._rollout.configure(settings)
        self._memory.window_s = settings.feedback_window_days * DAY_S
        await self._memory.rebuild(self._rollout.make, before)
        self._journal.put_fact(SETTINGS, settings.model_dump_json().encode())
        await self._memory.save()

    async def settings(self) -> GatewaySettings:
        """Those that were handed over last."""
        return self._settings

    async def decide(
        self,
        requests: list[Request],
        ingress: str,
        in_flight: dict[str, int],
        waits_s: Mapping[str, float] = MappingProxyType({}),
    ) -> list[Decision]:
        """Decide a batch.

        Args:
            requests: what to decide.
            ingress: who asks.
            in_flight: how many requests of its own each arm is answering for it now.
            waits_s: for a place at each arm there, in seconds; where it is left out, nobody waits.
        """
        began = time.perf_counter()
        self._live.told(ingress, in_flight)
        requests = paced(as_meant(requests), self._pacer.cost_weight)
        states = self._live.states()
        states |= {arm: replace(states[arm], wait_s=wait_s) for arm, wait_s in waits_s.items() if arm in states}
        decided = self._policy.decide(requests, states, self._rng, self._sequence)
        self._memory.sequence += len(decided)
        now, label = time.time(), self._rollout.label_of
        decisions = [d.made(request, label(d), now) for d, request in zip(decided, requests, strict=True)]
        self._memory.decided([decision for decision in decisions if decision.arm])
        self._telemetry.decided(decisions, time.perf_counter() - began)
        return decisions

    async def observe(self, finished: list[tuple[Decision, Outcome]], ingress: str, in_flight: dict[str, int]) -> None:
        """Learn from answers; returns when they are durable. The decisions travel with them, in case this actor
        died in between or never saw them.
        """
        self._live.told(ingress, in_flight)
        decisions = {decision.id: decision for decision, _ in finished}
        unheard = self._memory.unheard(decisions.values())
        if unheard:
            self._telemetry.decided(unheard)
        new = await self._memory.observe(finished, time.time(), unheard)
        self._telemetry.observed([(decisions[outcome.decision_id], outcome) for outcome in new])

    async def feedback(self, items: list[Feedback], key: str = "") -> list[str]:
        """Learn from scores; returns what became of each (memory.py) when all is durable.

        Args:
            items: the scores.
            key: idempotency key of the request, which then has one item only.
        """
        if key:
            statuses = [await self._memory.feedback_once(items[0], time.time(), key)]
        else:
            statuses = await self._memory.feedback(items, time.time())
        for item, status in zip(items, statuses, strict=True):
            self._telemetry.scored(item.source, status)
        return statuses

    async def salt(self) -> bytes:
        """With which ids and hashes are made (identity.py)."""
        return self._journal.salt

    async def rows(self, after: int, most: int) -> list[tuple[int, float, str, bytes]]:
        """Durable events after a row of the journal, as they are in it: the exporter's source."""
        return await asyncio.to_thread(self._journal.rows, after, most)

    async def record(self, decision_id: str) -> Record | None:
        """All that is known of a decision."""
        return self._memory.ledger.get(decision_id)

    async def snapshot(
        self, ingress: str = "", in_flight: dict[str, int] | None = None
    ) -> tuple[Snapshot, dict[str, ModelState], str]:
        """All that was learned, the live states and the version's name: enough to decide without this actor.

        Args:
            ingress: who asks; what it has in flight itself is left out of the states, as it knows that better, and it
                gets the pacer's account if it may decide: while there is only a champion.
            in_flight: as of `decide`, which an ingress that decides by itself does not call.
        """
        if in_flight is not None:
            self._live.told(ingress, in_flight)
        if self._watching is None:  # a constructor has no event loop yet; every ingress asks for this at its start
            self._watching = asyncio.create_task(self._keep_watch())
            collector.relax()
        found = champion_of(self._memory.snapshot())
        alone = len(self._rollout.roles.members) == 1
        found = replace(found, pacer=self._pacer.state()) if ingress and alone else found
        return found, self._live.states(ingress), self._rollout.label(CHAMPION)

    async def forecaster(self, version: int) -> Forecaster | None:
        """What the profiler says of answers; None if the caller's version is the present one."""
        present = self._refitter.forecaster
        return None if present.version == version else present

    async def adopt(self, snapshot: Snapshot) -> bool:
        """Start from a published version, unless something was learned here already."""
        if self._restored or self._sequence > 0:
            return False
        taken = self._memory.take(snapshot)
        if not (taken and self._rollout.is_champions(snapshot)):
            self._rollout.version = 0  # the settings name another policy, or other options
            log.warning("%s of policy version %d was taken", "what it knows" if taken else "nothing", snapshot.version)
        if not taken:
            self._memory.sequence = 0
            return False
        self._restored = True
        await self._memory.save()
        return True

    async def checkpoint(self) -> Snapshot:
        """The champion as it is now; returns when every row that it has learned from is durable."""
        trust = self._memory.trust.state(brief=True)  # who is believed is learned, too
        snapshot = replace(champion_of(self._memory.snapshot()), trust=trust)
        await self._journal.flush()
        return snapshot

    async def rollout(self, verb: str, reason: str, options: dict[str, Any]) -> dict[str, Any]:
        """Change who has which role (see seating.operate); returns who has them then, when that is durable."""
        await operate(self._memory, self._rollout, verb, reason, **options)
        return self._rollout.summary()

    async def summary(self) -> dict[str, Any]:
        """What an operator wants to see at a glance, as plain data."""
        states, shares, qualities = self._live.states(), self._live.shares(), self._live.qualities()
        arms = {arm.name: arm for arm in self._policy.arms}
        return {
            "policy": self._policy.name,
            "policy_version": self._rollout.label(CHAMPION),
            "decisions": self._sequence,
            "counts": dict(self._live.counts),
            "quarantined": dict(self._memory.quarantined),
            "in_doubt": sorted(self._memory.silenced - self._memory.quarantined.keys()),
            "rollout": self._rollout.summary(),
            "served_by": self._memory.lineage.digests,
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
