"""From the journal to MLflow, behind everybody's back: what was decided and what came of it, as figures and traces.

The journal is the queue: nothing is buffered here but the page that is being carried. So MLflow may be slow or away
for as long as the journal keeps its rows; afterwards they are read from where it left off, and their figures get the
times at which they were true. Whatever is sent twice has the same effect as once.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.codec import decode
from deployments.identity import sampled
from policies.ledger import HELD, IMPLICIT, Event, Ledger, Record
from policies.types import Decision, Feedback, Outcome
from policies.window import Window

PAGE = 300  # rows asked for at once: the router reads them between requests
PAGES = 50  # of a turn: after that others have theirs, also when MLflow is slower than the journal grows
WARM = 3000  # rows read again after a restart, to know the latest decisions
CAPACITY = 5000  # decisions at hand; a score for an older one reaches its trace only
VERSIONS = 3  # policy versions whose figures are kept up: champion, challenger, and who was champion before
ALL = ""  # the name of all versions together
Totals = dict[str, float]


@dataclass(frozen=True)
class Point:
    """Figures at a time (seconds since the epoch) and step (decisions made by then), of a policy version or ALL."""

    version: str
    time_s: float
    step: int
    figures: dict[str, float]


@dataclass
class Batch:
    """What a page of rows made.

    row: up to which all has been told, when this has arrived. totals: of each version by then.
    traces, scores: finished decisions to be traced, and scores for decisions that are.
    """

    row: int
    totals: dict[str, Totals] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    traces: list[Record] = field(default_factory=list)
    scores: list[Feedback] = field(default_factory=list)


class Sink(Protocol):
    """Where it goes (runs.py); every method blocks, and raises what it likes when it did not work."""

    def connect(self) -> tuple[int, dict[str, Totals]]:
        """The last row that arrived here, and the totals of each version by then."""

    def send(self, batch: Batch) -> None:
        """Take a batch; taking it again changes nothing."""


class Folder:
    """Folds rows of the journal into points, one for every `every_s` seconds in which something happened.

    Args:
        every_s: seconds between points.
        trace_share: of the decisions, that are traced.
    """

    def __init__(self, every_s: float, trace_share: float):
        self._every_s, self._share = every_s, trace_share
        self._windows: dict[str, Window] = {ALL: Window()}
        self._totals: dict[str, Totals] = {}
        self._ledger = Ledger(CAPACITY, absent=lambda _: HELD, applied=self._applied)
        self._touched: set[str] = set()
        self.silenced: set[str] = set()  # keys whose scores do not count now (policies/trust.py), for all records
        self._ends_s, self._row, self._told = 0.0, 0, 0
        self._batch = Batch(0)

    def fold(self, rows: list[tuple[int, float, str, bytes]]) -> Batch:
        """What these rows make: number, time in seconds since the epoch, kind and bytes of each."""
        self._batch = Batch(0)
        for row, time_s, kind, body in rows:
            if time_s >= self._ends_s:
                self._close()
                self._ends_s = (time_s // self._every_s + 1) * self._every_s
            event = decode(kind, body)
            status = self._ledger.apply(event, None, fresh=True)
            if status == HELD and isinstance(event, Feedback) and sampled(event.decision_id, self._share):
                self._batch.scores.append(event)  # of a decision too old to be at hand
            self._row = row
        self._batch.row, self._batch.totals = self._told, self._totals
        return self._batch

    def finish(self, now_s: float) -> Batch | None:
        """The points of an interval that is over, though nothing came after it."""
        if not self._touched or now_s < self._ends_s + self._every_s:
            return None
        self._batch = Batch(0)
        self._close()
        self._batch.row, self._batch.totals = self._told, self._totals
        return self._batch

    def resume(self, row: int, totals: dict[str, Totals]) -> None:
        """The rows so far were told before; the totals were these."""
        self._touched.clear()
        self._row = self._told = row
        self._totals = totals
        for version, window in self._windows.items():
            window.totals |= totals.get(version, {})

    def _close(self) -> None:
        for version in sorted(self._touched):
            window = self._windows[version]
            self._batch.points.append(Point(version, self._ends_s, window.sequence + 1, window.figures()))
        self._touched.clear()
        self._told = self._row
        others = [(version, totals) for version, totals in self._totals.items() if version not in self._windows]
        mine = {version: dict(window.totals) for version, window in self._windows.items()}
        self._totals = dict(others[-VERSIONS:]) | mine  # others may come back

    def _applied(self, event: Event, record: Record) -> None:
        record.silenced = self.silenced
        version = record.decision.policy_version
        if isinstance(event, Decision) and version not in self._windows:
            self._windows[version] = Window(totals=self._totals.get(version))
            if len(self._windows) > VERSIONS + 1:
                oldest = min(self._windows.keys() - {ALL, version}, key=lambda name: self._windows[name].sequence)
                del self._windows[oldest]
                self._touched.discard(oldest)
        for name in (ALL, version):
            if (window := self._windows.get(name)) is not None:
                window.add(event, record)
                self._touched.add(name)
        if sampled(record.decision.id, self._share):
            self._trace(event, record)

    def _trace(self, event: Event, record: Record) -> None:
        if isinstance(event, Outcome):
            self._batch.traces.append(record)
            self._batch.scores += [Feedback(event.decision_id, given, by) for by, given in record.said().items()]
        elif isinstance(event, Feedback) and event.source != IMPLICIT and record.outcome is not None:
            self._batch.scores.append(event)


class Exporter:
    """Carries the journal on, a page at a time.

    Args:
        router: handle of the router actor, with `rows`.
        sink: where to.
        every_s: seconds between points.
        trace_share: of the decisions, that are traced.
    """

    def __init__(self, router: Any, sink: Sink, every_s: float, trace_share: float):
        self._router, self._sink, self._every_s, self._share = router, sink, every_s, trace_share
        self._folder: Folder | None = None
        self._unsent: Batch | None = None
        self.row = 0

    async def turn(self, now_s: float, silenced: Collection[str] = ()) -> int:
        """Carry what there is, up to PAGES; returns the number of rows.

        Args:
            now_s: seconds since the epoch.
            silenced: keys whose scores do not count now.

        Raises:
            Exception: the sink, or the router, cannot be reached; the next turn goes on from there.
        """
        folder, carried = self._folder or await self.begin(), 0
        folder.silenced.clear()
        folder.silenced |= set(silenced)
        await self._send()
        for _ in range(PAGES):
            if not (rows := await self._router.rows.remote(self.row, PAGE)):
                break
            self._unsent = await asyncio.to_thread(folder.fold, rows)
            self.row = rows[-1][0]
            carried += len(rows)
            await self._send()
        else:
            return carried
        self._unsent = folder.finish(now_s)
        await self._send()
        return carried

    async def begin(self) -> Folder:
        """Find out what was told, and read the latest of it again, to know what was known before a restart."""
        told, totals = await asyncio.to_thread(self._sink.connect)
        folder, row = Folder(self._every_s, self._share), max(0, told - WARM)
        while row < told and (rows := await self._router.rows.remote(row, min(PAGE, told - row))):
            rows = [given for given in rows if given[0] <= told]
            row = rows[-1][0] if rows else told
            await asyncio.to_thread(folder.fold, rows)
        folder.resume(told, totals)
        self.row, self._folder = told, folder
        return folder

    async def _send(self) -> None:
        if self._unsent is not None:
            await asyncio.to_thread(self._sink.send, self._unsent)
            self._unsent = None
