"""Writes the exporter's batches to MLflow as metrics of runs and as traces.

Each start of the system has one run with the metrics of all decisions. Each policy version that decides has a child
run of it. A tag of the parent run names the last journal row that was exported completely; it is written after all
metrics up to that row, so that the export resumes there after a crash. A trace's id is derived from the id of its
decision, so that a score finds its trace without a list of the sampled decisions.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.journal.ids import trace_id
from deployments.tracking.exporter import ALL, Batch, Totals
from policies.events import Decision, Feedback, Record
from policies.explain import explain

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run, Span, TraceInfo
    from opentelemetry.trace import SpanContext

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
VERSION = "policy_version"


def span_id(decision_id: str, number: int) -> int:
    """Id of a decision's span with this number, derived from the decision's id."""
    return int.from_bytes(
        blake2b(f"{decision_id}/{number}".encode(), digest_size=8).digest()
    )


class MlflowRuns:
    """The exporter's sink: writes batches to the runs and traces of one experiment.

    Args:
        client: an MlflowClient.
        experiment_id: id of the product's experiment.
        journal: name of the journal; row numbers are valid in one journal only.
        start: start of this system, in seconds since the epoch; a restarted tracker gets the same value.
        tags: tags of every run.
    """

    def __init__(
        self,
        client: "MlflowClient",
        experiment_id: str,
        journal: str,
        start: float,
        tags: dict[str, str],
    ):
        from mlflow.tracing.client import TracingClient

        self._client = client
        self._experiment_id = experiment_id
        self._journal = journal
        self._start = f"{start:.3f}"
        self._tags = tags | {"kind": "live"}
        self._traces = TracingClient(client.tracking_uri)
        self._runs: dict[str, str] = {}
        # the tags that say how far the export has come
        self._progress = {ROW: "0", TOTALS: "{}"}

    @property
    def run_id(self) -> str:
        """Id of the run of this start."""
        return self._run(ALL)

    def connect(self) -> tuple[int, dict[str, Totals]]:
        """See exporter.Sink. Also marks the runs of earlier starts as finished."""
        for run in self._search("attributes.status = 'RUNNING'", 1000):
            if run.data.tags.get(START) != self._start:
                self._client.set_terminated(run.info.run_id)
        for run in self._search(f"tags.{VERSION} = '{ALL}'", 1):
            self._progress = {name: run.data.tags[name] for name in (ROW, TOTALS)}
        return int(self._progress[ROW]), json.loads(self._progress[TOTALS])

    def _search(self, condition: str, most: int) -> list["Run"]:
        """The newest runs of this journal that fulfil a condition, newest first."""
        wanted = f"tags.{JOURNAL} = '{self._journal}' and {condition}"
        order = ["attributes.start_time DESC"]
        return list(
            self._client.search_runs(
                [self._experiment_id], wanted, max_results=most, order_by=order
            )
        )

    def _run(self, version: str) -> str:
        """Id of this start's run of a version, or of ALL; the run is created if it does not exist."""
        if version not in self._runs:
            found = self._search(
                f"tags.{START} = '{self._start}' and tags.{VERSION} = '{version}'", 1
            )
            run = found[0] if found else self._create(version)
            self._runs[version] = str(run.info.run_id)
        return self._runs[version]

    def _create(self, version: str) -> "Run":
        tags = {
            **self._tags,
            JOURNAL: self._journal,
            START: self._start,
            VERSION: version,
        }
        if version == ALL:
            tags |= self._progress
        else:
            tags["mlflow.parentRunId"] = self._run(ALL)
        name = version or f"live since {_clock(float(self._start))}"
        return self._client.create_run(self._experiment_id, run_name=name, tags=tags)

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
        metrics = []
        for point in points:
            time_ms = int(point.time_s * 1000)
            for name, value in point.figures.items():
                metrics.append(Metric(name, value, time_ms, point.step))
        for start in range(0, len(metrics), BATCH_LIMIT):
            part = metrics[start : start + BATCH_LIMIT]
            self._client.log_batch(self._run(version), part)
        if version == ALL:
            self._progress = {ROW: str(batch.row), TOTALS: json.dumps(batch.totals)}
            tags = [RunTag(name, value) for name, value in self._progress.items()]
            self._client.log_batch(self._run(ALL), tags=tags)

    # --- traces -------------------------------------------------------------------------------------------------

    def _send_traces(self, records: list[Record]) -> None:
        if not records:
            return
        self._traces.log_spans(
            self._experiment_id,
            [span for record in records for span in self._spans(record)],
        )
        for record in records:
            self._traces.start_trace(self._info(record))

    def erase_traces(self, trace_ids: Sequence[str]) -> None:
        """Delete traces with their spans and scores; those that MLflow does not have are ignored."""
        for start in range(0, len(trace_ids), TRACES_LIMIT):
            part = list(trace_ids[start : start + TRACES_LIMIT])
            self._traces.delete_traces(self._experiment_id, trace_ids=part)
        compact(self._traces.tracking_uri)

    def _info(self, record: Record) -> "TraceInfo":
        from mlflow.entities import TraceInfo, TraceLocation, TraceState

        decision = record.decision
        outcome = record.outcome
        assert outcome is not None
        ok = outcome.status in ("ok", "disconnected")
        return TraceInfo(
            trace_id=trace_id(decision.id),
            trace_location=TraceLocation.from_experiment_id(self._experiment_id),
            request_time=int(decision.time_s * 1000),
            state=TraceState.OK if ok else TraceState.ERROR,
            request_preview=f"{decision.profile.kind}, {decision.profile.prompt_tokens} tokens",
            response_preview=f"{decision.arm}: {outcome.status}, {outcome.output_tokens} tokens",
            client_request_id=decision.id,
            execution_duration=int(outcome.latency_s * 1000),
            trace_metadata={"mlflow.sourceRun": self._run(ALL)},
            tags={
                "mlflow.traceName": "request",
                "arm": decision.arm,
                VERSION: decision.policy_version,
            },
        )

    def _spans(self, record: Record) -> list["Span"]:
        """The spans of a request, of its decision and of its answer, from the journal. They contain no text."""
        decision = record.decision
        outcome = record.outcome
        assert outcome is not None
        begin = int(decision.time_s * 1e9)
        first = begin + int(outcome.ttft_s * 1e9)
        end = begin + int(outcome.latency_s * 1e9)
        explanation = explain(record)
        explanation["outcome"].pop("answer")  # it may be the answer's text
        usage = {
            "input_tokens": outcome.prompt_tokens,
            "output_tokens": outcome.output_tokens,
        }
        usage["total_tokens"] = sum(usage.values())
        answer: dict[str, object] = {
            "finish_reason": outcome.finish_reason,
            "status": outcome.status,
            "flaw": outcome.flaw,
        }
        seconds = {
            "ttft_s": outcome.ttft_s,
            "latency_s": outcome.latency_s,
            "cost_usd": outcome.cost_usd,
        }
        spans = [
            _span(
                decision,
                0,
                "request",
                "CHAIN",
                begin,
                end,
                explanation,
                answer | seconds,
            ),
            _span(
                decision,
                1,
                "decide",
                "TASK",
                begin,
                begin,
                {"kind": decision.profile.kind},
                {"arm": decision.arm},
            ),
            _span(
                decision,
                2,
                "answer",
                "LLM",
                begin,
                end,
                {"arm": decision.arm},
                answer,
                usage,
            ),
        ]
        if first != begin:
            spans.append(
                _span(decision, 3, "first token", "TASK", begin, first, {}, {})
            )
        return spans

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


def _span(
    decision: Decision,
    number: int,
    name: str,
    kind: str,
    begin: int,
    end: int,
    inputs: Mapping[str, object],
    outputs: Mapping[str, object],
    usage: Mapping[str, int] | None = None,
) -> "Span":
    """One span for MLflow. Times are nanoseconds since the epoch; the span with number 0 is the root."""
    from mlflow.entities.span import create_mlflow_span
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

    def context(span_number: int) -> "SpanContext":
        trace = int(trace_id(decision.id).removeprefix("tr-"), 16)
        return SpanContext(
            trace, span_id(decision.id, span_number), False, TraceFlags(1)
        )

    attributes: dict[str, object] = {
        "mlflow.traceRequestId": trace_id(decision.id),
        "mlflow.spanType": kind,
    }
    attributes |= {"mlflow.spanInputs": inputs, "mlflow.spanOutputs": outputs}
    if usage:
        attributes["mlflow.chat.tokenUsage"] = usage
    span = ReadableSpan(
        name=name,
        context=context(number),
        parent=context(0) if number else None,
        resource=Resource.get_empty(),
        attributes={key: json.dumps(value) for key, value in attributes.items()},
        start_time=begin,
        end_time=end,
        status=Status(StatusCode.OK),
    )
    return create_mlflow_span(span, trace_id(decision.id), kind)


def compact(uri: str) -> None:
    """Rewrite MLflow's database if it is a SQLite file here, so that its free pages hold nothing that was deleted."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
        database.execute("VACUUM")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
