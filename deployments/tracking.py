"""MLflow: the posterior as versions of a registered model, and who keeps MLflow up to date. Imports mlflow.

An actor of its own, never on the request's way: every few seconds it carries the journal on (exporter.py). With MLflow
down it tries again at the next turn; requests notice nothing. A version is data only: policy.json and posterior.npz,
with the hash of their bytes in a tag, checked before anything is loaded.
"""

import asyncio
import hashlib
import io
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from deployments import logs
from deployments.exporter import Exporter
from deployments.identity import Identity
from deployments.journal import Snapshot
from deployments.runs import Runs
from deployments.settings import GatewaySettings
from deployments.telemetry import TrackerTelemetry

MODEL = "router-policy"
EVERY_S = 5.0
log = logging.getLogger(__name__)


def save_policy(snapshot: Snapshot, folder: Path) -> str:
    """Write a snapshot as policy.json and posterior.npz; returns the SHA-256 of both together."""
    head = {"policy": snapshot.policy, "arms": list(snapshot.arms), "sequence": snapshot.sequence}
    (folder / "policy.json").write_text(json.dumps(head, indent=2, sort_keys=True))
    buffer = io.BytesIO()
    np.savez(buffer, **snapshot.state)  # type: ignore[arg-type]
    (folder / "posterior.npz").write_bytes(buffer.getvalue())
    return _digest(folder)


def load_policy(folder: Path, version: int, digest: str) -> Snapshot:
    """Read what `save_policy` wrote; nothing in it is executed.

    Raises:
        ValueError: the files are not those that were registered, or hold something else than numbers.
    """
    if _digest(folder) != digest:
        raise ValueError(f"policy version {version}: its files are not those that were registered")
    head = json.loads((folder / "policy.json").read_text())
    with np.load(folder / "posterior.npz", allow_pickle=False) as arrays:
        state = {name: arrays[name].astype(np.float64) for name in arrays.files}
    return Snapshot(head["policy"], tuple(head["arms"]), int(head["sequence"]), version, state)


def _digest(folder: Path) -> str:
    both = (folder / "policy.json").read_bytes() + (folder / "posterior.npz").read_bytes()
    return hashlib.sha256(both).hexdigest()


class Registry:
    """The policy versions in MLflow's model registry."""

    def __init__(self, uri: str, experiment: str):
        # a server that is down must not hold anybody up for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient, set_tracking_uri

        set_tracking_uri(uri)
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment = experiment

    @property
    def experiment_id(self) -> str:
        """Of the product's experiment; made if there is none."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self._experiment)
        try:
            return str(found.experiment_id if found else self.client.create_experiment(self._experiment))
        except MlflowException:  # somebody else made it in between
            return str(self.client.get_experiment_by_name(self._experiment).experiment_id)

    def start_run(self, name: str, tags: dict[str, str]) -> str:
        """Start a run in the product's experiment; returns its id."""
        return str(self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id)

    def log(self, run_id: str, metrics: dict[str, float], step: int) -> None:
        """Log metrics at a step (decisions seen)."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(run_id, [Metric(key, float(value), now, step) for key, value in metrics.items()])

    def publish(self, snapshot: Snapshot, run_id: str) -> int:
        """Register a snapshot as the next version; returns its number."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # it exists
            self.client.create_registered_model(MODEL, description="What the router has learned: data only.")
        path = f"policy-{snapshot.sequence}-{int(time.time())}"
        with tempfile.TemporaryDirectory() as name:
            digest = save_policy(snapshot, Path(name))
            self.client.log_artifacts(run_id, name, path)
        tags = {
            "sha256": digest,
            "policy": snapshot.policy,
            "arms": ",".join(snapshot.arms),
            "decisions": str(snapshot.sequence),
            "parent": str(snapshot.version),
        }
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
        version = self.client.create_model_version(MODEL, source, run_id, tags=tags)
        return int(version.version)

    def latest(self) -> Snapshot | None:
        """The newest version, checked; None if there is none."""
        from mlflow.artifacts import download_artifacts

        versions = self.client.search_model_versions(f"name = '{MODEL}'")
        if not versions:
            return None
        newest = max(versions, key=lambda v: int(v.version))
        with tempfile.TemporaryDirectory() as name:
            folder = download_artifacts(artifact_uri=f"models:/{MODEL}/{newest.version}", dst_path=name)
            return load_policy(Path(folder), int(newest.version), newest.tags.get("sha256", ""))


class Tracker:
    """Carries the router's figures and versions to MLflow.

    Args:
        settings: of the gateway.
        router: handle of the router actor.
        start: of this system, in seconds since the epoch; a tracker that died comes back with the same.
    """

    def __init__(self, settings: GatewaySettings, router: Any, start: float):
        logs.configure("tracker")
        self._settings, self._router, self._telemetry = settings, router, TrackerTelemetry()
        self._registry: Registry | None = None
        self._start = start
        self._run_id = ""
        self._published_at, self._published_sequence = time.time(), -1
        self._turning: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> bool:
        """Begin to track, once; False if no MLflow is configured."""
        if self._settings.mlflow_uri is None:
            return False
        if self._turning is None:
            self._turning = asyncio.create_task(self._turn())
        return True

    async def _turn(self) -> None:
        while True:
            try:
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
                newest = await asyncio.to_thread(registry.latest)
                if newest is not None and await self._router.adopt.remote(newest):
                    log.info("the router starts from policy version %d", newest.version)
                await self._export_to(registry)
                self._registry = registry
            return self._registry

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
        await self._exporter.turn(time.time())
        summary = await self._router.summary.remote()
        metrics = {f"count/{key}": value for key, value in summary["counts"].items()}
        metrics |= {f"profiler/{key}": value for key, value in summary["profiler"].items()}
        for arm, model in summary["models"].items():
            for key in ("expected_quality", "accuracy", "tpot_s", "in_flight"):
                metrics[f"{key}/{arm}"] = model[key]
        await asyncio.to_thread(registry.log, self._run_id, metrics, summary["decisions"])
        if time.time() - self._published_at >= self._settings.publish_every_s:
            self._published_at = time.time()
            if summary["decisions"] != self._published_sequence:
                await self.publish()

    async def publish(self) -> int | None:
        """Register the router's present state as a version; None if no MLflow is configured."""
        if not await self.start():
            return None
        registry = await self._connect()
        snapshot, _, _ = await self._router.snapshot.remote()
        version = await asyncio.to_thread(registry.publish, snapshot, self._run_id)
        self._published_sequence = snapshot.sequence
        await self._router.published.remote(version)
        return version
