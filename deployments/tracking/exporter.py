"""Exports the journal to MLflow in the background: metrics over time, traces of requests, and scores of answers.

The journal is the queue. The exporter buffers only the page that it is sending. MLflow may therefore be slow or
unreachable for as long as the journal keeps its rows: the export then resumes at the first row that was not exported,
and every point gets the time at which it was true. Sending a batch twice has the same effect as sending it once.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from deployments.journal.codec import decode
from deployments.journal.ids import sampled
from deployments.router.interface import RouterHandle
from policies.evaluation.kind_figures import ROWS, RecentFigures, is_routed
from policies.evaluation.recent_metrics import Window, arm_metrics, kind_metrics
from policies.events import (
    PENDING,
    Decision,
    Event,
    Feedback,
    Outcome,
    Record,
    is_derived,
)
from policies.feedback.decision_records import DecisionRecords, History

# rows requested at once; the router reads them between requests
PAGE = 300
# pages exported in one run; the limit gives the tracker's other work its turn if the journal grows faster than MLflow
PAGES = 50
# rows read again after a restart to restore the newest decisions
WARM_ROWS = ROWS
# decisions kept in memory; a score of an older decision reaches its trace only
CAPACITY = 5000
# policy versions whose metrics are kept: the champion, the challenger and the previous champion
VERSIONS = 3
# the name of all versions together
ALL = ""
# starts the name under which an arm has points, in place of a version
ARM_PREFIX = "arm/"
# seconds between two points of the figures by kind, which are many, and of each arm
KINDS_EVERY_S = 60.0
Totals = dict[str, float]


@dataclass(frozen=True)
class Point:
    """Metrics of a policy version, of ALL, or of an arm (ARM_PREFIX and its name), at a time (seconds since the epoch)
    and a step (number of decisions).
    """

    version: str
    time_s: float
    step: int
    figures: dict[str, float]


@dataclass
class Batch:
    """What one page of rows adds to MLflow.

    row: last row that is exported completely once this batch has been sent.
    totals: running totals of each version at that row.
    points: metrics.
    traces: records of finished decisions that are traced.
    scores: scores of traced decisions.
    """

    row: int
    totals: dict[str, Totals] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    traces: list[Record] = field(default_factory=list)
    scores: list[Feedback] = field(default_factory=list)


class Sink(Protocol):
    """Destination of the export. Its methods block and may raise any exception if they fail."""

    def connect(self) -> tuple[int, dict[str, Totals]]:
        """The last row that was exported completely, and the totals of each version at that row."""

    def send(self, batch: Batch) -> None:
        """Store a batch; storing the same batch again changes nothing."""


class MetricsAggregator:
    """Aggregates rows of the journal into points, one for every interval of `every_s` seconds that has events.

    The points of a version are of the decisions that it routed. Those of ALL also have the forced decisions, under
    names of their own, and once a minute the figures of each arm and kind. Then each arm has a point of its own, too:
    with the same names for all arms, MLflow draws them in one chart.

    Args:
        every_s: length of an interval.
        trace_sample_rate: share of the decisions that are traced.
    """

    def __init__(self, every_s: float, trace_sample_rate: float):
        self._every_s = every_s
        self._share = trace_sample_rate
        self._windows: dict[str, Window] = {ALL: Window()}
        self._totals: dict[str, Totals] = {}
        self._kinds = RecentFigures()
        self._kinds_minute = -1.0  # the latest one that has the figures by kind
        self._kind_counts: set[str] = set()  # metrics by kind that are numbers
        self._records = DecisionRecords(
            CAPACITY, history=History(keeps_unknown=True), projection=self
        )
        self._changed: set[str] = set()
        # keys whose scores do not count now (policies/feedback/reputation.py); all records share this set
        self.silenced: set[str] = set()
        self._ends_s = 0.0
        self._row = 0
        self._exported_row = 0
        self._batch = Batch(0)

    def aggregate(self, rows: list[tuple[int, float, str, bytes]]) -> Batch:
        """The batch of a page of rows.

        Args:
            rows: number, time in seconds since the epoch, kind and encoded event of each row.
        """
        self._batch = Batch(0)
        for row, time_s, kind, body in rows:
            if time_s >= self._ends_s:
                self._close_interval()
                self._ends_s = (time_s // self._every_s + 1) * self._every_s
            event = decode(kind, body)
            status = self._records.apply(event, None, fresh=True)
            # PENDING: the decision of this score is no longer in memory
            if (
                status == PENDING
                and isinstance(event, Feedback)
                and sampled(event.decision_id, self._share)
            ):
                self._batch.scores.append(event)
            self._row = row
        return self._finished_batch()

    def finish(self, now_s: float) -> Batch | None:
        """The points of an interval that has ended without a later row; None if there is no such interval."""
        if not self._changed or now_s < self._ends_s + self._every_s:
            return None
        self._batch = Batch(0)
        self._kinds_minute = -1.0  # the latest figures before a pause are complete
        self._close_interval()
        return self._finished_batch()

    def restore(self, row: int, totals: dict[str, Totals]) -> None:
        """Continue after a row that was exported earlier, with the totals at that row."""
        self._changed.clear()
        self._row = row
        self._exported_row = row
        self._totals = totals
        for version, window in self._windows.items():
            window.restore(totals.get(version, {}))

    def _finished_batch(self) -> Batch:
        self._batch.row = self._exported_row
        self._batch.totals = self._totals
        return self._batch

    def _close_interval(self) -> None:
        for version in sorted(self._changed):
            window = self._windows[version]
            figures = window.figures()
            step = window.sequence + 1
            if version == ALL and self._kinds_are_due():
                figures |= self._kind_figures()
                for arm, known in arm_metrics(self._kinds.table(), figures).items():
                    name = f"{ARM_PREFIX}{arm}"
                    self._batch.points.append(Point(name, self._ends_s, step, known))
            self._batch.points.append(Point(version, self._ends_s, step, figures))
        self._changed.clear()
        self._exported_row = self._row
        # versions without a window may decide again, so the totals of the newest of them are kept
        others = [
            (version, totals)
            for version, totals in self._totals.items()
            if version not in self._windows
        ]
        current = {version: window.totals for version, window in self._windows.items()}
        self._totals = dict(others[-VERSIONS:]) | current

    def _kinds_are_due(self) -> bool:
        """Whether this is the first interval with events of its minute."""
        minute = self._ends_s // KINDS_EVERY_S
        due = minute != self._kinds_minute
        self._kinds_minute = minute
        return due

    def _kind_figures(self) -> dict[str, float]:
        """The figures by kind."""
        metrics = kind_metrics(self._kinds.table())
        # an arm and kind that has left the window has 0 answers; its last figures are not the present ones
        gone = dict.fromkeys(self._kind_counts - metrics.keys(), 0.0)
        self._kind_counts |= {
            name for name in metrics if name.endswith(("/answers", "/votes"))
        }
        return metrics | gone

    def record(self, event: Event, record: Record) -> None:
        """Count an event that changed this decision record; see DecisionRecords."""
        record.silenced = self.silenced
        self._kinds.record(event, record)
        names = [ALL]
        if is_routed(record.decision):
            version = record.decision.policy_version
            names.append(version)
            if isinstance(event, Decision) and version not in self._windows:
                self._open_window(version)
        for name in names:
            window = self._windows.get(name)
            if window is not None:
                window.add(event, record)
                self._changed.add(name)
        if sampled(record.decision.id, self._share):
            self._trace(event, record)

    def _open_window(self, version: str) -> None:
        """Start the metrics of a version; beyond VERSIONS, those of the least recent one end."""
        self._windows[version] = Window(totals=self._totals.get(version))
        if len(self._windows) > VERSIONS + 1:
            oldest = min(
                self._windows.keys() - {ALL, version},
                key=lambda name: self._windows[name].sequence,
            )
            del self._windows[oldest]
            self._changed.discard(oldest)

    def _trace(self, event: Event, record: Record) -> None:
        if isinstance(event, Outcome):
            self._batch.traces.append(record)
            for source, score in record.explicit_scores().items():
                self._batch.scores.append(Feedback(event.decision_id, score, source))
        elif isinstance(event, Feedback):
            finished = record.outcome is not None
            if finished and not is_derived(event.source, event.owner):
                self._batch.scores.append(event)


class Exporter:
    """Exports the journal to a sink, one page at a time.

    Args:
        router: handle of the router actor, whose method `rows` reads the journal.
        sink: destination.
        every_s: seconds between points.
        trace_sample_rate: share of the decisions that are traced.

    Attributes:
        row: last row that was read.
        sent_row: last row whose traces and scores the sink has, and whose metrics it has or gets with the interval.
    """

    def __init__(
        self, router: RouterHandle, sink: Sink, every_s: float, trace_sample_rate: float
    ):
        self._router = router
        self._sink = sink
        self._every_s = every_s
        self._share = trace_sample_rate
        self._aggregator: MetricsAggregator | None = None
        self._unsent: Batch | None = None
        self.row = 0
        self.sent_row = 0

    async def run_once(self, now_s: float, silenced: Collection[str] = ()) -> int:
        """Export the rows that are new, up to PAGES pages; returns their number.

        Args:
            now_s: seconds since the epoch.
            silenced: keys whose scores do not count now.

        Raises:
            Exception: the sink or the router cannot be reached; the next run continues from the same row.
        """
        aggregator = self._aggregator or await self.resume()
        exported = 0
        aggregator.silenced.clear()
        aggregator.silenced |= set(silenced)
        await self._send()
        for _ in range(PAGES):
            rows = await self._router.rows.remote(self.row, PAGE)
            if not rows:
                self._unsent = aggregator.finish(now_s)
                await self._send()
                break
            self._unsent = await asyncio.to_thread(aggregator.aggregate, rows)
            self.row = rows[-1][0]
            exported += len(rows)
            await self._send()
        return exported

    async def resume(self) -> MetricsAggregator:
        """Ask the sink how far the export has come, and read the rows before again to restore the aggregates."""
        exported_row, totals = await asyncio.to_thread(self._sink.connect)
        aggregator = MetricsAggregator(self._every_s, self._share)
        row = max(0, exported_row - WARM_ROWS)
        while row < exported_row:
            most = min(PAGE, exported_row - row)
            found = await self._router.rows.remote(row, most)
            if not found:
                break
            rows = [each for each in found if each[0] <= exported_row]
            row = rows[-1][0] if rows else exported_row
            await asyncio.to_thread(aggregator.aggregate, rows)
        aggregator.restore(exported_row, totals)
        self.row = self.sent_row = exported_row
        self._aggregator = aggregator
        return aggregator

    async def _send(self) -> None:
        if self._unsent is not None:
            await asyncio.to_thread(self._sink.send, self._unsent)
            self._unsent = None
            self.sent_row = self.row
