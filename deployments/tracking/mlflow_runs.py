"""Writes the exporter's batches to MLflow as metrics of runs and as traces.

Each start of the system has one run with the metrics of all decisions; a change of the settings begins another one, as
parameters of a run cannot change. Each policy version that decides has a child run of it. Each arm has a run, too; it
is no child, since MLflow's charts have a line for each run that is no child. A tag of the run of all decisions names
the last journal row that was exported completely; it is written after all metrics up to that row, so that the export
resumes there after a crash.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from deployments.journal.ids import trace_id
from deployments.privacy.free_pages import compact
from deployments.tracking import descriptions
from deployments.tracking.exporter import ALL, ARM_PREFIX, Batch, Totals
from deployments.tracking.traces import VERSION, spans_of, trace_info
from policies.events import Feedback, Record
from policies.types import Arm

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# metrics in one call; MLflow allows 1000
BATCH_LIMIT = 900
TRACES_LIMIT = 100  # traces that are deleted in one call
# MLflow's source types by source of feedback; every other source is a program
SOURCE_TYPES = {"user": "HUMAN", "judge": "LLM_JUDGE"}
# names of tags
ROW = "journal_row"
TOTALS = "totals"
JOURNAL = "journal"
START = "start"
CONFIGURATION = "configuration"
KIND = "kind"
PARENT = "mlflow.parentRunId"
LIVE_RUN = "live_run"  # the run of the start; that of an arm is not below it, because MLflow charts only upper runs
# metric of a parent run: seconds since the start
UPTIME = "uptime_s"
# metric by which one sees when a version decided last
DECISIONS = "decisions_total"


class MlflowRuns:
    """The exporter's sink: writes batches to the runs and traces of one experiment.

    Args:
        client: an MlflowClient.
        experiment_id: id of the product's experiment.
        journal: id of the journal; row numbers are valid in one journal only.
        start: start of this system, in seconds since the epoch; a restarted tracker gets the same value.
        tags: tags of every run.
        parameters: parameters of every run.
        arms: by name, with their prices.
        former_journal: the name that earlier releases gave to the journal in their runs.
    """

    def __init__(
        self,
        client: "MlflowClient",
        experiment_id: str,
        journal: str,
        start: float,
        tags: Mapping[str, str],
        parameters: Mapping[str, str] | None = None,
        arms: Mapping[str, Arm] | None = None,
        former_journal: str = "",
    ):
        from mlflow.tracing.client import TracingClient

        self._client = client
        self._experiment_id = experiment_id
        self._journal = journal
        self._former_journal = former_journal
        self._start = f"{start:.3f}"
        self._parameters = dict(parameters or {})
        self._configuration = descriptions.digest(self._parameters)
        self._tags = dict(tags)
        self._arms = arms or {}
        self._traces = TracingClient(client.tracking_uri)
        self._runs: dict[str, str] = {}
        # versions whose run has not ended, or got points since it has
        self._open: set[str] = set()
        self._deciding: set[str] = set()  # at the last call of `finish`
        # the tags that say how far the export has come
        self._progress = {ROW: "0", TOTALS: "{}"}

    @property
    def run_id(self) -> str:
        """Id of the run of this start."""
        return self._run(ALL, time.time())

    def connect(self) -> tuple[int, dict[str, Totals]]:
        """See exporter.Sink. Also ends the runs of earlier starts and of earlier settings."""
        for run in self._search("attributes.status = 'RUNNING'", 1000):
            if not self._note_open(run):
                self._end(run)
        for journal in (self._journal, self._former_journal):
            for run in self._search(f"tags.{VERSION} = '{ALL}'", 1, journal):
                self._progress = {name: run.data.tags[name] for name in (ROW, TOTALS)}
                return int(self._progress[ROW]), json.loads(self._progress[TOTALS])
        return 0, {}

    def _note_open(self, run: "Run") -> bool:
        """Note a run that has not ended. Returns whether it is of this start and these settings."""
        tags = run.data.tags
        mine = (tags.get(START), tags.get(CONFIGURATION)) == (
            self._start,
            self._configuration,
        )
        if not mine or VERSION not in tags:
            return False
        self._runs[tags[VERSION]] = str(run.info.run_id)
        self._open.add(tags[VERSION])
        return True

    def _search(self, condition: str, most: int, journal: str = "") -> list["Run"]:
        """The newest runs of a journal, by default this one, that fulfil a condition, newest first."""
        wanted = f"tags.{JOURNAL} = '{journal or self._journal}' and {condition}"
        order = ["attributes.start_time DESC"]
        return list(
            self._client.search_runs(
                [self._experiment_id], wanted, max_results=most, order_by=order
            )
        )

    def _run(self, version: str, time_s: float) -> str:
        """Id of this start's run of a version, of an arm, or of ALL.

        Args:
            version: which one; it is created if it does not exist.
            time_s: its start time in that case.
        """
        if version not in self._runs:
            found = self._search(
                f"tags.{START} = '{self._start}' and tags.{CONFIGURATION} = '{self._configuration}' "
                f"and tags.{VERSION} = '{version}'",
                1,
            )
            run = found[0] if found else self._create(version, time_s)
            self._runs[version] = str(run.info.run_id)
        return self._runs[version]

    def _create(self, version: str, time_s: float) -> "Run":
        tags = {
            **self._tags,
            JOURNAL: self._journal,
            START: self._start,
            CONFIGURATION: self._configuration,
            VERSION: version,
        }
        name = version
        if version == ALL:
            if not self._search(f"tags.{START} = '{self._start}'", 1):
                time_s = float(self._start)
            name = f"live since {_clock(time_s)}"
            tags |= self._progress
            tags |= {KIND: "live", descriptions.NOTE: descriptions.LIVE}
        elif version.startswith(ARM_PREFIX):
            arm = version.removeprefix(ARM_PREFIX)
            name = f"size {arm}"
            tags |= {KIND: "arm", "arm": arm, descriptions.NOTE: descriptions.ARM}
        else:
            tags |= {KIND: "version", descriptions.NOTE: descriptions.VERSION}
        if version != ALL:
            tags[LIVE_RUN] = self._run(ALL, time_s)
        if tags[KIND] == "version":
            tags[PARENT] = tags[LIVE_RUN]
        run = self._client.create_run(
            self._experiment_id, int(time_s * 1000), tags, run_name=name
        )
        describe_run(self._client, run.info.run_id, self._parameters, self._journal)
        return run

    # --- ends of runs -------------------------------------------------------------------------------------------

    def finish(self, deciding: Collection[str]) -> None:
        """End the runs of the versions that decide no more, at the time of their last decision.

        Args:
            deciding: labels of the versions that decide now.
        """
        if self._deciding != set(
            deciding
        ):  # a new version has a run from its registration on
            for run in self._search("attributes.status = 'RUNNING'", 1000):
                self._note_open(run)
            self._deciding = set(deciding)
        for version in sorted(self._open - {*deciding, ALL}):
            if not version.startswith(ARM_PREFIX):
                run = self._client.get_run(self._run(version, time.time()))
                self._end(run)
                self._open.discard(version)

    def _end(self, run: "Run") -> None:
        """End a run at the last time of which it has a figure."""
        of_version = run.data.tags.get(KIND) == "version"
        end_ms = self._last_decision_ms(run) if of_version else self._last_life_ms(run)
        self._client.set_terminated(run.info.run_id, end_time=end_ms)

    def _last_decision_ms(self, run: "Run") -> int:
        """When the number of a run's decisions grew for the last time; its start if it has none."""
        history = self._client.get_metric_history(run.info.run_id, DECISIONS)
        most = max((point.value for point in history), default=0.0)
        times = [point.timestamp for point in history if point.value == most]
        return max(min(times, default=0), int(run.info.start_time))

    def _last_life_ms(self, run: "Run") -> int | None:
        """When the system of a run last reported; None if it is not known."""
        live = run.data.tags.get(LIVE_RUN)
        if live:
            run = self._client.get_run(live)
        uptime_s = run.data.metrics.get(UPTIME)
        if uptime_s is None or START not in run.data.tags:
            return None
        return int((float(run.data.tags[START]) + uptime_s) * 1000)

    # --- metrics ------------------------------------------------------------------------------------------------

    def send(self, batch: Batch) -> None:
        """See exporter.Sink. The progress is written last, so a batch that fails half-way is sent again."""
        self._send_traces(batch.traces)
        for score in batch.scores:
            self._send_score(score)
        # ALL sorts last in this order, and its run has the progress
        versions = {point.version for point in batch.points}
        for version in sorted(versions, reverse=True):
            self._send_points(version, batch)

    def _send_points(self, version: str, batch: Batch) -> None:
        from mlflow.entities import Metric, RunTag

        points = [point for point in batch.points if point.version == version]
        run_id = self._run(version, points[0].time_s)
        metrics = []
        for point in points:
            time_ms = int(point.time_s * 1000)
            for name, value in point.figures.items():
                metrics.append(Metric(name, value, time_ms, point.step))
        for start in range(0, len(metrics), BATCH_LIMIT):
            part = metrics[start : start + BATCH_LIMIT]
            self._client.log_batch(run_id, part)
        if (
            version not in self._open
        ):  # it may have ended; `finish` ends it again, also after a restart
            self._client.update_run(run_id, status="RUNNING")
            self._open.add(version)
        if version == ALL:
            self._progress = {ROW: str(batch.row), TOTALS: json.dumps(batch.totals)}
            tags = [RunTag(name, value) for name, value in self._progress.items()]
            self._client.log_batch(run_id, tags=tags)

    # --- traces -------------------------------------------------------------------------------------------------

    def _send_traces(self, records: list[Record]) -> None:
        if not records:
            return
        self._traces.log_spans(
            self._experiment_id,
            [span for record in records for span in spans_of(record, self._arms)],
        )
        for record in records:
            info = trace_info(record, self._experiment_id, self.run_id, self._arms)
            self._traces.start_trace(info)

    def erase_traces(self, trace_ids: Sequence[str]) -> None:
        """Delete traces with their spans and scores; those that MLflow does not have are ignored."""
        for start in range(0, len(trace_ids), TRACES_LIMIT):
            part = list(trace_ids[start : start + TRACES_LIMIT])
            self._traces.delete_traces(self._experiment_id, trace_ids=part)
        compact(self._traces.tracking_uri)

    def _send_score(self, score: Feedback) -> None:
        """Write a score as an assessment of its trace. Each source has one, which is updated if the score changed."""
        from mlflow.entities import AssessmentSource
        from mlflow.entities import Feedback as Assessment
        from mlflow.exceptions import MlflowException

        name = trace_id(score.decision_id)
        try:
            known = self._traces.get_trace_info(name).assessments
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return  # the decision has no outcome yet; its trace will bring the score
            raise
        source = AssessmentSource(SOURCE_TYPES.get(score.source, "CODE"), score.source)
        assessment = Assessment("score", score.score, source=source, trace_id=name)
        for earlier in known:
            if earlier.source.source_id == score.source:
                if earlier.feedback.value != score.score:
                    self._traces.update_assessment(
                        name, earlier.assessment_id, assessment
                    )
                return
        self._traces.log_assessment(name, assessment)


def describe_run(
    client: "MlflowClient", run_id: str, parameters: Mapping[str, str], journal: str
) -> None:
    """Give a new run its parameters, and the journal as the data that it is about."""
    from mlflow.entities import Dataset, DatasetInput, Param

    params = [Param(name, value) for name, value in parameters.items()]
    if params:
        client.log_batch(run_id, params=params)
    if journal:
        source = json.dumps({"journal": journal})
        data = Dataset("journal", journal[:36], "journal", source)
        client.log_inputs(run_id, [DatasetInput(data)])


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
