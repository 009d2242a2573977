"""What the router does, carried to MLflow: figures (exporter.py), and what it learned as versions (versions.py).

An actor of its own, never on the request's way: every few seconds it carries the journal on. With MLflow down it tries
again at the next turn; requests notice nothing.
"""

import asyncio
import logging
import time
from typing import Any

from deployments import logs
from deployments.exporter import Exporter
from deployments.identity import Identity
from deployments.promotion import Promotions
from deployments.runs import Runs
from deployments.settings import GatewaySettings
from deployments.telemetry import TrackerTelemetry
from deployments.versions import Registry

EVERY_S = 5.0
log = logging.getLogger(__name__)


class Tracker:
    """Carries the router's figures and versions to MLflow.

    Args:
        settings: of the gateway, when this actor was made; the router knows if there are others by now.
        router: handle of the router actor.
        start: of this system, in seconds since the epoch; a tracker that died comes back with the same.
    """

    def __init__(self, settings: GatewaySettings, router: Any, start: float):
        logs.configure("tracker")
        self._settings, self._router, self._telemetry = settings, router, TrackerTelemetry()
        self._registry: Registry | None = None
        self._start, self._run_id = start, ""
        self._published_at, self._published_sequence = time.time(), -1
        self._turning: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> bool:
        """Begin to track, once; False if no MLflow is configured."""
        await self._heed()
        if self._settings.mlflow_uri is None:
            return False
        if self._turning is None:
            self._turning = asyncio.create_task(self._turn())
        return True

    async def _heed(self) -> None:
        """Take over the settings of today; the connection is made anew with them, and goes on where this one was."""
        try:
            settings = await self._router.settings.remote()
        except Exception as error:
            log.warning("the router cannot be asked for the settings (%s); going on with those there are", error)
            return
        if settings != self._settings:
            async with self._lock:
                self._settings, self._registry = settings, None

    async def _turn(self) -> None:
        while True:
            try:
                await self._heed()
                if self._settings.mlflow_uri is not None:
                    await self._track()
                self._telemetry.turned(time.time(), True)
            except Exception as error:
                self._telemetry.turned(time.time(), False)
                log.warning("MLflow cannot be reached now (%s: %s); trying again", type(error).__name__, error)
            await asyncio.sleep(EVERY_S)

    async def _connect(self) -> Registry:
        """The registry; the first time, a router that knows nothing yet is given the newest version."""
        async with self._lock:
            if self._registry is None:
                uri = self._settings.mlflow_uri
                assert uri is not None
                registry = await asyncio.to_thread(Registry, uri, self._settings.experiment)
                await self._offer(registry)
                await self._export_to(registry)
                self._promotions = Promotions(self._settings, registry, self._router, self._run_id)
                self._registry = registry
            return self._registry

    async def _offer(self, registry: Registry) -> None:
        """Offer the newest version to the router, which takes it if it knows nothing; a damaged one is left alone."""
        if not (version := await asyncio.to_thread(registry.latest)):
            return
        try:
            newest = await asyncio.to_thread(registry.load, version)
        except Exception as error:  # of whoever keeps the files, too
            log.warning("policy version %d is not offered to the router: %s", version, error)
            return
        if await self._router.adopt.remote(newest):
            log.info("the router starts from policy version %d", version)

    async def _export_to(self, registry: Registry) -> None:
        journal = Identity(await self._router.salt.remote()).hash("journal")
        tags = {"policy": self._settings.policy.name}
        experiment_id = await asyncio.to_thread(lambda: registry.experiment_id)
        runs = Runs(registry.client, experiment_id, journal, self._start, tags)
        self._exporter = Exporter(self._router, runs, EVERY_S, self._settings.trace_share)
        await self._exporter.begin()
        self._run_id = await asyncio.to_thread(lambda: runs.run_id)

    async def _track(self) -> None:
        registry = await self._connect()
        summary = await self._router.summary.remote()
        try:
            await self._exporter.turn(time.time(), {*summary["quarantined"], *summary["in_doubt"]})
        finally:  # versions need not wait for figures
            await self._carry(registry, summary)

    async def _carry(self, registry: Registry, summary: dict[str, Any]) -> None:
        metrics = {f"profiler/{key}": value for key, value in summary["profiler"].items()}
        for arm, model in summary["models"].items():
            metrics[f"in_flight/{arm}"] = model["in_flight"]
            for key in ("expected_quality", "accuracy", "tpot_s"):
                if model[key]:  # 0 is what nothing is known of, as after a restart
                    metrics[f"{key}/{arm}"] = model[key]
        await asyncio.to_thread(registry.log, self._run_id, metrics, summary["decisions"])
        if time.time() - self._published_at >= self._settings.publish_every_s:
            self._published_at = time.time()
            if summary["decisions"] != self._published_sequence:
                await self._promotions.publish()
                self._published_sequence = summary["decisions"]
        await self._promotions.mirror()

    async def operate(self, verb: str, options: dict[str, Any]) -> Any:
        """Do something with policy versions: any public method of promotion.Promotions; None without MLflow."""
        if not await self.start():
            return None
        await self._connect()
        return await getattr(self._promotions, verb)(**options)
