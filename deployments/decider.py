"""The ingress's way to a decision: batched calls, deadlines, and what to do when nobody answers.

Where the tuning says so (`decide_here_s`), decisions are made here on a fresh snapshot of what the router has learned,
and travel to it with their outcomes: one hop less. The router stays the one owner of what is learned.

A request never fails because routing did: without the profiler the text alone is profiled here, without the router
the decision is made on the last snapshot of what it had learned, and the router hears of it later.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import replace
from itertools import islice
from math import inf
from typing import Any

import numpy as np
from msgspec import structs

from deployments import logs
from deployments.admission import NORMAL
from deployments.coalesce import Coalescer
from deployments.identity import HERE, Identity
from deployments.profiler import Reader, count_tokens
from deployments.refit import unpack
from deployments.settings import GatewaySettings, Tuning
from policies import features
from policies.base import as_meant
from policies.forecast import Forecaster
from policies.pacer import Pacer, paced
from policies.registry import make_policy
from policies.types import Decision, ModelState, Objective, Outcome, Request, TaskProfile

REFRESH_S = 1.0
START_S = 60.0  # the router may have many rows to read first
OBSERVE_EVERY_S = 0.25  # outcomes travel together: nobody waits for them
OBSERVED = 1000  # at a time
OBSERVE_S = 10.0
PATIENCE_S = 300.0  # how long an outcome waits for a router that does not take it
UNHEARD = 20_000  # outcomes that wait at most: some 100 MB
PAUSES_S = 0.5, 2.0  # before the router is asked again: the first, and the longest
UNKNOWN = ModelState()
PROBE = Request("", TaskProfile(np.eye(1, features.D)[0], "chat", features.KINDS[-1], 1), Objective())
log = logging.getLogger(__name__)


class Decider:
    """Profile, decide and report, for one ingress replica.

    Args:
        settings: of the gateway.
        profiler: handle with `profile`.
        connect: gives a handle of the router actor, making the actor if there is none.
    """

    def __init__(self, settings: GatewaySettings, profiler: Any, connect: Callable[[], Any]):
        self.tuning = Tuning()
        self.in_flight: Counter[str] = Counter()
        self.store_text = settings.store_text
        # for a place at an arm, with a rank (admission.py), by who gives them (dispatch.py)
        self.wait_s: Callable[[str, int], float] = lambda arm, rank: 0.0
        self._forced: Counter[str] = Counter()  # on their way to an arm that the client named, not there yet
        self._name = uuid.uuid4().hex
        self._settings, self._profiler, self._connect = settings, profiler, connect
        self._spare = make_policy(settings.policy.name, settings.arms(), settings.policy.options)
        self._spare_kind, self._names = (settings.policy.name, settings.policy.options), settings.models.keys()
        self._spare_version, self._spare_sequence = f"{self._spare.name}-v0", 0
        self._reader, self._forecaster = Reader(settings.profiler), Forecaster.prior(self._spare.arms)
        self._states: dict[str, ModelState] = {}  # with what the other ingresses have in flight
        self._pacer, self._fresh_s = Pacer(settings.max_mean_cost_usd or inf), -inf
        self._rng = np.random.default_rng()
        self._profile = Coalescer(self._profile_batch)
        self._decide = Coalescer(self._decide_batch, calls=1)  # a second one at a time would be mostly its own cost
        self._reporting: deque[tuple[Decision, Outcome]] = deque()  # what the router has not heard of yet
        self._sent = self._lost = 0  # of these: the first, that are on their way; and those that had to give way
        self._unlogged: list[tuple[Decision, Outcome, str]] = []  # and the log, with the request's id
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connect, hand over the settings, and keep the snapshot fresh from now on."""
        self.router = self._connect()
        async with asyncio.timeout(START_S):
            await self.router.configure.remote(self._settings)
            self.identity = Identity(await self.router.salt.remote())
            await self._refresh()
        self._refreshing = asyncio.create_task(self._keep_fresh())

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await asyncio.wait_for(self._refresh(), 5.0)
            except Exception as error:
                log.warning("no snapshot from the router (%s); deciding on the last one", type(error).__name__)
                try:
                    self.router = await asyncio.wait_for(asyncio.to_thread(self._connect), 5.0)
                except Exception:
                    log.exception("cannot reach the router actor; trying again")

    async def _refresh(self) -> None:
        began = time.monotonic()
        told = self._name, dict(self.in_flight)
        snapshot, self._states, self._spare_version = await self.router.snapshot.remote(*told)
        if (snapshot.policy, snapshot.options) != self._spare_kind:  # another was promoted
            self._spare = make_policy(snapshot.policy, self._settings.arms(), snapshot.options)
            self._spare_kind = snapshot.policy, snapshot.options
        self._fresh_s = -inf
        if snapshot.arms == tuple(arm.name for arm in self._spare.arms):
            self._spare.restore(snapshot.state)
            self._spare_sequence = snapshot.sequence
            self._spare.decide([PROBE], {}, self._rng, snapshot.sequence)  # fits now what the next one would wait for
            self._forecaster = unpack(snapshot.state, snapshot.arms, self._spare.arms) or self._forecaster
            if snapshot.pacer:  # or others than the champion have a say, and the router wants to be asked
                self._pacer.restore(snapshot.pacer)
                self._fresh_s = began

    def new_id(self) -> str:
        """The id of the next decision."""
        return self.identity.new_id(time.time())

    def replicas(self, arm: str) -> int:
        """How many of an arm were ready when the router last said."""
        return self._states.get(arm, UNKNOWN).replicas

    def healthy(self) -> tuple[int, int]:
        """How many arms had a replica that was ready when the router last said, and how many there are."""
        known = [self._states.get(arm.name, UNKNOWN).healthy for arm in self._spare.arms]
        return sum(known), len(known)

    def traces(self, prompt: str) -> tuple[str, str]:
        """What may be kept of a prompt: its salted hash, and the text itself only where that is switched on."""
        return self.identity.hash(prompt), prompt if self.store_text else ""

    async def profile(self, item: dict[str, Any]) -> tuple[TaskProfile, str]:
        """The profile of a request (see Profiler.profile), and "profiler" if it had to be made without.

        A short text is read here, in a fraction of the time that sending it takes; a long one would hold up others.
        What is foretold of the answers decides nothing, so it is added while the model works (`_tell`).
        """
        try:
            if len(item["context"]) <= self.tuning.profile_here_chars:
                return self._reader.read([item])[0], ""
            async with asyncio.timeout(self.tuning.profile_timeout_s):
                return await self._profile(item), ""
        except Exception as error:
            log.warning("no profile in time (%s); using the text alone", type(error).__name__)
            tokens = count_tokens(None, item["context"], item["messages"])
            return features.profile(item["text"], None, item["task"], tokens, item["max_output_tokens"]), "profiler"

    async def decide(self, request: Request, rank: int = NORMAL) -> Decision:
        """A decision on a fresh snapshot, or the router's, or in its silence one of our own."""
        if time.monotonic() - self._fresh_s < self.tuning.decide_here_s:
            return self._decide_on_snapshot([request], rank)[0]
        request = replace(request, profile=self._completed([request.profile])[0])
        forced = request.objective.models[:1] if request.forced else ()
        self._forced.update(forced)
        try:
            async with asyncio.timeout(self.tuning.decide_timeout_s):
                decision = await self._decide(request)
            if not decision.arm or decision.arm in self._names:
                return decision
            raise LookupError("an arm that came later than this ingress, which can't reach it")
        except Exception as error:
            log.warning("no decision to follow (%s); deciding on the last snapshot", type(error).__name__)
            # under an id of its own: the router may still come to decide on the other, which nobody will follow
            return self.decide_here(replace(request, id=request.id + HERE), "router", rank)
        finally:
            self._forced.subtract(forced)

    def decide_here(self, request: Request, fallback: str, rank: int = NORMAL) -> Decision:
        """A decision on the last snapshot, with this ingress's own load and what it last heard of the others'."""
        return self._decide_on_snapshot([replace(request, fallback=fallback)], rank)[0]

    def _decide_on_snapshot(self, requests: list[Request], rank: int = NORMAL) -> list[Decision]:
        states = {}
        for arm in self._spare.arms:
            known, mine = self._states.get(arm.name, UNKNOWN), self.in_flight[arm.name]
            if mine:
                known = replace(known, in_flight=known.in_flight + mine, wait_s=self.wait_s(arm.name, rank))
            states[arm.name] = known
        requests = paced(as_meant(requests), self._pacer.cost_weight)
        decided = self._spare.decide(requests, states, self._rng, self._spare_sequence)
        self._spare_sequence += len(decided)
        return [
            decision.made(request, self._spare_version, time.time())
            for decision, request in zip(decided, requests, strict=True)
        ]

    def report(self, decision: Decision, outcome: Outcome) -> None:
        """Tell the router, and the log, what came of a decision, without waiting; keeps trying while it is away."""
        self._reporting.append((decision, outcome))
        if len(self._reporting) > UNHEARD:
            self._reporting.popleft()
            self._sent, self._lost = max(0, self._sent - 1), self._lost + 1
            if self._lost % OBSERVED == 1:
                log.error("the router is away, and outcomes are lost: %d so far", self._lost)
        self._unlogged.append((decision, outcome, logs.REQUEST_ID.get()))
        if self._telling is None or self._telling.done():
            nobodys = Context()  # or all log lines would have the id of the request that is here now
            self._telling = asyncio.get_running_loop().create_task(self._tell(), context=nobodys)

    async def _tell(self) -> None:
        while self._reporting:
            await asyncio.sleep(OBSERVE_EVERY_S)
            finished, began, pause = self._foretold([*islice(self._reporting, OBSERVED)]), time.monotonic(), PAUSES_S[0]
            self._sent = len(finished)
            while True:
                unlogged, self._unlogged = self._unlogged, []
                for row in unlogged:  # the log need not wait until the router is back
                    logs.finished(*row)
                try:
                    async with asyncio.timeout(OBSERVE_S):
                        await self.router.observe.remote(finished, self._name, dict(self.in_flight))
                    break
                except Exception as error:
                    if time.monotonic() - began >= PATIENCE_S:
                        log.error("%d outcomes were lost: the router was away for %g s", len(finished), PATIENCE_S)
                        break
                    name = type(error).__name__
                    log.warning("the router did not take %d outcomes (%s); trying again", len(finished), name)
                    await asyncio.sleep(pause)
                    pause = min(PAUSES_S[1], 2 * pause)
            while self._sent:
                self._reporting.popleft()
                self._sent -= 1

    def _foretold(self, finished: list[tuple[Decision, Outcome]]) -> list[tuple[Decision, Outcome]]:
        """With the forecasts in all profiles; nobody has learned from these outcomes yet."""
        profiles = self._completed([decision.profile for decision, _ in finished])
        pairs = zip(finished, profiles, strict=True)
        return [(d if d.profile is p else structs.replace(d, profile=p), outcome) for (d, outcome), p in pairs]

    def _completed(self, profiles: list[TaskProfile]) -> list[TaskProfile]:
        """With the forecasts; those that the profiler made have them."""
        made = iter(self._forecaster.complete([profile for profile in profiles if not profile.sufficiency]))
        return [profile if profile.sufficiency else next(made) for profile in profiles]

    async def _profile_batch(self, items: list[dict[str, Any]]) -> list[TaskProfile]:
        async with asyncio.timeout(self.tuning.profile_timeout_s):
            profiles: list[TaskProfile] = await self._profiler.profile.remote(items)
        return profiles

    async def _decide_batch(self, requests: list[Request]) -> list[Decision]:
        async with asyncio.timeout(self.tuning.decide_timeout_s):
            # a crowd that comes at once is load to each of its members; nobody is load to itself
            itself = Counter({request.objective.models[0] for request in requests if request.forced})
            load = dict(self.in_flight + self._forced - itself)
            waits_s = {arm: wait_s for arm in load if (wait_s := self.wait_s(arm, NORMAL))}
            decisions: list[Decision] = await self.router.decide.remote(requests, self._name, load, waits_s)
        return decisions
