"""The ingress's client of the profiler and the router: batched calls, deadlines and local fallbacks.

Decisions are made by the router, or by the ingress itself on a fresh snapshot of what the router has learned
(`decide_here_s`); that saves a call. A local decision reaches the router with its outcome. Only the router learns.

A request never fails because of the profiler or the router. Without the profiler, the client profiles the text alone.
Without the router, the client decides on its last snapshot and reports the decision later.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import inf

import numpy as np

from deployments.dispatch.admission import NORMAL
from deployments.dispatch.batching import Batcher
from deployments.dispatch.outcome_reporter import OutcomeReporter
from deployments.journal.ids import LOCAL_SUFFIX, IdFactory
from deployments.journal.snapshot import unpack
from deployments.profiler.deployment import ProfilerHandle
from deployments.profiler.reader import ProfileItem, TextProfiler, count_tokens
from deployments.router.interface import RouterHandle
from deployments.settings import GatewaySettings, Tuning
from policies.budget import BudgetPacer
from policies.events import Decision, Outcome
from policies.objectives import paced, with_text_sensitivity
from policies.profiling import features
from policies.profiling.forecast import Forecaster
from policies.registry import make_policy
from policies.types import ModelState, Objective, Request, TaskProfile

REFRESH_EVERY_S = 1.0
REFRESH_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0  # the router may have many rows to read first
UNKNOWN_STATE = ModelState()
WARM_UP_REQUEST = Request(
    "",
    TaskProfile(np.eye(1, features.D)[0], "chat", features.KINDS[-1], 1),
    Objective(),
)
log = logging.getLogger(__name__)


class RouterClient:
    """Profiles requests, gets decisions and reports outcomes, for one ingress replica.

    Args:
        settings: of the gateway.
        profiler: handle of the profiler.
        connect: gives a handle of the router actor, making the actor if there is none.

    Attributes:
        in_flight: requests of this ingress at each arm, waiting or running.
        wait_s: expected wait in an arm's queue for a priority (admission.py). The dispatcher sets it.
        outcomes: the queue of outcomes on their way to the router.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        profiler: ProfilerHandle,
        connect: Callable[[], RouterHandle],
    ):
        self.tuning = Tuning()
        self.in_flight: Counter[str] = Counter()
        self.store_text = settings.store_text
        self.wait_s: Callable[[str, int], float] = lambda arm, rank: 0.0
        self.outcomes = OutcomeReporter(self._observe, self._with_forecasts)
        # requests whose client named the arm and whose decision is under way
        self._forced: Counter[str] = Counter()
        self._ingress_id = uuid.uuid4().hex
        self._settings = settings
        self._profiler = profiler
        self._connect = connect
        self._arm_names = settings.models.keys()
        self._local_policy = make_policy(
            settings.policy.name, settings.arms(), settings.policy.options
        )
        self._local_policy_kind = (settings.policy.name, settings.policy.options)
        self._local_policy_version = f"{self._local_policy.name}-v0"
        self._local_sequence = 0
        self._text_profiler = TextProfiler(settings.profiler)
        self._forecaster = Forecaster.prior(self._local_policy.arms)
        # of each arm, with the load of the other ingresses
        self._states: dict[str, ModelState] = {}
        self._pacer = BudgetPacer(settings.max_mean_cost_usd or inf)
        self._snapshot_taken_s = -inf
        self._rng = np.random.default_rng()
        self._profile_batched = Batcher(self._profile_batch)
        # one call at a time: a second one would consist mostly of its own overhead
        self._decide_batched = Batcher(self._decide_batch, calls=1)

    async def start(self) -> None:
        """Connect to the router, send it the settings, and keep the local snapshot fresh from now on."""
        self.router = self._connect()
        async with asyncio.timeout(START_TIMEOUT_S):
            await self.router.configure.remote(self._settings)
            self.identity = IdFactory(await self.router.salt.remote())
            await self._refresh()
        self._refreshing = asyncio.create_task(self._keep_fresh())

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_EVERY_S)
            try:
                await asyncio.wait_for(self._refresh(), REFRESH_TIMEOUT_S)
            except Exception as error:
                log.warning(
                    "no snapshot from the router (%s); deciding on the last one",
                    type(error).__name__,
                )
                try:
                    self.router = await asyncio.wait_for(
                        asyncio.to_thread(self._connect), REFRESH_TIMEOUT_S
                    )
                except Exception:
                    log.exception("cannot reach the router actor; trying again")

    async def _refresh(self) -> None:
        began = time.monotonic()
        (
            snapshot,
            self._states,
            self._local_policy_version,
        ) = await self.router.snapshot.remote(self._ingress_id, dict(self.in_flight))
        kind = snapshot.policy, snapshot.options
        if kind != self._local_policy_kind:  # another policy was promoted
            self._local_policy = make_policy(
                snapshot.policy, self._settings.arms(), snapshot.options
            )
            self._local_policy_kind = kind
        self._snapshot_taken_s = -inf
        if snapshot.arms != tuple(arm.name for arm in self._local_policy.arms):
            return
        self._local_policy.restore(snapshot.state)
        self._local_sequence = snapshot.sequence
        # the first decision after a restore computes the posterior: do it before a request needs it
        self._local_policy.decide([WARM_UP_REQUEST], {}, self._rng, snapshot.sequence)
        self._forecaster = (
            unpack(snapshot.state, snapshot.arms, self._local_policy.arms)
            or self._forecaster
        )
        # without `pacer` the router wants to decide itself, because a challenger or a shadow takes part
        if snapshot.pacer:
            self._pacer.restore(snapshot.pacer)
            self._snapshot_taken_s = began

    def new_id(self) -> str:
        """Id of the next decision."""
        return self.identity.new_id(time.time())

    def replicas(self, arm: str) -> int:
        """Number of ready replicas of an arm, as of the last snapshot."""
        return self._states.get(arm, UNKNOWN_STATE).replicas

    def healthy(self) -> tuple[int, int]:
        """Number of arms with a ready replica, as of the last snapshot, and number of all arms."""
        known = [
            self._states.get(arm.name, UNKNOWN_STATE).healthy
            for arm in self._local_policy.arms
        ]
        return sum(known), len(known)

    def prompt_fields(self, prompt: str) -> tuple[str, str]:
        """What may be stored of a prompt: its salted hash, and its text if `store_text` is on."""
        return self.identity.hash(prompt), prompt if self.store_text else ""

    async def profile(self, item: ProfileItem) -> tuple[TaskProfile, str]:
        """Profile of a request, and "profiler" if the profiler did not answer in time.

        A short text is profiled here, which is quicker than to send it. A long text goes to the profiler, because it
        would delay other requests. Forecasts do not influence the decision, so they are computed while the model is
        answering (outcome_reporter.py).
        """
        try:
            if len(item.context) <= self.tuning.profile_here_chars:
                return self._text_profiler.profile([item])[0], ""
            async with asyncio.timeout(self.tuning.profile_timeout_s):
                return await self._profile_batched(item), ""
        except Exception as error:
            log.warning(
                "no profile in time (%s); using the text alone", type(error).__name__
            )
            tokens = count_tokens(None, item.context, item.messages)
            profile = features.profile(
                item.text, None, item.task, tokens, item.max_output_tokens
            )
            return profile, "profiler"

    async def decide(self, request: Request, rank: int = NORMAL) -> Decision:
        """Decide on a fresh snapshot, else by the router, else on the last snapshot if the router does not answer."""
        snapshot_age_s = time.monotonic() - self._snapshot_taken_s
        if snapshot_age_s < self.tuning.decide_here_s:
            return self._decide_on_snapshot([request], rank)[0]
        request = replace(request, profile=self._with_forecasts([request.profile])[0])
        forced = request.objective.models[:1] if request.forced else ()
        self._forced.update(forced)
        try:
            async with asyncio.timeout(self.tuning.decide_timeout_s):
                decision = await self._decide_batched(request)
            if not decision.arm or decision.arm in self._arm_names:
                return decision
            raise LookupError(
                "the router chose an arm that was added after this ingress was started"
            )
        except Exception as error:
            log.warning(
                "no decision to follow (%s); deciding on the last snapshot",
                type(error).__name__,
            )
            # a new id: the router may still decide under the old one, and that decision will not be carried out
            return self.decide_locally(
                replace(request, id=request.id + LOCAL_SUFFIX), "router", rank
            )
        finally:
            self._forced.subtract(forced)

    def decide_locally(
        self, request: Request, fallback: str, rank: int = NORMAL
    ) -> Decision:
        """Decide on the last snapshot, whatever its age.

        Args:
            request: what to decide.
            fallback: why the decision is made here; stored as `Decision.fallback`.
            rank: priority of the request (admission.py).
        """
        return self._decide_on_snapshot([replace(request, fallback=fallback)], rank)[0]

    def _decide_on_snapshot(
        self, requests: list[Request], rank: int = NORMAL
    ) -> list[Decision]:
        """Decisions with the load of this ingress now, and that of the others as of the last snapshot."""
        states = {}
        for arm in self._local_policy.arms:
            state = self._states.get(arm.name, UNKNOWN_STATE)
            own_in_flight = self.in_flight[arm.name]
            if own_in_flight:
                state = replace(
                    state,
                    in_flight=state.in_flight + own_in_flight,
                    wait_s=self.wait_s(arm.name, rank),
                )
            states[arm.name] = state
        requests = paced(with_text_sensitivity(requests), self._pacer.cost_weight)
        decided = self._local_policy.decide(
            requests, states, self._rng, self._local_sequence
        )
        self._local_sequence += len(decided)
        return [
            decision.made(request, self._local_policy_version, time.time())
            for decision, request in zip(decided, requests, strict=True)
        ]

    def report(self, decision: Decision, outcome: Outcome) -> None:
        """Queue the outcome of a decision for the router and the log. Does not wait."""
        self.outcomes.report(decision, outcome)

    async def _observe(self, finished: list[tuple[Decision, Outcome]]) -> None:
        await self.router.observe.remote(
            finished, self._ingress_id, dict(self.in_flight)
        )

    def _with_forecasts(self, profiles: list[TaskProfile]) -> list[TaskProfile]:
        """The profiles with forecasts. Profiles made by the profiler have them already."""
        without = [profile for profile in profiles if not profile.sufficiency]
        completed = iter(self._forecaster.complete(without))
        return [
            profile if profile.sufficiency else next(completed) for profile in profiles
        ]

    async def _profile_batch(self, items: list[ProfileItem]) -> list[TaskProfile]:
        async with asyncio.timeout(self.tuning.profile_timeout_s):
            return await self._profiler.profile.remote(items)

    async def _decide_batch(self, requests: list[Request]) -> list[Decision]:
        async with asyncio.timeout(self.tuning.decide_timeout_s):
            # forced requests of one batch are load to each other, but a request is no load to itself
            own = Counter(
                {request.objective.models[0] for request in requests if request.forced}
            )
            load = dict(self.in_flight + self._forced - own)
            waits_s = {}
            for arm in load:
                wait_s = self.wait_s(arm, NORMAL)
                if wait_s:
                    waits_s[arm] = wait_s
            return await self.router.decide.remote(
                requests, self._ingress_id, load, waits_s
            )
