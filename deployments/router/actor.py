"""Router: the stateful actor that decides, and the only owner of what is learned.

All methods are `async def`. None of them awaits between reading and writing the policy, so each of them is atomic
without a lock. An event is in the journal before the router acknowledges it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import inf
from types import MappingProxyType

import msgspec
import numpy as np
from msgspec import structs
from pydantic import ValidationError

from deployments import runtime
from deployments.calibration.records import (
    RunOrder,
    RunStatus,
    RunView,
    TaskResult,
    UngradedAnswer,
    Work,
)
from deployments.calibration.service import CalibrationService
from deployments.journal.forgotten import Mark
from deployments.journal.ids import trace_id
from deployments.journal.journal import Journal
from deployments.journal.personal_data import Person
from deployments.journal.retention import DAY_S
from deployments.journal.rollout_state import AUTOMATIC
from deployments.journal.snapshot import Snapshot
from deployments.models.capabilities import lacking_by_arm
from deployments.observability import logs
from deployments.observability.metrics import Telemetry
from deployments.privacy.records import Erasure
from deployments.privacy.service import PrivacyService
from deployments.profiler.trainer import ForecastTrainer
from deployments.router.arm_stats import ArmStats
from deployments.router.interface import (
    ArmSummary,
    IngressView,
    RolloutSummary,
    RouterSummary,
)
from deployments.router.learner import Learner, digest_of
from deployments.router.projections import RouterProjections
from deployments.router.role_assignment import (
    assign_role,
    check_restore,
    forget_decisions,
    restore_version,
    undo_restore,
)
from deployments.router.role_table import champion_of
from deployments.router.rollout import Rollout
from deployments.settings import GatewaySettings, Tuning, encoded, latest
from policies.budget import NOTHING, Spending
from policies.demand import Demand
from policies.evaluation.kind_figures import Figures
from policies.events import ACCEPTED, Decision, Feedback, Outcome, Record
from policies.objectives import paced, with_text_sensitivity
from policies.profiling.forecast import Forecaster
from policies.rollout.roles import CHAMPION, Roles
from policies.types import Request

SNAPSHOT_EVERY = 500  # rows of the journal
MAINTENANCE_EVERY_S = 2.0
# retention trusts the wall clock at most this far ahead of the monotonic clock
MAX_CLOCK_LEAD_S = 3600.0
SETTINGS_KEY = "settings"  # name of the current settings in the journal's metadata
TUNING_KEY = "tuning"  # name of the ingresses' settings there
START_KEY = "start_s"  # name of the times that first replicas need there
DEMAND_EVERY_S = 1.0
log = logging.getLogger(__name__)

CountReplicas = Callable[[Collection[str]], dict[str, int]]


class Router:
    """Decides, observes outcomes, takes feedback and explains decisions. It recovers from a crash by the journal.

    Args:
        settings: of the gateway when this actor was created. If the journal has later settings, they are used:
            Ray restarts the actor with its first arguments.
        count_replicas: blocking call that returns the number of ready replicas of each of these arms.
    """

    def __init__(self, settings: GatewaySettings, count_replicas: CountReplicas):
        logs.configure("router")
        self._started_s = time.monotonic()
        self._clock_offset_s = time.time() - time.monotonic()
        self._count_replicas = count_replicas
        self._telemetry = Telemetry()
        # not seeded: a restarted router must not repeat its earlier exploration
        self._rng = np.random.default_rng()
        self._maintenance: asyncio.Task[None] | None = None
        self._configuring = asyncio.Lock()
        # held while a version learns what it lacks, before it gets its role
        self._assigning = asyncio.Lock()
        self._journal = Journal(settings.journal)
        kept = self._journal.metadata(SETTINGS_KEY)
        settings = latest(kept, settings)
        if kept is not None and b'"journal":' in kept:
            # an earlier release stored the journal's URL, perhaps with a password
            self._journal.put_metadata(SETTINGS_KEY, encoded(settings))
        self._tuning = _kept_tuning(self._journal.metadata(TUNING_KEY))
        self._snapshot_row, snapshot = self._journal.snapshot()
        self._arm_stats = ArmStats()
        self._trainer = ForecastTrainer(
            settings.arms(), self._journal, cooldown_factor=100.0
        )
        self._rollout = Rollout(settings, snapshot)
        self._projections = RouterProjections(
            self._rollout, self._arm_stats, self._trainer, self._telemetry
        )
        self._apply_settings(settings)
        self._learner = Learner(
            self._journal,
            self._rollout.make,
            self._projections,
            settings.feedback_window_days * DAY_S,
        )
        self._calibrations = CalibrationService(
            self._journal,
            self._learner.ids,
            self._learner.find_records,
            self._observe_calibration,
        )
        self._privacy = PrivacyService(
            self._journal,
            self._forget_decisions,
            self._save_for_erasure,
            digest_of,
            trace_id,
            lambda: self._settings.mlflow_uri is not None,
        )
        self._restored = self._sequence > 0
        self._demanded: dict[str, Demand] = {}
        self._demanded_s = -inf
        kept = self._journal.metadata(START_KEY)
        self._saved_start_s = msgspec.json.decode(kept or b"{}", type=dict[str, float])
        self._projections.demand.start_s |= self._saved_start_s

    def _apply_settings(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._arm_stats.priced_slots = (self._tuning or Tuning()).priced_slots
        self._projections.apply_settings(settings)
        self._read_capabilities()
        self._journal.retention.keep_days = settings.journal_retention_days
        self._journal.retention.max_rows = settings.journal_max_rows

    def _read_capabilities(self) -> None:
        """Take over what each arm lacks, by the settings and by the applications that are deployed."""
        known = getattr(self._count_replicas, "capabilities", {})
        self._arm_stats.lacks = lacking_by_arm(self._settings.models, known)

    @property
    def _policy(self) -> Roles:
        return self._rollout.roles

    @property
    def _sequence(self) -> int:
        return self._learner.sequence

    # --- maintenance --------------------------------------------------------------------------------------------

    async def _maintain_forever(self) -> None:
        while True:
            try:
                await self._maintain()
            except Exception:
                log.exception("the router's maintenance failed; it will run again")
            await asyncio.sleep(MAINTENANCE_EVERY_S)

    async def _maintain(self) -> None:
        """Count replicas, export metrics, train the forecasts, take a snapshot if due, flush the journal and delete
        old rows.
        """
        counted_s = time.monotonic()
        self._arm_stats.replicas = await asyncio.to_thread(
            self._count_replicas, tuple(self._settings.models)
        )
        self._projections.demand.counted(self._arm_stats.replicas, counted_s)
        self._arm_stats.target_replicas = getattr(self._count_replicas, "targets", {})
        self._read_capabilities()
        digests = getattr(self._count_replicas, "digests", {})
        await self._learner.update_revisions(digests)
        self._telemetry.live(
            self._arm_stats.states(),
            self._arm_stats.shares(),
            self._arm_stats.qualities(),
            self._arm_stats.figures(),
            self._arm_stats.routed_metrics(),
            {arm.name for arm in self._policy.arms if arm.variant_of},
        )
        self._telemetry.demand(self._demands())
        self._save_start_times()
        self._telemetry.record_check(
            time.time(),
            self._journal.waiting_rows,
            self._policy.name,
            self._rollout.version,
            self._learner.records.pending_scores,
            self._journal.last_row,
        )
        roles = self._rollout.summary().roles
        self._telemetry.roles(
            {role: (held.version, held.share) for role, held in roles.items()}
        )
        quarantined = self._learner.quarantined.keys()
        self._telemetry.suspended(
            len(quarantined), len(self._learner.suspended - quarantined)
        )
        trained = await self._trainer.run_once(self._learner.suspended)
        self._rollout.advance_if_due()
        await self._undo_restore()
        new_rows = self._journal.last_row - self._snapshot_row
        if trained or self._rollout.changed or new_rows >= SNAPSHOT_EVERY:
            self._snapshot_row = self._journal.last_row
            self._rollout.changed = False
            self._learner.put_snapshot()
        await self._journal.flush()
        monotonic_s = self._clock_offset_s + time.monotonic()
        await self._learner.apply_retention(
            min(time.time(), monotonic_s + MAX_CLOCK_LEAD_S)
        )

    # --- settings -----------------------------------------------------------------------------------------------

    async def configure(self, settings: GatewaySettings) -> None:
        """Take over changed settings; what was learned about the arms that stay is kept."""
        async with self._configuring:  # several ingresses may start together
            await self._configure(settings)

    async def _configure(self, settings: GatewaySettings) -> None:
        known = settings == self._settings and self._rollout.knows(settings)
        if known and self._learner.consistent:
            return
        before = self._learner.snapshot()
        self._apply_settings(settings)
        self._trainer.configure(settings.arms())
        self._rollout.configure(settings)
        before = self._rollout.carried(before)
        if before.policy != self._rollout.champion_policy:
            self._arm_stats.reset()
        self._learner.window_s = settings.feedback_window_days * DAY_S
        await self._learner.replace_policy(self._rollout.make, before)
        self._journal.put_metadata(SETTINGS_KEY, encoded(settings))
        self._telemetry.configured(time.time())
        await self._learner.save()

    async def settings(self) -> GatewaySettings:
        """The current settings."""
        return self._settings

    async def report_tuning(self, tuning: Tuning) -> None:
        """Take note of the settings with which the ingresses work now, for the prices of scarce arms and for MLflow."""
        if tuning != self._tuning:
            self._tuning = tuning
            self._arm_stats.priced_slots = tuning.priced_slots
            self._journal.put_metadata(TUNING_KEY, tuning.model_dump_json().encode())
            self._telemetry.configured(time.time())

    async def tuning(self) -> Tuning | None:
        """The settings that an ingress has reported last; None if none has."""
        return self._tuning

    # --- requests -----------------------------------------------------------------------------------------------

    async def decide(
        self,
        requests: list[Request],
        ingress: str,
        in_flight: dict[str, int],
        waits_s: Mapping[str, float] = MappingProxyType({}),
    ) -> list[Decision]:
        """Decide a batch of requests.

        Args:
            requests: the requests.
            ingress: the ingress that asks.
            in_flight: number of requests that this ingress has in flight on each application.
            waits_s: expected queue wait for each application at this ingress, in seconds; by default there is no wait.
        """
        began = time.perf_counter()
        self._arm_stats.report_in_flight(ingress, in_flight)
        requests = paced(
            with_text_sensitivity(requests), self._projections.pacer.cost_weight
        )
        states = self._arm_stats.states()
        for arm in self._policy.arms:
            if arm.application in waits_s and arm.name in states:
                wait_s = waits_s[arm.application]
                states[arm.name] = structs.replace(states[arm.name], wait_s=wait_s)
        decided = self._policy.decide(requests, states, self._rng, self._sequence)
        self._learner.sequence += len(decided)
        for decision in decided:
            if not decision.arm:
                self._projections.demand.decided(decision, time.monotonic())
        now = time.time()
        label_of = self._rollout.label_of
        decisions = [
            decision.made(request, label_of(decision), now)
            for decision, request in zip(decided, requests, strict=True)
        ]
        unrecorded = self._learner.record_decisions(
            [decision for decision in decisions if decision.arm]
        )
        self._telemetry.unrecorded(unrecorded)
        self._telemetry.decided(decisions, time.perf_counter() - began)
        return decisions

    async def observe(
        self,
        finished: list[tuple[Decision, Outcome]],
        ingress: str,
        in_flight: dict[str, int],
    ) -> None:
        """Learn from outcomes; returns when they are durable.

        Args:
            finished: decisions with their outcomes. The decisions are included because an ingress may have made them
                by itself, and because a crash may have lost them here.
            ingress: the ingress that reports.
            in_flight: number of requests that this ingress has in flight on each application.
        """
        self._arm_stats.report_in_flight(ingress, in_flight)
        decisions = {decision.id: decision for decision, _ in finished}
        unseen = self._learner.unseen(decisions.values())
        new = await self._learner.observe(finished, time.time(), unseen)
        observed = {outcome.decision_id for outcome in new}
        self._telemetry.decided([d for d in unseen if d.id in observed])
        self._telemetry.observed(
            [(decisions[outcome.decision_id], outcome) for outcome in new]
        )

    async def report_unserved(self, decisions: list[Decision]) -> None:
        """Take note of requests that no arm could answer now: they are demand for those that have no replica."""
        for decision in decisions:
            self._projections.demand.decided(decision, time.monotonic())

    async def demand(self, model: str, leaves: bool = False) -> float:
        """See Demand.wish; `leaves`: the last replica of the model will stop soon."""
        self._arm_stats.report_leaving(model, leaves)
        return self._demands().get(model, Demand()).wish

    def _demands(self) -> dict[str, Demand]:
        """The demand of each application, at most a second old; empty if it is off, or no replicas were counted yet."""
        tuning = self._tuning or Tuning()
        if not tuning.demand_autoscaling or not self._arm_stats.replicas:
            return {}
        now_s = time.monotonic()
        if now_s - self._demanded_s >= DEMAND_EVERY_S:
            self._demanded_s = now_s
            self._demanded = self._projections.demand.measure(
                self._policy.members[CHAMPION], self._arm_stats.states(), now_s
            )
        return self._demanded

    def _save_start_times(self) -> None:
        times = self._projections.demand.start_s
        if times != self._saved_start_s:
            self._saved_start_s = dict(times)
            self._journal.put_metadata(START_KEY, msgspec.json.encode(times))

    async def feedback(self, items: list[Feedback], key: str = "") -> list[str]:
        """Learn from scores; returns the status of each (Learner.feedback) when all of them are durable.

        Args:
            items: the scores.
            key: idempotency key of the request, which must then have exactly one item.
        """
        if key:
            statuses = [await self._learner.feedback_once(items[0], time.time(), key)]
        else:
            statuses = await self._learner.feedback(items, time.time())
        for item, status in zip(items, statuses, strict=True):
            self._telemetry.scored(item.source, status)
        return statuses

    # --- readers ------------------------------------------------------------------------------------------------

    async def salt(self) -> bytes:
        """The secret salt of ids and hashes (journal/ids.py)."""
        return self._journal.salt

    async def rows(self, after: int, most: int) -> list[tuple[int, float, str, bytes]]:
        """Durable events after a row, as the journal stores them; the exporter reads them."""
        return await asyncio.to_thread(self._journal.rows, after, most)

    async def record(self, decision_id: str) -> Record | None:
        """The record of a decision; None if it is unknown."""
        return self._learner.records.get(decision_id)

    async def kind_figures(self, kind: str) -> Mapping[str, Figures]:
        """What the latest decisions show of each arm for this kind of work."""
        return self._arm_stats.figures().of_kind(kind)

    async def snapshot(
        self,
        ingress: str = "",
        in_flight: dict[str, int] | None = None,
        undelivered: Spending = NOTHING,
    ) -> IngressView:
        """Everything that an ingress needs to decide without this actor.

        Args:
            ingress: the ingress that asks. Its own requests in flight are left out of the states, because it knows
                them better. While there is only a champion, its snapshot contains the state of the budget pacer.
            in_flight: as of `decide`, which an ingress that decides by itself does not call.
            undelivered: what the ingress has decided, and this router does not have yet.
        """
        if in_flight is not None:
            self._arm_stats.report_in_flight(ingress, in_flight)
            self._arm_stats.report_undelivered(ingress, undelivered)
        # the constructor has no event loop, so the first call of an ingress starts the maintenance
        if self._maintenance is None:
            self._maintenance = asyncio.create_task(self._maintain_forever())
            runtime.tune_gc()
        snapshot = champion_of(self._learner.snapshot())
        only_champion = len(self._policy.members) == 1
        if ingress and only_champion:
            snapshot = replace(snapshot, pacer=self._projections.pacer.state())
        states = self._arm_stats.states(ingress)
        return IngressView(
            snapshot,
            states,
            self._rollout.label(CHAMPION),
            self._projections.scoring_rates.rates(),
            self._arm_stats.ingresses,
            self._calibrations.active,
            self._arm_stats.undelivered(ingress),
        )

    async def forecaster(self, version: int) -> Forecaster | None:
        """The current forecasts; None if the caller has this version already."""
        forecaster = self._trainer.forecaster
        return None if forecaster.version == version else forecaster

    async def summary(self) -> RouterSummary:
        """The state of the router for operators."""
        states = self._arm_stats.states()
        shares = self._arm_stats.shares()
        qualities = self._arm_stats.qualities()
        figures = self._arm_stats.figures()
        arms = {arm.name: arm for arm in self._policy.arms}
        quarantined = self._learner.quarantined
        demands = self._demands()
        models = {
            name: ArmSummary(
                state=state,
                share=shares[name],
                expected_quality=qualities[name],
                prompt_price_usd=arms[name].prompt_price_usd,
                output_price_usd=arms[name].output_price_usd,
                tasks=arms[name].tasks,
                figures=figures.arms.get(name, Figures()),
                kinds=figures.kinds.get(name, {}),
                demand=demands.get(name),
                variant_of=arms[name].variant_of or None,
            )
            for name, state in states.items()
        }
        return RouterSummary(
            policy=self._policy.name,
            policy_version=self._rollout.label(CHAMPION),
            decisions=self._sequence,
            totals=self._arm_stats.totals.copy(),
            recent=self._arm_stats.recent,
            window=figures.total,
            quarantined=dict(quarantined),
            in_doubt=sorted(self._learner.suspended - quarantined.keys()),
            row=self._journal.last_row,
            waiting_rows=self._journal.waiting_rows,
            routed=self._arm_stats.routed_metrics(),
            rollout=self._rollout.summary(),
            served_by=dict(self._learner.revisions.digests),
            budget=self._projections.pacer.summary(),
            profiler=self._trainer.forecaster.reliability(),
            models=models,
            uptime_s=time.monotonic() - self._started_s,
            export=self._projections.export.upto(self._journal.last_row),
            last_used_s=dict(self._projections.last_used_s),
        )

    # --- calibration --------------------------------------------------------------------------------------------

    async def start_calibration(self, order: RunOrder) -> RunStatus:
        """Start a calibration; see CalibrationService.start."""
        return await self._calibrations.start(
            order,
            {arm.name: arm for arm in self._settings.arms()},
            dict(self._learner.revisions.digests),
            self._settings.feedback_window_days,
        )

    async def calibrate(
        self,
        ingress: str,
        idle: list[str],
        held: list[str],
        results: list[TaskResult],
    ) -> Work:
        """Take in an ingress's results, and give it new tasks; see CalibrationService.exchange."""
        return await self._calibrations.exchange(ingress, idle, held, results)

    async def _observe_calibration(
        self,
        finished: Sequence[tuple[Decision, Outcome]],
        scores: Sequence[Feedback],
    ) -> dict[str, Record]:
        """Learn from answers and scores of a calibration; returns their records when all of it is durable."""
        decisions = {decision.id: decision for decision, _ in finished}
        unseen = self._learner.unseen(decisions.values())
        self._telemetry.decided(unseen)
        new = await self._learner.observe(finished, time.time(), unseen, scores)
        self._telemetry.observed(
            [(decisions[outcome.decision_id], outcome) for outcome in new]
        )
        for score in scores:
            self._telemetry.scored(score.source, ACCEPTED)
        wanted = {*decisions, *(score.decision_id for score in scores)}
        records = {name: self._learner.records.get(name) for name in wanted}
        return {name: record for name, record in records.items() if record is not None}

    async def calibration_status(self) -> RunStatus:
        """Where the calibration stands."""
        return self._calibrations.status()

    async def calibration_view(self) -> RunView:
        """The calibration with its answers."""
        arms = [arm.name for arm in self._settings.arms() if "chat" in arm.tasks]
        return await self._calibrations.view(
            arms, dict(self._learner.revisions.digests)
        )

    async def cancel_calibration(self, reason: str) -> RunStatus:
        """End the calibration that runs; what was answered is kept."""
        status = self._calibrations.cancel(reason)
        await self._journal.flush()
        return status

    async def ungraded_answers(self) -> tuple[UngradedAnswer, ...]:
        """The answers that wait for the command's program."""
        return self._calibrations.ungraded()

    async def grade_answers(self, scores: dict[str, float]) -> int:
        """Take the scores of the command's program; returns how many of them were waited for."""
        return await self._calibrations.grade(scores)

    async def calibration_logged(self, run_id: str, mlflow_run: str) -> None:
        """The tracker has logged the report of a calibration."""
        await self._calibrations.logged(run_id, mlflow_run)

    # --- erasure and export -------------------------------------------------------------------------------------

    async def erase(self, person: Person) -> Erasure:
        """Erase everything that is stored of a key or a user; see PrivacyService.erase.

        Raises:
            ValueError: what was learned cannot be saved now.
        """
        self._require_consistent()
        return await self._privacy.erase(person)

    def _require_consistent(self) -> None:
        if not self._learner.consistent:
            raise ValueError(
                "the router lacks events of its journal since a replay failed; reload the settings first"
            )

    def _forget_decisions(self, gone: Collection[str], scored: Collection[str]) -> None:
        forget_decisions(self._learner, self._rollout, gone)
        self._learner.records.remove(scored)
        self._arm_stats.forget_decisions(gone)
        self._trainer.forget_decisions(gone)

    async def _save_for_erasure(self) -> int:
        self._require_consistent()
        row = self._journal.last_row
        await self._learner.save()
        return row

    async def erasures(self) -> list[Erasure]:
        """The latest erasures, oldest first."""
        return self._privacy.erasures()

    async def traces_erased(self, erasure_id: str) -> None:
        """The tracker has deleted the traces of an erasure."""
        await self._privacy.traces_erased(erasure_id)

    async def personal_ids(self, person: Person) -> tuple[list[str], list[str]]:
        """See PrivacyService.personal_ids."""
        return await self._privacy.personal_ids(person)

    async def personal_lines(self, decision_ids: list[str]) -> list[str]:
        """See PrivacyService.personal_lines."""
        return await self._privacy.personal_lines(decision_ids)

    # --- policy versions ----------------------------------------------------------------------------------------

    async def adopt(self, snapshot: Snapshot) -> bool:
        """Start from a published version, unless this router has learned something already or only observes.

        Returns:
            Whether the version was adopted.
        """
        if self._restored or self._sequence > 0 or self._rollout.first_day is not None:
            return False
        adopted = self._learner.restore(snapshot)
        if not (adopted and self._rollout.is_champions(snapshot)):
            self._rollout.version = 0
            log.warning(
                "%s of policy version %d was adopted",
                "only the learned state" if adopted else "nothing",
                snapshot.version,
            )
        if not adopted:
            self._learner.sequence = 0
            return False
        self._restored = True
        if self._rollout.version == snapshot.version:
            self._rollout.record_adopted()
        await self._learner.save()
        return True

    async def record_export(self, row: int, problem: str = "") -> None:
        """Take a report of the tracker on its export to MLflow.

        Args:
            row: last row of the journal that is exported.
            problem: why the export has failed; "" if it has succeeded.
        """
        self._projections.export = self._projections.export.reported(
            row, problem, time.time()
        )

    async def checkpoint(self) -> Snapshot:
        """The champion at present, to be published; returns when all events that it learned from are durable.

        While a rule is the champion, it is the policy that is tried beside the rule (Rollout.to_publish).
        """
        reputation = self._learner.reputation.state(compact=True)
        everything = self._learner.snapshot()
        snapshot = replace(
            self._rollout.to_publish(everything),
            trust=reputation,
            scoring=everything.scoring,
            totals=everything.totals,
        )
        await self._journal.flush()
        return snapshot

    async def assign_role(
        self,
        role: str,
        snapshot: Snapshot,
        share: float,
        reason: str,
        by: str = AUTOMATIC,
    ) -> RolloutSummary:
        """Make a published version the challenger or the shadow.

        Args:
            role: challenger or shadow.
            snapshot: the version; it first learns from the events since its publication.
            share: share of the traffic for a challenger, in [0, 1].
            reason: stored in the history, as in RoleChange.
            by: as in RoleChange. The other changes of roles take both, too.

        Returns:
            Rollout.summary after the change, when that is durable. The other changes of roles return the same.

        Raises:
            ValueError: the version does not fit; the message says why.
        """
        async with self._assigning:
            await assign_role(
                self._learner, self._rollout, role, snapshot, share, reason, by
            )
        return await self._save_roles()

    async def restore_version(
        self,
        snapshot: Snapshot,
        since_s: float,
        key: str | None,
        reason: str,
        check: bool = False,
        by: str = AUTOMATIC,
    ) -> RolloutSummary:
        """Make a published version the champion, as if some of the scores that arrived since then never had.

        Args:
            snapshot: the version; it first learns from the events since its publication.
            since_s: scores that arrived at this time or later are forgotten, in seconds since the epoch.
            key: forget only scores that the API key of this name gave; None for those of all keys.
            reason: stored in the history and in the journal.
            check: only check whether it is possible.
            by: see RoleChange.

        Raises:
            ValueError: it is not; the message says why.
        """
        mark = Mark(
            since_s=since_s,
            up_to=self._journal.last_row,
            key=key,
            version=snapshot.version,
            reason=reason,
            time_s=time.time(),
        )
        async with self._assigning:
            if check:
                await check_restore(self._learner, self._rollout, snapshot, mark)
                return self._rollout.summary()
            await self._withdraw_mark()
            await restore_version(
                self._learner, self._rollout, self._projections, snapshot, mark, by
            )
        return await self._save_roles()

    async def _undo_restore(self) -> None:
        """Let forgotten scores count again if the version that forgot them was rolled back."""
        if self._rollout.undo_row:
            async with self._assigning:
                await self._withdraw_mark()

    async def _withdraw_mark(self) -> None:
        if self._rollout.undo_row:
            await undo_restore(self._learner, self._rollout, self._projections)

    async def remove_role(
        self, role: str, reason: str, by: str = AUTOMATIC
    ) -> RolloutSummary:
        """Remove the challenger or the shadow.

        Raises:
            ValueError: no version has this role.
        """
        self._rollout.remove_role(role, reason, by)
        return await self._save_roles()

    async def promote(self, reason: str, by: str = AUTOMATIC) -> RolloutSummary:
        """Make the challenger the champion.

        Raises:
            ValueError: there is no challenger.
        """
        self._rollout.promote(reason, by)
        return await self._save_roles()

    async def roll_back(self, reason: str, by: str = AUTOMATIC) -> RolloutSummary:
        """Make the predecessor the champion again; on the first day, the rule.

        Raises:
            ValueError: no promotion is being watched.
        """
        self._rollout.roll_back(reason, by)
        await self._undo_restore()
        return await self._save_roles()

    async def advance(
        self, reason: str, override: bool = False, by: str = AUTOMATIC
    ) -> RolloutSummary:
        """Begin the next stage of the first day (policies/rollout/first_day.py).

        Args:
            reason: stored in the history.
            by: as in RoleChange.
            override: whether to begin it although the gate refuses.

        Raises:
            GateRefusedError: the gate refuses.
            ValueError: there is no next stage.
        """
        self._rollout.advance(reason, override, by)
        return await self._save_roles()

    async def record_published(
        self, version: int, of: int | None, by: str = AUTOMATIC
    ) -> RolloutSummary:
        """Give the champion the number under which it was published; `of` is its number before, None for another's."""
        self._rollout.record_published(version, of, by)
        return await self._save_roles()

    async def _save_roles(self) -> RolloutSummary:
        await self._learner.save()
        return self._rollout.summary()


def _kept_tuning(kept: bytes | None) -> Tuning | None:
    """The ingresses' settings that a journal stored; None if it stored none, or if they are no longer valid."""
    try:
        return None if kept is None else Tuning.model_validate_json(kept)
    except ValidationError:
        return None
