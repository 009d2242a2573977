"""The policy versions in MLflow's model registry: data only, and checked before they are believed.

A version is policy.json, posterior.npz and trust.json, with the hash of their bytes in a tag; other tags say where it
comes from.
"""

import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

import policies
from deployments.snapshot import Snapshot
from policies.registry import make_policy
from policies.types import Arm

MODEL = "router-policy"
HEAD = ("policy", "options", "arms", "sequence", "row", "journal", "held")  # of a Snapshot, in policy.json
TRUST = "trust.json"  # who is believed, by key; early versions lack it
EVALUATION = "evaluation"  # tag with the path of the newest report; `evaluation.…` are its main figures


def save_policy(snapshot: Snapshot, folder: Path) -> str:
    """Write a snapshot as policy.json, posterior.npz and trust.json; returns the SHA-256 of all together."""
    head = {key: getattr(snapshot, key) for key in HEAD}
    (folder / "policy.json").write_text(json.dumps(head, indent=2, sort_keys=True))
    buffer = io.BytesIO()
    np.savez(buffer, **snapshot.state)  # type: ignore[arg-type]
    (folder / "posterior.npz").write_bytes(buffer.getvalue())
    (folder / TRUST).write_text(json.dumps(snapshot.trust, separators=(",", ":")))
    return _digest(folder)


def load_policy(folder: Path, version: int, digest: str) -> Snapshot:
    """Read what `save_policy` wrote; nothing in it is executed.

    Raises:
        ValueError: the files are not those that were registered, or no such policy has such a state.
    """
    if _digest(folder) != digest:
        raise ValueError(f"policy version {version}: its files are not those that were registered")
    head = json.loads((folder / "policy.json").read_text())
    with np.load(folder / "posterior.npz", allow_pickle=False) as arrays:
        state = {name: arrays[name].astype(np.float64) for name in arrays.files}
    rest = {key: head[key] for key in ("options", "row", "journal") if key in head}  # early versions lack them
    rest |= {"held": tuple(head.get("held", ()))}
    if (folder / TRUST).exists():
        rest |= {"trust": json.loads((folder / TRUST).read_text())}
    found = Snapshot(head["policy"], tuple(head["arms"]), int(head["sequence"]), version, state, **rest)
    try:
        check(found)
    except ValueError as error:
        raise ValueError(f"policy version {version}: {error}") from None
    return found


def check(snapshot: Snapshot) -> None:
    """Whether the state is one that such a policy over such arms can have: finite, symmetric, of the right shape.

    Raises:
        ValueError: it is not; the message says what is wrong.
    """
    if len(set(snapshot.arms)) != len(snapshot.arms):
        raise ValueError(f"an arm is named twice in {', '.join(snapshot.arms)}")
    for name, array in snapshot.state.items():
        if not np.isfinite(array).all():
            raise ValueError(f"'{name}' holds numbers that are not finite")
    make_policy(snapshot.policy, [Arm(name) for name in snapshot.arms], snapshot.options).restore(snapshot.state)


def _digest(folder: Path) -> str:
    files = [folder / "policy.json", folder / "posterior.npz"]
    files += [folder / TRUST] if (folder / TRUST).exists() else []
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def code_digest() -> str:
    """SHA-256 of the code that decides and learns: all of policies/."""
    digest = hashlib.sha256()
    for path in sorted(Path(policies.__path__[0]).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class UnknownVersionError(ValueError):
    """There is no such version."""


@contextmanager
def _known(version: int) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UnknownVersionError(f"there is no version {version} of {MODEL}; `list` shows those there are") from None


class Registry:
    """The product's experiment and the policy versions, in MLflow. Blocking.

    Raises:
        MlflowException: from every method, when MLflow cannot be reached or has no such version.
    """

    def __init__(self, uri: str, experiment: str):
        # a server that is down must not hold anybody up for minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
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

    # --- versions -----------------------------------------------------------------------------------------------

    def publish(self, snapshot: Snapshot, run_id: str, tags: Mapping[str, str] | None = None) -> int:
        """Register a snapshot as the next version, with its lineage and further tags; returns its number."""
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # it exists
            self.client.create_registered_model(MODEL, description="What the router has learned: data only.")
        path = f"policy-{snapshot.sequence}-{time.time_ns()}"
        with tempfile.TemporaryDirectory() as name:
            digest = save_policy(snapshot, Path(name))
            self.client.log_artifacts(run_id, name, path)
        given = {
            "sha256": digest,
            "code": code_digest(),
            "policy": snapshot.policy,
            "options": json.dumps(snapshot.options, sort_keys=True),
            "arms": ",".join(snapshot.arms),
            "decisions": str(snapshot.sequence),
            "parent": str(snapshot.version),
            "data": f"journal {snapshot.journal}, rows 1 to {snapshot.row}",
            "row": str(snapshot.row),
            **(tags or {}),
        }
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
        return int(self.client.create_model_version(MODEL, source, run_id, tags=given).version)

    def load(self, version: int) -> Snapshot:
        """A version, checked.

        Raises:
            ValueError: see load_policy.
        """
        from mlflow.artifacts import download_artifacts

        digest = self._find(version).tags.get("sha256", "")
        with tempfile.TemporaryDirectory() as name:
            folder = download_artifacts(artifact_uri=f"models:/{MODEL}/{version}", dst_path=name)
            return load_policy(Path(folder), version, digest)

    def latest(self) -> int:
        """The number of the champion, or where nobody is, of the newest version; 0 if there is none."""
        newest = self.client.search_model_versions(f"name = '{MODEL}'", 1, order_by=["version_number DESC"])
        return self.aliases().get("champion", int(newest[0].version)) if newest else 0

    def list(self) -> list[dict[str, Any]]:
        """All versions, the newest first, as plain data."""
        found = self.client.search_model_versions(f"name = '{MODEL}'", max_results=1000)
        aliases = self.aliases()
        return [self._plain(v, aliases) for v in sorted(found, key=lambda v: -int(v.version))]

    def show(self, version: int) -> dict[str, Any]:
        """One version as plain data, with the newest report on it in full."""
        from mlflow.artifacts import load_dict

        found = self._find(version)
        plain = self._plain(found, self.aliases())
        if EVALUATION in found.tags:
            plain["evaluation"] = load_dict(f"runs:/{found.run_id}/{found.tags[EVALUATION]}")
        return plain

    def _find(self, version: int) -> Any:
        with _known(version):
            return self.client.get_model_version(MODEL, str(version))

    @staticmethod
    def _plain(found: Any, aliases: Mapping[str, int]) -> dict[str, Any]:
        version = int(found.version)
        mine = [alias for alias, number in aliases.items() if number == version]
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.creation_timestamp / 1000))
        return {"version": version, "aliases": mine, "created": created, "tags": dict(found.tags)}

    def ancestor(self, version: int, row: int) -> int:
        """The version from which this one goes on that had learned up to that row or less; else its first."""
        tags = self._find(version).tags
        while int(tags.get("row", 0)) > row and (parent := int(tags.get("parent", 0))):
            try:
                before = self._find(parent).tags
            except UnknownVersionError:  # somebody tidied up: the oldest that is left
                break
            if any(before.get(key) != tags.get(key) for key in ("policy", "options")):  # another, that gave way to it
                break
            tags, version = before, parent
        return version

    # --- what is noted on them ----------------------------------------------------------------------------------

    def attach(self, version: int, report: Mapping[str, Any]) -> None:
        """Put the report of an evaluation on a version: a JSON artefact of its run, and the main figures as tags."""
        path = f"evaluations/version-{version}-{time.time_ns()}.json"
        self.client.log_dict(self._find(version).run_id, dict(report), path)
        main = {
            key: report[key] for key in ("promote", "reason", "champion_version", "lower", "upper") if key in report
        }
        self.tag(version, {EVALUATION: path} | {f"{EVALUATION}.{key}": value for key, value in main.items()})

    def tag(self, version: int, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        with _known(version):
            for key, value in tags.items():
                self.client.set_model_version_tag(MODEL, str(version), key, str(value)[:5000])

    def aliases(self) -> dict[str, int]:
        """Versions by alias; none if nothing was registered yet."""
        from mlflow.exceptions import MlflowException

        try:
            return {alias: int(v) for alias, v in self.client.get_registered_model(MODEL).aliases.items()}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}

    def set_aliases(self, wanted: Mapping[str, int]) -> None:
        """Have exactly these roles point to these versions, where they are; other aliases are left alone."""
        there = self.aliases()
        for alias in ("champion", "challenger", "shadow"):
            version = wanted.get(alias, 0)
            if version and there.get(alias) != version:
                try:
                    with _known(version):
                        self.client.set_registered_model_alias(MODEL, alias, str(version))
                except UnknownVersionError:
                    version = 0
            if not version and alias in there:
                self.client.delete_registered_model_alias(MODEL, alias)
