"""The policy versions in MLflow's model registry: pure data, validated when it is loaded (version_files.py).

One tag has the SHA-256 of a version's files, and one the journal's signature of it: write access to MLflow suffices to
change the files and the first tag, but not to make the second. The other tags name the version's parent, the code and
the journal rows that it learned from. Each version has a run of its own, in which the metrics of its decisions are; the
files are the artefact `policy` of that run, in the form of an MLflow model (deciding_model.py).
"""

import hmac
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.errors import UnknownVersionError
from deployments.journal.snapshot import Snapshot
from deployments.tracking import deciding_model, descriptions
from deployments.tracking.mlflow_runs import (
    CONFIGURATION,
    JOURNAL,
    KIND,
    PARENT,
    START,
    describe_run,
)
from deployments.tracking.traces import VERSION
from deployments.tracking.version_files import check_files, load_policy, save_policy

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

MODEL = "router-policy"
# tag with the path of the newest report; tags `evaluation.…` have the report's main figures
EVALUATION = "evaluation"
# fields of a report that become tags
MAIN_FIGURES = (
    "promote",
    "reason",
    "champion_version",
    "lower",
    "upper",
    "decisions",
)
GAIN = "gain"  # further figure, the estimate between `lower` and `upper`
SIGNATURE = "signature"
ROLE_ALIASES = ("champion", "challenger", "shadow")
ARTEFACT = "policy"  # of a version's run
FILES = "data/policy"  # folder of the version's files in the artefact; those of earlier releases are the artefact
log = logging.getLogger(__name__)
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
SINCE = "_since"  # ends the names of the tags that say when a version was given a role
KEEP_ROLES_DAYS = 30.0  # a version that was given a role so lately is not removed
MOST_REMOVED = 20  # versions at a time; each takes some calls of MLflow


def _was_used(tags: Mapping[str, str]) -> bool:
    """Whether a version has a report, or was given a role lately."""
    since = time.strftime(
        TIME_FORMAT, time.gmtime(time.time() - KEEP_ROLES_DAYS * 86_400)
    )
    given = [time_ for name, time_ in tags.items() if name.endswith(SINCE)]
    return EVALUATION in tags or any(time_ >= since for time_ in given)


def _save_model(folder: Path, files: Path, digest: str, signature: str) -> None:
    """Write a version's files as an MLflow model that decides on a DataFrame. No code is among them."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    def schema(columns: Mapping[str, str], required: bool) -> Schema:
        return Schema([ColSpec(kind, name, required) for name, kind in columns.items()])

    mlflow.pyfunc.save_model(
        folder,
        loader_module=deciding_model.__name__,
        data_path=str(files),
        signature=ModelSignature(
            schema(deciding_model.INPUTS, False), schema(deciding_model.OUTPUTS, True)
        ),
        input_example=deciding_model.example(),
        pip_requirements=[],
        metadata={"sha256": digest, SIGNATURE: signature},
    )


@contextmanager
def _reporting_unknown(version: int) -> Iterator[None]:
    """Turn MLflow's error for a missing version into an UnknownVersionError."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UnknownVersionError(
            f"there is no version {version} of {MODEL}; `list` shows those there are"
        ) from None


class PolicyRegistry:
    """Accesses the product's experiment and the policy versions in MLflow. All methods block.

    Args:
        uri: MLflow's tracking and registry URI.
        experiment: name of the product's experiment.
        sign: the journal's signature of a text (IdFactory.signature). Without it versions are neither signed nor
            checked for a signature.
        require_signature: refuse to load a version that this journal has not signed.

    Raises:
        MlflowException: by every method, when MLflow cannot be reached.
        UnknownVersionError: by the methods that take a version, when there is no such version.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        sign: Callable[[str], str] | None = None,
        require_signature: bool = True,
    ):
        # without these limits a call to an unreachable server takes minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from mlflow import MlflowClient, set_registry_uri, set_tracking_uri

        # of the process, because URIs like models:/NAME/VERSION name no server
        set_tracking_uri(uri)
        set_registry_uri(uri)
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment = experiment
        self._sign = sign
        self._require_signature = require_signature

    @property
    def experiment_id(self) -> str:
        """Id of the product's experiment, which is created if it does not exist."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self.client.create_experiment(self._experiment))
            except MlflowException:  # another process has created it meanwhile
                found = self.client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id)

    def describe(self) -> None:
        """Give the experiment and the registered model their descriptions, if they have others."""
        experiment = self.client.get_experiment(self.experiment_id)
        if experiment.tags.get(descriptions.NOTE) != descriptions.EXPERIMENT:
            self.client.set_experiment_tag(
                experiment.experiment_id, descriptions.NOTE, descriptions.EXPERIMENT
            )
        self._create_model()
        if self.client.get_registered_model(MODEL).description != descriptions.MODEL:
            self.client.update_registered_model(MODEL, descriptions.MODEL)

    def start_run(
        self,
        name: str,
        tags: Mapping[str, str],
        parameters: Mapping[str, str] | None = None,
        time_s: float | None = None,
    ) -> str:
        """Start a run in the product's experiment; returns its id.

        Args:
            name: its name.
            tags: of the run.
            parameters: of the run.
            time_s: when it started, in seconds since the epoch; by default now.
        """
        start_ms = int(1000 * (time.time() if time_s is None else time_s))
        run = self.client.create_run(self.experiment_id, start_ms, dict(tags), name)
        describe_run(self.client, run.info.run_id, parameters or {}, "")
        return str(run.info.run_id)

    def log(self, run_id: str, metrics: dict[str, float], step: int) -> None:
        """Log metrics to a run; `step` is the number of decisions."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self.client.log_batch(run_id, batch)

    # --- versions -----------------------------------------------------------------------------------------------

    def publish(
        self,
        snapshot: Snapshot,
        run_id: str,
        tags: Mapping[str, str] | None = None,
        context: Mapping[str, object] | None = None,
    ) -> int:
        """Register a snapshot as the next version, tagged with its lineage; returns its number.

        Args:
            snapshot: what was learned.
            run_id: the run of the system; the version gets a run below it.
            tags: further tags of the version.
            context: what a reader needs to decide with the version; without it the version is for the router only.
        """
        self._create_model()
        run = self._start_version_run(run_id, snapshot)
        with tempfile.TemporaryDirectory() as name:
            files = Path(name) / Path(FILES).name
            files.mkdir()
            digest = save_policy(snapshot, files, context)
            signature = self._sign(digest) if self._sign is not None else ""
            model = Path(name) / "model"
            _save_model(model, files, digest, signature)
            self.client.log_artifacts(run.info.run_id, str(model), ARTEFACT)
        lineage = {
            "sha256": digest,
            "code": descriptions.code_digest(),
            "policy": snapshot.policy,
            "options": json.dumps(snapshot.options, sort_keys=True),
            "arms": ",".join(snapshot.arms),
            "decisions": str(snapshot.sequence),
            "parent": str(snapshot.version),
            JOURNAL: snapshot.journal,
            "data": f"journal {snapshot.journal}, rows 1 to {snapshot.row}",
            "row": str(snapshot.row),
            **(tags or {}),
        }
        if signature:
            lineage[SIGNATURE] = signature
        made = self.client.create_model_version(
            MODEL,
            f"{run.info.artifact_uri}/{ARTEFACT}",
            run.info.run_id,
            lineage,
            description=descriptions.version_text(snapshot),
        )
        label = f"{snapshot.policy}-v{made.version}"
        self.client.set_tag(run.info.run_id, VERSION, label)
        self.client.update_run(run.info.run_id, name=label)
        return int(made.version)

    def _create_model(self) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # it exists
            self.client.create_registered_model(MODEL, description=descriptions.MODEL)

    def _start_version_run(self, parent_id: str, snapshot: Snapshot) -> "Run":
        """Start the run of a version below that of the system. Its label is known only after the registration."""
        parent = self.client.get_run(parent_id)
        tags = {
            name: parent.data.tags[name]
            for name in (JOURNAL, START, CONFIGURATION)
            if name in parent.data.tags
        }
        tags |= {PARENT: parent_id, KIND: "version", "policy": snapshot.policy}
        tags[descriptions.NOTE] = descriptions.VERSION
        name = f"{snapshot.policy}, not registered yet"
        run = self.client.create_run(
            parent.info.experiment_id, tags=tags, run_name=name
        )
        describe_run(
            self.client, run.info.run_id, parent.data.params, tags.get(JOURNAL, "")
        )
        return run

    def load(self, version: int) -> Snapshot:
        """Check the signature and the size of a version, download it and check its files.

        Raises:
            ValueError: another journal has signed it, or none; or see version_files.py.
        """
        from mlflow.artifacts import download_artifacts, list_artifacts

        tags = self._find(version).tags
        digest = tags.get("sha256", "")
        self._check_signature(version, digest, tags.get(SIGNATURE, ""))
        uri = f"models:/{MODEL}/{version}"
        found = list_artifacts(artifact_uri=uri)
        if any(Path(file.path).name == "MLmodel" for file in found):
            uri = f"{uri}/{FILES}"
            found = list_artifacts(artifact_uri=uri)
        check_files(
            version, {Path(file.path).name: file.file_size or 0 for file in found}
        )
        with tempfile.TemporaryDirectory() as name:
            folder = download_artifacts(artifact_uri=uri, dst_path=name)
            return load_policy(Path(folder), version, digest)

    def _check_signature(self, version: int, digest: str, signature: str) -> None:
        if self._sign is None or not self._require_signature:
            return
        if not hmac.compare_digest(self._sign(digest).encode(), signature.encode()):
            raise ValueError(
                f"policy version {version} was not registered by this journal, so its files may be another's; to load "
                "it all the same, set unsigned_versions: load in the gateway's args"
            )

    def latest(self) -> int:
        """The champion's version, or the newest one if no version is champion; 0 if there is no version."""
        newest = self.client.search_model_versions(
            f"name = '{MODEL}'", 1, order_by=["version_number DESC"]
        )
        if not newest:
            return 0
        return self.aliases().get("champion", int(newest[0].version))

    def list(self) -> list[dict[str, object]]:
        """All versions as plain data, newest first."""
        found = self.client.search_model_versions(f"name = '{MODEL}'", max_results=1000)
        aliases = self.aliases()
        newest_first = sorted(found, key=lambda version: -int(version.version))
        return [self._as_dict(version, aliases) for version in newest_first]

    def show(self, version: int) -> dict[str, object]:
        """One version as plain data, with its newest report in full."""
        from mlflow.artifacts import load_dict

        found = self._find(version)
        plain = self._as_dict(found, self.aliases())
        if EVALUATION in found.tags:
            plain["evaluation"] = load_dict(
                f"runs:/{found.run_id}/{found.tags[EVALUATION]}"
            )
        return plain

    def _find(self, version: int) -> "ModelVersion":
        with _reporting_unknown(version):
            return self.client.get_model_version(MODEL, str(version))

    @staticmethod
    def _as_dict(
        found: "ModelVersion", aliases: Mapping[str, int]
    ) -> dict[str, object]:
        version = int(found.version)
        mine = [alias for alias, number in aliases.items() if number == version]
        created = time.strftime(
            TIME_FORMAT, time.gmtime(found.creation_timestamp / 1000)
        )
        return {
            "version": version,
            "aliases": mine,
            "created": created,
            "description": found.description or "",
            "tags": dict(found.tags),
        }

    def is_ancestor(self, version: int, descendant: int) -> bool:
        """Whether a version is an earlier state of another one, with the same policy and options all the way."""
        tags: Mapping[str, str] | None = None
        parent = descendant
        while parent:
            try:
                found = self._find(parent).tags
            except UnknownVersionError:  # an operator has deleted it
                return False
            if tags is not None and any(
                found.get(name) != tags.get(name) for name in ("policy", "options")
            ):
                return False
            if parent == version:
                return True
            tags = found
            parent = int(tags.get("parent", 0))
        return False

    def ancestor(self, version: int, row: int) -> int:
        """The newest of a version and its ancestors that had learned up to `row` or less.

        If there is none, the oldest ancestor that still exists and has the same policy and options.
        """
        tags = self._find(version).tags
        while int(tags.get("row", 0)) > row:
            parent = int(tags.get("parent", 0))
            if not parent:
                break
            try:
                parent_tags = self._find(parent).tags
            except UnknownVersionError:  # an operator has deleted it
                break
            same_policy = parent_tags.get("policy") == tags.get("policy")
            if not same_policy or parent_tags.get("options") != tags.get("options"):
                break
            tags = parent_tags
            version = parent
        return version

    def prune(self, keep: int, in_use: Collection[int]) -> tuple[int, ...]:
        """Remove the oldest versions beyond the newest `keep`, with their files; returns their numbers.

        A version stays if it has an alias or a report, or was given a role in the last KEEP_ROLES_DAYS.

        Args:
            keep: number of versions that stay in any case.
            in_use: versions that the router works with.
        """
        found = self.client.search_model_versions(f"name = '{MODEL}'", 10_000)
        newest_first = sorted(found, key=lambda version: -int(version.version))
        kept = {*in_use, *self.aliases().values()}
        removed: dict[int, None] = {}  # in order
        for version in reversed(newest_first[keep:]):
            number = int(version.version)
            if number in kept or _was_used(version.tags):
                continue
            if len(removed) == MOST_REMOVED:
                break
            self._remove_files(version)
            with suppress(UnknownVersionError), _reporting_unknown(number):
                self.client.delete_model_version(MODEL, str(number))
            removed[number] = None
        return tuple(removed)

    def _remove_files(self, version: "ModelVersion") -> None:
        """Remove the files of a version; those in a store that cannot remove files stay there."""
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.artifact_repository_registry import (
            get_artifact_repository,
        )

        try:
            root = self.client.get_run(version.run_id).info.artifact_uri
            folder = str(version.source).removeprefix(f"{root}/")
            if folder and folder != version.source and ".." not in folder:
                get_artifact_repository(root).delete_artifacts(folder)
        except (MlflowException, NotImplementedError, OSError) as error:
            log.warning(
                "the files of policy version %s stay: %s", version.version, error
            )

    # --- reports, tags and aliases ------------------------------------------------------------------------------

    def attach_report(self, version: int, report: Mapping[str, object]) -> None:
        """Attach an evaluation report to a version: in full as an artefact of its run, the main figures as tags."""
        path = f"evaluations/version-{version}-{time.time_ns()}.json"
        self.client.log_dict(self._find(version).run_id, dict(report), path)
        tags: dict[str, object] = {EVALUATION: path}
        for key in MAIN_FIGURES:
            if key in report:
                tags[f"{EVALUATION}.{key}"] = report[key]
        difference = report.get("difference")
        if isinstance(difference, Mapping) and difference.get("value") is not None:
            tags[f"{EVALUATION}.{GAIN}"] = difference["value"]
        self.tag(version, tags)

    def tag(self, version: int, tags: Mapping[str, object]) -> None:
        """Set tags of a version."""
        with _reporting_unknown(version):
            for key, value in tags.items():
                self.client.set_model_version_tag(
                    MODEL, str(version), key, str(value)[:5000]
                )

    def aliases(self) -> dict[str, int]:
        """The version of each alias; empty if no version was registered yet."""
        from mlflow.exceptions import MlflowException

        try:
            aliases = self.client.get_registered_model(MODEL).aliases
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}
        return {alias: int(version) for alias, version in aliases.items()}

    def set_aliases(self, wanted: Mapping[str, int]) -> None:
        """Set the aliases of the roles to these versions, and delete those of all other roles.

        An alias that is no role is not changed. A role whose version no longer exists loses its alias.
        """
        current = self.aliases()
        for alias in ROLE_ALIASES:
            version = wanted.get(alias, 0)
            if version and current.get(alias) != version:
                try:
                    with _reporting_unknown(version):
                        self.client.set_registered_model_alias(
                            MODEL, alias, str(version)
                        )
                except UnknownVersionError:
                    version = 0
            if not version and alias in current:
                self.client.delete_registered_model_alias(MODEL, alias)
