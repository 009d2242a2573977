"""The ingress's client of the profiler and the router: batched calls, deadlines and local fallbacks.

Decisions are made by the router, or by the ingress itself on a fresh snapshot of what the router has learned
(`snapshot_max_age_s`); that saves a call. A local decision reaches the router with its outcome. Only the router learns.

A request never fails because of the profiler or the router. Without the profiler, the client profiles the text alone.
Without the router, the client decides on its last snapshot and reports the decision later.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf

import numpy as np
from msgspec import structs

from deployments.dispatch.admission import BATCH, NORMAL
from deployments.dispatch.batching import Batcher
from deployments.dispatch.outcome_reporter import OutcomeReporter
from deployments.journal.ids import IdFactory
from deployments.journal.snapshot import unpack
from deployments.profiler.deployment import ProfilerHandle
from deployments.profiler.reader import ProfileItem, TextProfiler
from deployments.router.interface import RouterHandle
from deployments.settings import GatewaySettings, Tuning
from policies.base import Policy
from policies.baselines import Uniform
from policies.budget import IngressPacer
from policies.constraints import Exclusion
from policies.events import CALIBRATION, PAIR, Decision, Outcome
from policies.objectives import paced, with_text_sensitivity
from policies.profiling import features
from policies.profiling.forecast import Forecaster
from policies.registry import RULES, make_policy
from policies.scarcity import ScarcityPrices
from policies.types import ModelState, Objective, Request, TaskProfile

REFRESH_EVERY_S = 1.0
REFRESH_TIMEOUT_S = 5.0
MAX_UNSERVED = 100
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
        scored: number of decisions that have a score, as of the last snapshot.
        in_flight: requests of this ingress at each application, waiting or running.
        wait_s: expected wait in an application's queue for a priority (admission.py). The dispatcher sets it.
        on_refresh: called after each new snapshot. The ingress sets it.
        outcomes: the queue of outcomes on their way to the router.
        ingress_id: name of this ingress in calls of the router.
        calibrating: whether a calibration runs, as of the last snapshot.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        profiler: ProfilerHandle,
        connect: Callable[[], RouterHandle],
    ):
        self.tuning = Tuning()
        # the one that the router knows; the first is replaced by `reconfigure` before a request arrives
        self._reported_tuning = self.tuning
        self.in_flight: Counter[str] = Counter()
        self.store_text = settings.store_text
        self.wait_s: Callable[[str, int], float] = lambda application, rank: 0.0
        self.outcomes = OutcomeReporter(self._observe, self._with_forecasts)
        # by application, requests whose client named the arm and whose decision is under way
        self._forced: Counter[str] = Counter()
        self.ingress_id = uuid.uuid4().hex
        self.calibrating = False
        self.on_refresh: Callable[[], None] = lambda: None
        self._settings = settings
        self._profiler = profiler
        self._connect = connect
        self._applications = {arm.name: arm.application for arm in settings.arms()}
        # On the first day the team's rule decides; the first snapshot says whether that day is over.
        rule = settings.rollout.observed_rule
        kind = (settings.policy.name, settings.policy.options)
        if rule is not None:
            kind = (rule.policy, rule.options)
        self._local_policy = make_policy(kind[0], settings.arms(), kind[1])
        self._local_policy_kind = kind
        self._local_policy_version = f"{self._local_policy.name}-v0"
        self._local_sequence = 0
        self.scored = 0
        self._text_profiler = TextProfiler(settings.profiler)
        self._forecaster = Forecaster.prior(self._local_policy.arms)
        # of each arm, with the load of the other ingresses
        self._states: Mapping[str, ModelState] = {}
        self._prices = ScarcityPrices(settings.arms())
        # requests that no arm could answer, and that the router does not know yet
        self._unserved: deque[Decision] = deque(maxlen=MAX_UNSERVED)
        self._ingresses = 1
        self._scoring_rates: Mapping[str, float] = {}  # by API key
        self._pacer = IngressPacer(settings.max_mean_cost_usd or inf)
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
        if self.tuning is not self._reported_tuning:
            tuning = self.tuning
            await self.router.report_tuning.remote(tuning)
            self._reported_tuning = tuning
        if self._unserved:
            unserved = [*self._unserved]
            self._unserved.clear()  # one that is lost comes again with the client's next try
            await self.router.report_unserved.remote(unserved)
        view = await self.router.snapshot.remote(
            self.ingress_id, dict(self.in_flight), self._pacer.undelivered
        )
        snapshot = view.snapshot
        self._states = view.states
        self._ingresses = max(1, view.ingresses)
        self.calibrating = view.calibrating
        self.on_refresh()
        self._local_policy_version = view.policy_version
        self._scoring_rates = view.scoring_rates
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
        self.scored = snapshot.scored
        # the first decision after a restore computes the posterior: do it before a request needs it
        self._local_policy.decide([WARM_UP_REQUEST], {}, self._rng, snapshot.sequence)
        self._forecaster = (
            unpack(snapshot.state, snapshot.arms, self._local_policy.arms)
            or self._forecaster
        )
        # without `pacer` the router wants to decide itself, because a challenger or a shadow takes part
        if snapshot.pacer:
            self._pacer.restore(snapshot.pacer, view.ingresses, view.undelivered)
            self._snapshot_taken_s = began

    def new_id(self) -> str:
        """Id of the next decision."""
        return self.identity.new_id(time.time())

    def scoring_rate(self, owner: str) -> float:
        """Probability that an API key scores its next answer, as of the last snapshot; 1 for an unknown key."""
        return self._scoring_rates.get(owner, 1.0)

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens of a prompt are counted by a tokenizer, and not estimated."""
        return self._settings.profiler.tokenizer is not None

    def replicas(self, arm: str) -> int:
        """Number of ready replicas of an arm, as of the last snapshot."""
        return self._states.get(arm, UNKNOWN_STATE).replicas

    def lacks(self, arm: str) -> frozenset[str]:
        """The capabilities that an arm does not have, as of the last snapshot."""
        return self._states.get(arm, UNKNOWN_STATE).lacks

    def others_in_flight(self, arm: str) -> float:
        """Requests that the other ingresses have in flight on an arm's application, as of the last snapshot."""
        return self._states.get(arm, UNKNOWN_STATE).in_flight

    def ready(self) -> tuple[int, int]:
        """Number of arms with a ready replica or scaled to zero, as of the last snapshot, and number of all arms.

        An arm at zero is ready, because a request for it is what starts it.
        """
        known = [
            self._states.get(arm.name, UNKNOWN_STATE) for arm in self._local_policy.arms
        ]
        return sum(state.healthy or state.is_at_zero for state in known), len(known)

    def prompt_fields(self, prompt: str) -> tuple[str, str]:
        """What may be stored of a prompt: its salted hash, and its text if `store_text` is on."""
        return self.identity.hash(prompt), prompt if self.store_text else ""

    def user_hashes(self, users: Sequence[str]) -> tuple[str, ...]:
        """What is stored of the client's names for its users: their salted hashes."""
        return tuple(self.identity.user_hash(user) for user in users)

    async def profile(self, item: ProfileItem) -> tuple[TaskProfile, str]:
        """Profile of a request, and "profiler" if the profiler did not answer in time.

        A short text is profiled here, which is quicker than to send it. A long text goes to the profiler, because it
        would delay other requests. Forecasts do not influence the decision, so they are computed while the model is
        answering (outcome_reporter.py).
        """
        try:
            if len(item.context) <= self.tuning.local_profile_max_chars:
                return self._text_profiler.profile([item])[0], ""
            async with asyncio.timeout(self.tuning.profile_timeout_s):
                return await self._profile_batched(item), ""
        except Exception as error:
            log.warning(
                "no profile in time (%s); using the text alone", type(error).__name__
            )
            return self._text_profiler.profile_quickly(item), "profiler"

    async def decide(self, request: Request, rank: int = NORMAL) -> Decision:
        """Decide on a fresh snapshot, else by the router, else on the last snapshot if the router does not answer."""
        snapshot_age_s = time.monotonic() - self._snapshot_taken_s
        if snapshot_age_s < self.tuning.snapshot_max_age_s:
            return self._decide_on_snapshot([request], rank)[0]
        request = replace(request, profile=self._with_forecasts([request.profile])[0])
        forced = self._forced_to(request)
        self._forced.update(forced)
        try:
            async with asyncio.timeout(self.tuning.decide_timeout_s):
                decision = await self._decide_batched(request)
            if not decision.arm or decision.arm in self._applications:
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
                replace(request, id=self.identity.local_id(request.id)),
                "router",
                rank,
            )
        finally:
            self._forced.subtract(forced)

    def _forced_to(self, request: Request) -> tuple[str, ...]:
        """The application of the arm that a client named; empty if it named none."""
        if not request.forced:
            return ()
        return (self._applications[request.objective.models[0]],)

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
        self, requests: list[Request], rank: int = NORMAL, rule: Policy | None = None
    ) -> list[Decision]:
        """Decisions with the load of this ingress now, and that of the others as of the last snapshot.

        Args:
            requests: what to decide.
            rank: priority of the requests (admission.py).
            rule: decides in place of the champion.
        """
        states = self._states_now(rank)
        requests = paced(with_text_sensitivity(requests), self._pacer.cost_weight)
        policy = rule or self._local_policy
        version = f"{rule.name}-v0" if rule else self._local_policy_version
        decided = policy.decide(requests, states, self._rng, self._local_sequence)
        self._local_sequence += len(decided)
        decisions = [
            decision.made(request, version, time.time())
            for decision, request in zip(decided, requests, strict=True)
        ]
        for decision in decisions:
            if decision.arm:
                self._pacer.decided(decision)
                self._prices.decided(decision)
            else:
                self._unserved.append(decision)
        return decisions

    def pair_decision(self, first: Decision, request: Request) -> Decision:
        """The decision which arm gives a second answer in the background; its arm is "" if the limits exclude all.

        The champion draws the arm as for an answer that will be scored. If the champion is a rule, which explores
        nothing, the arm is drawn uniformly. No client may score the answer, which it does not get.

        Args:
            first: the decision about the first answer.
            request: the client's request, with the arms that cannot be asked as `unavailable`.
        """
        request = replace(
            request,
            id=first.pair,
            pair=first.id,
            fallback=PAIR,
            owner="",
            score_chance=1.0,
            explore=0.0,
        )
        policy = self._local_policy
        rule = Uniform(policy.arms) if policy.name in RULES else None
        return self._decide_on_snapshot([request], BATCH, rule)[0]

    def calibration_decision(self, request: Request, arm: str) -> Decision:
        """The record that an arm answers a calibration prompt.

        Each of the K arms that the request allows answers it. So the propensity of each is 1/K, and none is drawn.
        """
        profile = self._with_forecasts([request.profile])[0]
        request = replace(request, profile=profile, fallback=CALIBRATION)
        # for this arm alone, because a decision holds how much the policy knew of its arm
        alone = replace(request, objective=replace(request.objective, models=(arm,)))
        (decided,) = self._local_policy.decide(
            [alone], self._states_now(BATCH), self._rng, self._local_sequence
        )
        models = request.objective.models
        estimates = []
        for estimate in decided.estimates:
            propensity = 1.0 / len(models) if estimate.arm in models else 0.0
            removed_by = estimate.removed_by
            if propensity and Exclusion.of(removed_by) is Exclusion.NOT_ALLOWED:
                removed_by = ""
            estimates.append(
                estimate._replace(propensity=propensity, removed_by=removed_by)
            )
        return structs.replace(
            decided.made(request, self._local_policy_version, time.time()),
            arm=arm,
            objective=request.objective,
            estimates=tuple(estimates),
        )

    def _states_now(self, rank: int) -> dict[str, ModelState]:
        """The arms' states: the load of this ingress now, that of the others as of the last snapshot, and prices."""
        states = {}
        for arm in self._local_policy.arms:
            state = self._states.get(arm.name, UNKNOWN_STATE)
            own_in_flight = self.in_flight[arm.application]
            if own_in_flight:
                state = structs.replace(
                    state,
                    in_flight=state.in_flight + own_in_flight,
                    wait_s=self.wait_s(arm.application, rank),
                )
            states[arm.name] = state
        slots = self.tuning.priced_slots * self._ingresses
        return self._prices.priced(states, time.monotonic(), slots)

    def report(self, decision: Decision, outcome: Outcome) -> None:
        """Queue the outcome of a decision for the router and the log. Does not wait."""
        self.outcomes.report(decision, outcome)

    async def _observe(self, finished: list[tuple[Decision, Outcome]]) -> None:
        await self.router.observe.remote(
            finished, self.ingress_id, dict(self.in_flight)
        )
        for decision, _ in finished:
            self._pacer.delivered(decision)

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
            own = Counter({name for one in requests for name in self._forced_to(one)})
            load = dict(self.in_flight + self._forced - own)
            waits_s = {}
            for application in load:
                wait_s = self.wait_s(application, NORMAL)
                if wait_s:
                    waits_s[application] = wait_s
            return await self.router.decide.remote(
                requests, self.ingress_id, load, waits_s
            )
