"""The tracker actor: exports the router's metrics to MLflow and registers what it learned as policy versions.

The tracker is a separate actor and takes no part in answering a request. Every few seconds it exports the new rows of
the journal. While MLflow is unreachable the tracker retries, and requests are not affected.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress

from deployments.calibration.records import RunState
from deployments.journal.ids import IdFactory
from deployments.observability import logs
from deployments.observability.metrics import TrackerTelemetry
from deployments.privacy.records import ErasureState
from deployments.router.interface import RolloutSummary, RouterHandle, RouterSummary
from deployments.settings import GatewaySettings, Tuning
from deployments.tracking.calibration_report import log_report
from deployments.tracking.descriptions import parameters
from deployments.tracking.exporter import Exporter
from deployments.tracking.mlflow_runs import UPTIME, MlflowRuns
from deployments.tracking.model_registry import MODEL, PolicyRegistry
from deployments.tracking.promotion import PromotionService
from policies.rollout.roles import CHAMPION, SHADOW

EVERY_S = 5.0
# after a start the ingresses report their settings, which become parameters of the runs
SETTLE_S = 3.0
log = logging.getLogger(__name__)


class Tracker:
    """Exports the router's metrics to MLflow, and manages the policy versions in its registry.

    The methods for operators (`list_versions` to `promote`) return None if no MLflow is configured.

    Args:
        settings: the gateway's settings when the actor was created; newer ones are fetched from the router.
        router: handle of the router actor.
        start: start of this system, in seconds since the epoch; a restarted tracker gets the same value.
    """

    def __init__(self, settings: GatewaySettings, router: RouterHandle, start: float):
        logs.configure("tracker")
        self._settings = settings
        self._router = router
        self._telemetry = TrackerTelemetry()
        self._registry: PolicyRegistry | None = None
        self._start = start
        self._run_id = ""
        self._published_at = time.time()
        self._published_sequence = -1
        self._tuning: Tuning | None = None
        self._settle_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> bool:
        """Start the background task, once; returns False if no MLflow is configured."""
        await self._refresh_settings()
        if self._settings.mlflow_uri is None:
            return False
        if self._task is None:
            self._settle_s = SETTLE_S
            self._task = asyncio.create_task(self._run_forever())
        return True

    # --- background export --------------------------------------------------------------------------------------

    async def _refresh_settings(self) -> None:
        """Fetch the current settings from the router; if they changed, the connection to MLflow is made anew.

        New settings are new parameters, so MLflow gets new runs.
        """
        try:
            settings = await self._router.settings.remote()
            tuning = await self._router.tuning.remote()
        except Exception as error:
            log.warning(
                "the router did not return its settings (%s); continuing with the previous ones",
                error,
            )
            return
        if (settings, tuning) != (self._settings, self._tuning):
            async with self._lock:
                self._settings = settings
                self._tuning = tuning
                self._registry = None

    async def _run_forever(self) -> None:
        while True:
            try:
                await self._refresh_settings()
                if self._settings.mlflow_uri is not None:
                    await self._track()
                self._telemetry.record_export(time.time(), True)
                await self._report_export()
            except Exception as error:
                self._telemetry.record_export(time.time(), False)
                await self._report_export(type(error).__name__)
                log.warning(
                    "MLflow cannot be reached now (%s: %s); trying again",
                    type(error).__name__,
                    error,
                )
            await asyncio.sleep(EVERY_S)

    async def _report_export(self, problem: str = "") -> None:
        """Tell the router how far the export is, for the state; a router that does not answer learns it next time."""
        if self._settings.mlflow_uri is None:
            return
        row = self._exporter.row if self._registry is not None else 0
        with suppress(Exception):
            await self._router.record_export.remote(row, problem)

    async def _connect(self) -> PolicyRegistry:
        """The registry. The first connection also seeds a router that has learned nothing with the newest version."""
        async with self._lock:
            if self._registry is None:
                uri = self._settings.mlflow_uri
                assert uri is not None
                ids = IdFactory(await self._router.salt.remote())
                registry = await asyncio.to_thread(
                    PolicyRegistry,
                    uri,
                    self._settings.experiment,
                    ids.signature,
                    self._settings.unsigned_versions == "refuse",
                )
                await self._seed_router(registry)
                await asyncio.to_thread(registry.describe)
                if self._settle_s:
                    await asyncio.sleep(self._settle_s)
                    self._settle_s = 0.0
                    self._tuning = await self._router.tuning.remote()
                await self._start_exporter(registry)
                self._promotions = PromotionService(
                    self._settings, registry, self._router, self._run_id
                )
                self._registry = registry
            return self._registry

    async def _seed_router(self, registry: PolicyRegistry) -> None:
        """Offer the newest version to the router, which adopts it if it has learned nothing; skip a damaged one."""
        version = await asyncio.to_thread(registry.latest)
        if not version:
            return
        try:
            newest = await asyncio.to_thread(registry.load, version)
        except Exception as error:  # the artefact store may fail in any way
            log.warning(
                "policy version %d is not offered to the router: %s", version, error
            )
            return
        if await self._router.adopt.remote(newest):
            log.info("the router starts from policy version %d", version)

    async def _start_exporter(self, registry: PolicyRegistry) -> None:
        ids = IdFactory(await self._router.salt.remote())
        tags = {"policy": self._settings.policy.name}
        experiment_id = await asyncio.to_thread(lambda: registry.experiment_id)
        self._runs = MlflowRuns(
            registry.client,
            experiment_id,
            ids.journal_id,
            self._start,
            tags,
            await asyncio.to_thread(parameters, self._settings, self._tuning),
            {arm.name: arm for arm in self._settings.arms()},
            former_journal=ids.hash("journal"),
        )
        self._exporter = Exporter(
            self._router, self._runs, EVERY_S, self._settings.trace_sample_rate
        )
        await self._exporter.resume()
        self._run_id = await asyncio.to_thread(lambda: self._runs.run_id)

    async def _track(self) -> None:
        registry = await self._connect()
        summary = await self._router.summary.remote()
        try:
            await self._exporter.run_once(
                time.time(), {*summary.quarantined, *summary.in_doubt}
            )
            await asyncio.to_thread(self._runs.finish, _deciding(summary.rollout))
            # after the export, which may have sent traces of decisions that were erased meanwhile
            await self._erase_traces()
        finally:  # a failed export does not delay the versions
            self._telemetry.record_lag(max(0, summary.row - self._exporter.sent_row))
            await self._publish(registry, summary)
        await self._log_calibration(registry)

    async def _erase_traces(self) -> None:
        """Delete the traces of erased decisions; what fails is tried again in the next cycle."""
        for erasure in await self._router.erasures.remote():
            if erasure.traces and erasure.state is not ErasureState.RUNNING:
                await asyncio.to_thread(self._runs.erase_traces, erasure.traces)
                await self._router.traces_erased.remote(erasure.id)

    async def _log_calibration(self, registry: PolicyRegistry) -> None:
        """Log the report of a calibration that is over, once. One that was interrupted is expected to go on."""
        status = await self._router.calibration_status.remote()
        not_over = (RunState.NONE, RunState.RUNNING, RunState.INTERRUPTED)
        over = status.state not in not_over
        if not over or status.mlflow_run or not status.calls + status.reused:
            return
        view = await self._router.calibration_view.remote()
        if not view.answers:
            return
        run = await asyncio.to_thread(log_report, registry, view)
        await self._router.calibration_logged.remote(status.run_id, run)

    async def _publish(self, registry: PolicyRegistry, summary: RouterSummary) -> None:
        """Log the live measurements, register a version when one is due, and update the registry's aliases."""
        measured: dict[str, float | None] = {
            f"profiler/{key}": value for key, value in summary.profiler.items()
        }
        measured[UPTIME] = time.time() - self._start
        for name, arm in summary.models.items():
            measured |= {
                # the requests of a variant are among those of its model
                f"in_flight/{name}": None if arm.variant_of else arm.state.in_flight,
                f"expected_quality/{name}": arm.expected_quality,
                f"score/{name}": arm.figures.score,
                f"votes/{name}": arm.figures.votes,
                f"availability/{name}": arm.figures.availability,
                f"answers/{name}": arm.figures.answers,
                f"tokens_per_s/{name}": arm.figures.tokens_per_s,
            }
        if summary.rollout.first_day is not None:
            measured |= summary.rollout.first_day.metrics()
        known = {key: value for key, value in measured.items() if value is not None}
        await asyncio.to_thread(registry.log, self._run_id, known, summary.decisions)
        if time.time() - self._published_at >= self._settings.publish_interval_s:
            self._published_at = time.time()
            if summary.decisions != self._published_sequence:
                await self._promotions.publish()
                self._published_sequence = summary.decisions
                await self._promotions.prune()
        await self._promotions.sync_aliases()

    # --- operators ----------------------------------------------------------------------------------------------

    async def _service(self) -> PromotionService | None:
        """The promotion service; None if no MLflow is configured."""
        if not await self.start():
            return None
        await self._connect()
        return self._promotions

    async def list_versions(self) -> dict[str, object] | None:
        """The registry's `name` and all `versions`, newest first."""
        service = await self._service()
        if service is None:
            return None
        return {"name": MODEL, "versions": await service.list_versions()}

    async def show_version(self, version: int) -> dict[str, object] | None:
        """One version with its newest evaluation report."""
        service = await self._service()
        return None if service is None else await service.show_version(version)

    async def diff(self, version: int, other: int) -> dict[str, object] | None:
        """See PromotionService.diff."""
        service = await self._service()
        return None if service is None else await service.diff(version, other)

    async def evaluate(self, version: int) -> dict[str, object] | None:
        """See PromotionService.evaluate."""
        service = await self._service()
        return None if service is None else await service.evaluate(version)

    async def publish(
        self, policy: str, options: Mapping[str, object] | None, by: str
    ) -> dict[str, object] | None:
        """See PromotionService.publish; returns the registry's `name` and the number of the new `version`."""
        service = await self._service()
        if service is None:
            return None
        return {"name": MODEL, "version": await service.publish(policy, options, by)}

    async def promote(
        self,
        version: int,
        to: str = CHAMPION,
        share: float | None = None,
        override: str = "",
        by: str = "",
    ) -> dict[str, object] | None:
        """See PromotionService.promote."""
        service = await self._service()
        if service is None:
            return None
        return await service.promote(version, to, share, override, by)

    async def restore(
        self, version: int, since_s: float, key: str | None, reason: str, by: str
    ) -> dict[str, object] | None:
        """See PromotionService.restore."""
        service = await self._service()
        if service is None:
            return None
        return await service.restore(version, since_s, key, reason, by)


def _deciding(rollout: RolloutSummary) -> set[str]:
    """The labels of the versions that decide requests now (Decision.policy_version)."""
    return {
        f"{held.policy}-v{held.version}"
        for role, held in rollout.roles.items()
        if role != SHADOW
    }
