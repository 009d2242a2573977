"""Journal: the durable record of decisions, outcomes and feedback, with snapshots of what was learned from them.

The router is event-sourced: its state is a fold over the journal. A restart restores the last snapshot and replays
the rows after it. `put` numbers each row. Rows are written in groups outside the event loop, and `flush` returns only
when they are on disk. Old rows are deleted by retention.py.
"""

import asyncio
import secrets
import time
from collections.abc import Collection, Iterator
from math import inf
from typing import Any

import msgspec
import sqlalchemy as sa

from deployments.journal.codec import decode, encode
from deployments.journal.forgotten import ForgottenScores, Mark, Numbered
from deployments.journal.ids import IdFactory
from deployments.journal.personal_data import PersonalData
from deployments.journal.retention import Retention
from deployments.journal.snapshot import SNAPSHOT, Snapshot
from deployments.journal.tables import (
    EVENTS,
    FORGOTTEN,
    IDEMPOTENT_REPLIES,
    METADATA,
    SNAPSHOTS,
    open_database,
)
from policies.events import FORMER_STATUSES, Decision, Event, Feedback

KEEP_SNAPSHOTS = 3
PAGE_ROWS = 2_000  # rows read at once
QUERY_IDS = 500  # ids, or row numbers, in one query
# Rows that may wait for the database, and their size together. Ten minutes without it are 30,000 rows at 17 requests/s.
MAX_WAITING_ROWS = 50_000
MAX_WAITING_BYTES = 2**27
# tables in which a new row replaces the row with the same key
KEYED_TABLES = (
    (SNAPSHOTS, "row"),
    (FORGOTTEN, "row"),
    (IDEMPOTENT_REPLIES, "key"),
    (METADATA, "name"),
)

# a row of a table: its columns by name
Row = dict[str, Any]
Rows = list[tuple[sa.Table, Row]]


class JournalFullError(Exception):
    """Too many rows wait for the database, so no event is taken until some of them are written."""


class Journal:
    """The journal at a database URL: SQLite (WAL, synchronous=FULL) or PostgreSQL (postgresql+psycopg://).

    Only one process may write to a journal.

    Attributes:
        id: identifies this journal; snapshots and runs refer to it.
        salt: secret bytes for ids and hashes (ids.py).
        last_row: number of the last event or mark that was put.
        retention: deletes old rows.
        personal_data: finds and erases rows.
        forgotten: the scores that count no more; all readers of events leave them out.
        taps: each list gets every event that is put, with the number of its row.

    Args:
        url: of the database; missing tables and columns are created.
        keep_days, max_rows: limits on the age and the number of rows (retention.py).
    """

    def __init__(self, url: str, keep_days: float = inf, max_rows: float = inf):
        self.engine = open_database(url)
        with self.engine.begin() as connection:
            salt = connection.execute(
                sa.select(METADATA.c.value).where(METADATA.c.name == "salt")
            ).scalar()
            if not salt:
                salt = secrets.token_bytes(32)
                row = {"name": "salt", "value": salt}
                connection.execute(sa.insert(METADATA), [row])
            last = connection.execute(sa.select(sa.func.max(EVENTS.c.row))).scalar()
            snapshot = connection.execute(
                sa.select(SNAPSHOTS).order_by(SNAPSHOTS.c.row.desc()).limit(1)
            ).first()
            marks = connection.execute(
                sa.select(FORGOTTEN.c.row, FORGOTTEN.c.body)
            ).all()
        self.forgotten = ForgottenScores(
            {row: msgspec.msgpack.decode(body, type=Mark) for row, body in marks}
        )
        self.taps: list[list[Numbered]] = []
        self.salt = bytes(salt)
        self.id = IdFactory(self.salt).journal_id
        # retention may have deleted all events: the numbers then continue from the snapshot's row
        numbers = [row for row, _ in marks]
        self.last_row: int = max(
            int(last or 0), snapshot.row if snapshot else 0, *numbers
        )
        self._queued: Rows = []
        self._waiting_bytes = 0
        self._writing = asyncio.Lock()
        self.retention = Retention(self.engine, self._writing, keep_days, max_rows)
        self.personal_data = PersonalData(self.engine, self._writing)
        self.retention.durable_row = self.last_row
        if snapshot:
            self.retention.retention_row = snapshot.cut
            self.retention.deletable_row = snapshot.cut
            self.retention.deleted_before_s = min(snapshot.gone_before_s, time.time())

    @property
    def waiting_rows(self) -> int:
        """Number of rows that are queued for the next write."""
        return len(self._queued)

    @property
    def full(self) -> bool:
        """Whether so many rows wait that no event may be put now."""
        return (
            len(self._queued) >= MAX_WAITING_ROWS
            or self._waiting_bytes >= MAX_WAITING_BYTES
        )

    def check_room(self) -> None:
        """Raise if `full`. An event that is refused before it is applied was not acknowledged, so nothing is lost.

        Raises:
            JournalFullError: the caller may try again later.
        """
        if self.full:
            raise JournalFullError(
                f"{len(self._queued)} rows of the journal wait for the database"
            )

    # --- writing ------------------------------------------------------------------------------------------------

    def put(self, event: Event) -> int:
        """Queue an event for the next write; returns its row number."""
        self.last_row += 1
        decision_id = event.id if isinstance(event, Decision) else event.decision_id
        row = {
            "row": self.last_row,
            "kind": type(event).__name__.lower(),
            "decision_id": decision_id,
            "body": encode(event),
            "time_s": time.time(),
        }
        self._queue(EVENTS, row)
        for tap in self.taps:
            tap.append((self.last_row, event))
        return self.last_row

    def put_mark(self, mark: Mark) -> int:
        """Queue a mark for the next write; it is in force from now on. Returns its row number."""
        self.last_row += 1
        row = {
            "row": self.last_row,
            "body": encode(mark),
            "time_s": time.time(),
        }
        self._queue(FORGOTTEN, row)
        self.forgotten.add(self.last_row, mark)
        return self.last_row

    def _queue(self, table: sa.Table, row: Row) -> None:
        self._queued.append((table, row))
        self._waiting_bytes += _size(row)

    def _drop_waiting(self, table: sa.Table, key: Row) -> None:
        """Drop the waiting rows of a table with these values, because a new row replaces them."""
        kept = [
            (other, row)
            for other, row in self._queued
            if other is not table or not key.items() <= row.items()
        ]
        if len(kept) < len(self._queued):
            self._queued = kept
            self._waiting_bytes = sum(_size(row) for _, row in kept)

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Queue a snapshot of the state after all rows put so far. It replaces one that still waits."""
        self._drop_waiting(SNAPSHOTS, {})
        row = {
            "row": self.last_row,
            "body": encode(snapshot),
            "cut": self.retention.retention_row,
            "gone_before_s": self.retention.deleted_before_s,
        }
        self._queue(SNAPSHOTS, row)

    def put_reply(self, key: str, digest: str, status: str) -> None:
        """Queue the reply to a request with this idempotency key; `digest` is the digest of the request's body."""
        row = {"key": key, "digest": digest, "status": status, "time_s": time.time()}
        self._queue(IDEMPOTENT_REPLIES, row)

    def put_metadata(self, name: str, value: bytes) -> None:
        """Queue a named value; it replaces the earlier value of this name."""
        self._drop_waiting(METADATA, {"name": name})
        self._queue(METADATA, {"name": name, "value": value})

    @property
    def busy(self) -> bool:
        """Whether a row that was put is not on disk yet."""
        return bool(self._queued) or self._writing.locked()

    async def flush(self) -> None:
        """Return when all rows that were put before are on disk; concurrent calls share one write.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the write failed; the rows stay queued.
        """
        # shielded: if the caller is cancelled, the write completes, and its rows are not queued a second time
        await asyncio.shield(asyncio.ensure_future(self._flush()))

    async def _flush(self) -> None:
        async with self._writing:
            rows = self._queued
            if not rows:
                return
            waiting_bytes = self._waiting_bytes
            self._queued = []
            self._waiting_bytes = 0
            try:
                await asyncio.to_thread(self._write, rows)
            except Exception:
                self._queued = rows + self._queued
                self._waiting_bytes += waiting_bytes
                raise
            retention = self.retention
            for table, row in rows:
                if table is EVENTS:
                    retention.durable_row = max(retention.durable_row, row["row"])
                elif table is SNAPSHOTS:
                    retention.deletable_row = max(retention.deletable_row, row["cut"])

    def _write(self, rows: Rows) -> None:
        try:
            self._insert(rows)
        except sa.exc.IntegrityError:
            # an earlier write of the same rows was committed, but its acknowledgement was lost
            self._insert(self._unwritten(rows))

    def _insert(self, rows: Rows) -> None:
        with self.engine.begin() as connection:
            events = [row for table, row in rows if table is EVENTS]
            if events:
                connection.execute(sa.insert(EVENTS), events)
            for table, key in KEYED_TABLES:
                latest = {row[key]: row for other, row in rows if other is table}
                if latest:
                    replaced = table.c[key].in_(list(latest))
                    connection.execute(sa.delete(table).where(replaced))
                    connection.execute(sa.insert(table), list(latest.values()))
            if any(table is SNAPSHOTS for table, _ in rows):
                kept = (
                    sa.select(SNAPSHOTS.c.row)
                    .order_by(SNAPSHOTS.c.row.desc())
                    .limit(KEEP_SNAPSHOTS)
                )
                oldest = min(connection.execute(kept).scalars())
                connection.execute(sa.delete(SNAPSHOTS).where(SNAPSHOTS.c.row < oldest))

    def _unwritten(self, rows: Rows) -> Rows:
        """The rows without the events that are in the database already.

        Raises:
            RuntimeError: the database has another event under the same row number.
        """
        numbers = [row["row"] for table, row in rows if table is EVENTS]
        written: dict[int, bytes] = {}
        with self.engine.connect() as connection:
            for start in range(0, len(numbers), QUERY_IDS):
                query = sa.select(EVENTS.c.row, EVENTS.c.body).where(
                    EVENTS.c.row.in_(numbers[start : start + QUERY_IDS])
                )
                for found in connection.execute(query):
                    written[found.row] = bytes(found.body)
        unwritten: Rows = []
        for table, row in rows:
            if table is not EVENTS or row["row"] not in written:
                unwritten.append((table, row))
            elif written[row["row"]] != row["body"]:
                raise RuntimeError(
                    f"row {row['row']} of the journal was written by another router; "
                    "let only one router write to it"
                )
        return unwritten

    # --- reading ------------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[int, Snapshot | None]:
        """The newest snapshot and the row after which it was taken."""
        with self.engine.connect() as connection:
            newest = (
                sa.select(SNAPSHOTS.c.row, SNAPSHOTS.c.body)
                .order_by(SNAPSHOTS.c.row.desc())
                .limit(1)
            )
            found = connection.execute(newest).first()
        if found is None:
            return 0, None
        return found.row, SNAPSHOT.decode(found.body)

    @property
    def revisions(self) -> dict[str, object]:
        """State of the model revisions in the newest snapshot; empty if there is no snapshot."""
        _, newest = self.snapshot()
        return newest.lineage if newest else {}

    def pages(
        self, after: int = 0, forgotten: ForgottenScores | None = None
    ) -> Iterator[list[Numbered]]:
        """All events after a row, with their row numbers, in order and in pages of at most PAGE_ROWS.

        Args:
            after: the row.
            forgotten: the scores to leave out; by default those that count no more.
        """
        forgotten = self.forgotten if forgotten is None else forgotten
        while True:
            query = (
                sa.select(EVENTS.c.row, EVENTS.c.kind, EVENTS.c.body)
                .where(EVENTS.c.row > after)
                .order_by(EVENTS.c.row)
                .limit(PAGE_ROWS)
            )
            with self.engine.connect() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            page = forgotten.keep(
                (number, decode(kind, body)) for number, kind, body in rows
            )
            if page:
                yield page
            after = rows[-1][0]

    def scores(self, up_to: int) -> Iterator[tuple[int, Feedback]]:
        """All scores up to a row with their row numbers, in order, also those that count no more."""
        after = 0
        while True:
            query = (
                sa.select(EVENTS.c.row, EVENTS.c.body)
                .where(
                    EVENTS.c.row > after,
                    EVENTS.c.row <= up_to,
                    EVENTS.c.kind == "feedback",
                )
                .order_by(EVENTS.c.row)
                .limit(PAGE_ROWS)
            )
            with self.engine.connect() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            for number, body in rows:
                event = decode("feedback", body)
                assert isinstance(event, Feedback)
                yield number, event
            after = rows[-1][0]

    def first_row(self, after: int) -> int | None:
        """The number of the first event after this row, whatever its kind; None if there is none."""
        query = sa.select(sa.func.min(EVENTS.c.row)).where(EVENTS.c.row > after)
        with self.engine.connect() as connection:
            row: int | None = connection.execute(query).scalar()
        return row

    def replay(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """All events after a row, with their row numbers, in order."""
        for page in self.pages(after):
            yield from page

    def rows(self, after: int, most: int) -> list[tuple[int, float, str, bytes]]:
        """Row number, time, kind and encoded body of at most `most` durable events after a row, in order.

        Scores that count no more are left out. The list is empty only if there are no more events.
        """
        columns = EVENTS.c.row, EVENTS.c.time_s, EVENTS.c.kind, EVENTS.c.body
        while True:
            query = (
                sa.select(*columns)
                .where(EVENTS.c.row > after)
                .order_by(EVENTS.c.row)
                .limit(most)
            )
            with self.engine.connect() as connection:
                found = [tuple(row) for row in connection.execute(query)]
            if not found or not self.forgotten:
                return found
            after = found[-1][0]
            kept = [
                row
                for row in found
                if row[2] != "feedback"
                or not self.forgotten.covers(row[0], decode(row[2], row[3]))
            ]
            if kept:
                return kept

    def find_all(
        self,
        decision_ids: Collection[str],
        up_to: float = inf,
        forgotten: ForgottenScores | None = None,
    ) -> dict[str, list[Event]]:
        """The durable events of each of these decisions, in order.

        Args:
            decision_ids: the decisions.
            up_to: later rows are ignored.
            forgotten: see `pages`.
        """
        forgotten = self.forgotten if forgotten is None else forgotten
        wanted = list(decision_ids)
        found = {decision_id: list[Event]() for decision_id in decision_ids}
        with self.engine.connect() as connection:
            for start in range(0, len(wanted), QUERY_IDS):
                query = (
                    sa.select(
                        EVENTS.c.row,
                        EVENTS.c.kind,
                        EVENTS.c.decision_id,
                        EVENTS.c.body,
                    )
                    .where(EVENTS.c.decision_id.in_(wanted[start : start + QUERY_IDS]))
                    .order_by(EVENTS.c.row)
                )
                if up_to != inf:
                    query = query.where(EVENTS.c.row <= int(up_to))
                for row, kind, decision_id, body in connection.execute(query):
                    event = decode(kind, body)
                    if not forgotten.covers(row, event):
                        found[decision_id].append(event)
        return found

    def metadata(self, name: str) -> bytes | None:
        """The current value of this name."""
        query = sa.select(METADATA.c.value).where(METADATA.c.name == name)
        with self.engine.connect() as connection:
            value = connection.execute(query).scalar()
        return None if value is None else bytes(value)

    def reply(self, key: str) -> tuple[str, str] | None:
        """Digest and status of the reply to an idempotency key; None if there was none."""
        replies = IDEMPOTENT_REPLIES
        with self.engine.connect() as connection:
            query = sa.select(replies).where(replies.c.key == key)
            found = connection.execute(query).first()
        if found is None:
            return None
        return found.digest, FORMER_STATUSES.get(found.status, found.status)


def _size(row: Row) -> int:
    """About how many bytes a row holds."""
    return 100 + sum(len(value) for value in row.values() if isinstance(value, bytes))
