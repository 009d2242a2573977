"""The policy versions in MLflow's model registry: data only, and checked before they are believed.

A version is policy.json and posterior.npz, with the hash of their bytes in a tag.
"""

import hashlib
import io
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from deployments.journal import Snapshot

MODEL = "router-policy"


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

    def start_run(self, name: str, tags: dict[str, str]) -> str:
        """Start a run in the product's experiment; returns its id."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self._experiment)
        try:
            experiment = found.experiment_id if found else self.client.create_experiment(self._experiment)
        except MlflowException:  # somebody else made it in between
            experiment = self.client.get_experiment_by_name(self._experiment).experiment_id
        return str(self.client.create_run(experiment, run_name=name, tags=tags).info.run_id)

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
