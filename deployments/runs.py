"""MLflow's runs and traces: where the exporter's figures go. With versions.py the only file that imports mlflow.

One run for each start of the system holds the figures of all decisions, unbroken; under it is one for each policy
version that decided. How far the journal was carried stands in a tag, written when all figures up to there are in,
so that whoever comes after a crash goes on from there. A trace's id is made from its decision's: feedback finds it
without a list of what was sampled.
"""

import json
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

from deployments.exporter import ALL, Batch, Totals
from policies.explain import explain
from policies.ledger import Record
from policies.types import Decision, Feedback

LIMIT = 900  # metrics in one call, of MLflow's 1000
SOURCES = {"user": "HUMAN", "judge": "LLM_JUDGE"}  # of feedback; all others are programs
ROW, TOTALS, JOURNAL, START = "journal_row", "totals", "journal", "start"  # tags
VERSION = "policy_version"


def trace_id(decision_id: str) -> str:
    """The same for the same decision."""
    return "tr-" + blake2b(decision_id.encode(), digest_size=16).hexdigest()


def span_id(decision_id: str, number: int) -> int:
    """Of a span of its trace."""
    return int.from_bytes(blake2b(f"{decision_id}/{number}".encode(), digest_size=8).digest())


class Runs:
    """The exporter's sink.

    Args:
        client: an MlflowClient.
        experiment_id: of the product's experiment.
        journal: name of the journal: row numbers mean nothing in another.
        start: when this system was started, in seconds since the epoch; the same after a restart of the tracker.
        tags: of all runs.
    """

    def __init__(self, client: Any, experiment_id: str, journal: str, start: float, tags: dict[str, str]):
        from mlflow.tracing.client import TracingClient

        self._client, self._experiment_id, self._journal = client, experiment_id, journal
        self._start, self._tags = f"{start:.3f}", tags | {"kind": "live"}
        self._traces = TracingClient(client.tracking_uri)
        self._runs: dict[str, str] = {}
        self._told = {ROW: "0", TOTALS: "{}"}

    @property
    def run_id(self) -> str:
        """The run of this start."""
        return self._run(ALL)

    def connect(self) -> tuple[int, dict[str, Totals]]:
        """See exporter.Sink; runs of earlier starts are marked as finished."""
        for run in self._search("attributes.status = 'RUNNING'", 1000):
            if run.data.tags.get(START) != self._start:
                self._client.set_terminated(run.info.run_id)
        for run in self._search(f"tags.{VERSION} = '{ALL}'", 1):
            self._told = {name: run.data.tags[name] for name in (ROW, TOTALS)}
        return int(self._told[ROW]), json.loads(self._told[TOTALS])

    def _search(self, wanted: str, most: int) -> list[Any]:
        """Live runs of this journal, newest first."""
        wanted, order = f"tags.{JOURNAL} = '{self._journal}' and {wanted}", ["attributes.start_time DESC"]
        return list(self._client.search_runs([self._experiment_id], wanted, max_results=most, order_by=order))

    def _run(self, version: str) -> str:
        """The id of a run of this start; made if there is none."""
        if version not in self._runs:
            found = self._search(f"tags.{START} = '{self._start}' and tags.{VERSION} = '{version}'", 1)
            self._runs[version] = str((found or [self._create(version)])[0].info.run_id)
        return self._runs[version]

    def _create(self, version: str) -> Any:
        tags = {**self._tags, JOURNAL: self._journal, START: self._start, VERSION: version}
        tags |= self._told if version == ALL else {"mlflow.parentRunId": self._run(ALL)}
        name = version or f"live since {_clock(float(self._start))}"
        return self._client.create_run(self._experiment_id, run_name=name, tags=tags)

    # --- figures ------------------------------------------------------------------------------------------------

    def send(self, batch: Batch) -> None:
        """See exporter.Sink. How far it came is written last: what was not told to the end is told again."""
        self._send_traces(batch.traces)
        for score in batch.scores:
            self._send_score(score)
        for version in sorted({point.version for point in batch.points}, reverse=True):  # ALL is the last
            self._send_points(version, batch)

    def _send_points(self, version: str, batch: Batch) -> None:
        from mlflow.entities import Metric, RunTag

        points = [point for point in batch.points if point.version == version]
        metrics = [
            Metric(name, value, int(p.time_s * 1000), p.step) for p in points for name, value in p.figures.items()
        ]
        for start in range(0, len(metrics), LIMIT):
            self._client.log_batch(self._run(version), metrics[start : start + LIMIT])
        if version == ALL:
            self._told = {ROW: str(batch.row), TOTALS: json.dumps(batch.totals)}
            self._client.log_batch(self._run(ALL), tags=[RunTag(name, value) for name, value in self._told.items()])

    # --- traces -------------------------------------------------------------------------------------------------

    def _send_traces(self, records: list[Record]) -> None:
        if not records:
            return
        self._traces.log_spans(self._experiment_id, [span for record in records for span in self._spans(record)])
        for record in records:
            self._traces.start_trace(self._info(record))

    def _info(self, record: Record) -> Any:
        from mlflow.entities import TraceInfo, TraceLocation, TraceState

        decision, outcome = record.decision, record.outcome
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
            tags={"mlflow.traceName": "request", "arm": decision.arm, VERSION: decision.policy_version},
        )

    def _spans(self, record: Record) -> list[Any]:
        """The request, the choice of its arm, and the answer: what the journal knows of them; no text."""
        decision, outcome = record.decision, record.outcome
        assert outcome is not None
        begin = int(decision.time_s * 1e9)
        first, end = begin + int(outcome.ttft_s * 1e9), begin + int(outcome.latency_s * 1e9)
        told = {**explain(record), "outcome": None}  # which may have the answer's text in it
        usage = {"input_tokens": outcome.prompt_tokens, "output_tokens": outcome.output_tokens}
        usage["total_tokens"] = sum(usage.values())
        answer = {"finish_reason": outcome.finish_reason, "status": outcome.status, "flaw": outcome.flaw}
        seconds = {"ttft_s": outcome.ttft_s, "latency_s": outcome.latency_s, "cost_usd": outcome.cost_usd}
        spans = [
            _span(decision, 0, "request", "CHAIN", begin, end, told, answer | seconds),
            _span(decision, 1, "decide", "TASK", begin, begin, {"kind": decision.profile.kind}, {"arm": decision.arm}),
            _span(decision, 2, "answer", "LLM", begin, end, {"arm": decision.arm}, answer, usage),
        ]
        return spans if first == begin else [*spans, _span(decision, 3, "first token", "TASK", begin, first, {}, {})]

    def _send_score(self, score: Feedback) -> None:
        """As an assessment; one for each source, corrected where it was another."""
        from mlflow.entities import AssessmentSource
        from mlflow.entities import Feedback as Assessment
        from mlflow.exceptions import MlflowException

        name = trace_id(score.decision_id)
        try:
            known = self._traces.get_trace_info(name).assessments
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return  # not finished yet: it is told with the trace
            raise
        source = AssessmentSource(SOURCES.get(score.source, "CODE"), score.source)
        assessment = Assessment("score", score.score, source=source, trace_id=name)
        earlier = next((a for a in known if a.source.source_id == score.source), None)
        if earlier is None:
            self._traces.log_assessment(name, assessment)
        elif earlier.feedback.value != score.score:
            self._traces.update_assessment(name, earlier.assessment_id, assessment)


def _span(
    decision: Decision, number: int, name: str, kind: str, begin: int, end: int, given: Any, got: Any, usage: Any = None
) -> Any:
    """One of MLflow's spans, with times in nanoseconds since the epoch; number 0 is the root."""
    from mlflow.entities.span import create_mlflow_span
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

    def context(of: int) -> Any:
        trace = int(trace_id(decision.id).removeprefix("tr-"), 16)
        return SpanContext(trace, span_id(decision.id, of), False, TraceFlags(1))

    attributes = {"mlflow.traceRequestId": trace_id(decision.id), "mlflow.spanType": kind}
    attributes |= {"mlflow.spanInputs": given, "mlflow.spanOutputs": got}
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


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
