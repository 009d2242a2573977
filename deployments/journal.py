"""The durable log of decisions, outcomes and feedback, and snapshots of what was learned from them.

State = fold(journal): a restart takes the last snapshot and applies the rows after it. Rows are numbered when they
are put, written in groups off the event loop, and `flush` returns only when they are on disk.

Old rows go in two steps. First a `cut` is set: from then on, feedback for decisions up to it is refused
(`gone_before_s`). When a snapshot that was taken after that is on disk, nothing will ever ask for these rows again,
and they are deleted, a few hundred at a time.
"""

import asyncio
import secrets
import time
from collections.abc import Collection, Iterator
from hashlib import blake2b
from math import inf
from typing import Any

import sqlalchemy as sa

from deployments.codec import decode, encode
from deployments.schema import EVENTS, FACTS, REPLIES, SNAPSHOTS, open_database
from deployments.snapshot import SNAPSHOT, Snapshot
from policies.ledger import Event
from policies.types import Decision

KEEP_SNAPSHOTS = 3
KEEP_REPLIES_S = 86_400.0
BATCH = 500  # rows deleted at once
PAGE = 2_000  # rows read at once
DAY_S = 86_400.0


class Journal:
    """One writer's log at a database URL: SQLite (WAL, synchronous=FULL) or PostgreSQL (postgresql+psycopg://).

    Args:
        url: of the database; its tables are made, or brought up to date.
        keep_days, max_rows: how old and how many rows may get before `retire` lets go of them.
    """

    def __init__(self, url: str, keep_days: float = inf, max_rows: float = inf):
        self.engine = open_database(url)
        self.keep_days, self.max_rows = keep_days, max_rows
        with self.engine.begin() as connection:
            salt = connection.execute(sa.select(FACTS.c.value).where(FACTS.c.name == "salt")).scalar()
            if not salt:
                salt = secrets.token_bytes(32)
                connection.execute(sa.insert(FACTS), [{"name": "salt", "value": salt}])
            last = connection.execute(sa.select(sa.func.max(EVENTS.c.row))).scalar()
            snapshot = connection.execute(sa.select(SNAPSHOTS).order_by(SNAPSHOTS.c.row.desc()).limit(1)).first()
        self.salt = bytes(salt)
        self.id = blake2b(self.salt, digest_size=8).hexdigest()
        # after retention there may be no row left: the numbers go on from the snapshot's
        self.last_row = max(int(last or 0), snapshot.row if snapshot else 0)
        self.gone_before_s = min(snapshot.gone_before_s, time.time()) if snapshot else 0.0
        self._cut = self._deletable = snapshot.cut if snapshot else 0
        self._durable_row, self._tidied_s = self.last_row, 0.0
        self._waiting: list[tuple[sa.Table, dict[str, Any]]] = []
        self._lock = asyncio.Lock()

    @property
    def waiting_rows(self) -> int:
        """How many are queued for the next write."""
        return len(self._waiting)

    # --- writing ------------------------------------------------------------------------------------------------

    def put(self, event: Event) -> int:
        """Queue an event for the next write; returns its row number."""
        self.last_row += 1
        kind = type(event).__name__.lower()
        decision_id = event.id if isinstance(event, Decision) else event.decision_id
        row = {"row": self.last_row, "kind": kind, "decision_id": decision_id, "body": encode(event)}
        self._waiting.append((EVENTS, row | {"time_s": time.time()}))
        return self.last_row

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Queue a snapshot of the state after all rows put so far."""
        row = {"row": self.last_row, "body": encode(snapshot), "cut": self._cut, "gone_before_s": self.gone_before_s}
        self._waiting.append((SNAPSHOTS, row))

    def put_reply(self, key: str, digest: str, status: str) -> None:
        """Queue what was replied to a request with this idempotency key; `digest` is that of its body."""
        self._waiting.append((REPLIES, {"key": key, "digest": digest, "status": status, "time_s": time.time()}))

    def put_fact(self, name: str, value: bytes) -> None:
        """Queue what is to be known under this name from now on."""
        self._waiting.append((FACTS, {"name": name, "value": value}))

    @property
    def busy(self) -> bool:
        """Whether something that was put is not on disk yet."""
        return bool(self._waiting) or self._lock.locked()

    async def flush(self) -> None:
        """Return when all that was put before is on disk; concurrent calls share one write.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database does not take it; the rows stay queued.
        """
        # a caller that gives up must not cut a write off: it would be made all the same, and then once more
        await asyncio.shield(asyncio.ensure_future(self._flush()))

    async def _flush(self) -> None:
        async with self._lock:
            rows = self._waiting
            if not rows:
                return
            self._waiting = []
            try:
                await asyncio.to_thread(self._write, rows)
            except Exception:
                self._waiting = rows + self._waiting
                raise
            self._durable_row = max([self._durable_row, *(row["row"] for table, row in rows if table is EVENTS)])
            self._deletable = max([self._deletable, *(row["cut"] for table, row in rows if table is SNAPSHOTS)])

    def _write(self, rows: list[tuple[sa.Table, dict[str, Any]]]) -> None:
        try:
            self._insert(rows)
        except sa.exc.IntegrityError:  # a write whose acknowledgement got lost was made all the same
            self._insert(self._unwritten(rows))

    def _insert(self, rows: list[tuple[sa.Table, dict[str, Any]]]) -> None:
        with self.engine.begin() as connection:
            events = [row for table, row in rows if table is EVENTS]
            if events:
                connection.execute(sa.insert(EVENTS), events)
            for table, key in ((SNAPSHOTS, "row"), (REPLIES, "key"), (FACTS, "name")):
                latest = {row[key]: row for other, row in rows if other is table}
                if latest:
                    connection.execute(sa.delete(table).where(table.c[key].in_(list(latest))))
                    connection.execute(sa.insert(table), list(latest.values()))
            if any(table is SNAPSHOTS for table, _ in rows):
                kept = sa.select(SNAPSHOTS.c.row).order_by(SNAPSHOTS.c.row.desc()).limit(KEEP_SNAPSHOTS)
                oldest = min(connection.execute(kept).scalars())
                connection.execute(sa.delete(SNAPSHOTS).where(SNAPSHOTS.c.row < oldest))

    def _unwritten(self, rows: list[tuple[sa.Table, dict[str, Any]]]) -> list[tuple[sa.Table, dict[str, Any]]]:
        """The rows without the events that are in the database already.

        Raises:
            RuntimeError: another event has the same number.
        """
        numbers = [row["row"] for table, row in rows if table is EVENTS]
        there: dict[int, bytes] = {}
        with self.engine.connect() as connection:
            for start in range(0, len(numbers), BATCH):
                query = sa.select(EVENTS.c.row, EVENTS.c.body).where(EVENTS.c.row.in_(numbers[start : start + BATCH]))
                there |= {row.row: bytes(row.body) for row in connection.execute(query)}
        for table, row in rows:
            if table is EVENTS and there.get(row["row"], row["body"]) != row["body"]:
                raise RuntimeError(f"row {row['row']} of the journal is another's; let only one router write to it")
        return [(table, row) for table, row in rows if table is not EVENTS or row["row"] not in there]

    # --- letting go ---------------------------------------------------------------------------------------------

    async def retire(self, now_s: float) -> bool:
        """Delete what a durable snapshot has made superfluous, in small batches between which others can write.

        Returns:
            Whether a new snapshot should be taken, because there are rows to let go of after it.
        """
        tidy = now_s - self._tidied_s >= 3600.0  # what does not fill a batch goes once an hour
        if tidy:
            self._tidied_s = now_s
            async with self._lock:
                await asyncio.to_thread(self._forget_replies, now_s)
        while await self._delete_batch():
            await asyncio.sleep(0.01)
        cut, time_s = await asyncio.to_thread(self._next_cut, now_s, tidy)
        if cut <= self._cut:
            return False
        self._cut, self.gone_before_s = cut, max(self.gone_before_s, time_s)
        return True

    async def _delete_batch(self) -> bool:
        async with self._lock:
            return await asyncio.to_thread(self._delete)

    def _delete(self) -> bool:
        first = sa.select(sa.func.min(EVENTS.c.row))
        with self.engine.begin() as connection:
            oldest = connection.execute(first).scalar()
            if oldest is None or oldest > self._deletable:
                return False
            connection.execute(sa.delete(EVENTS).where(EVENTS.c.row <= min(self._deletable, oldest + BATCH - 1)))
        return True

    def _forget_replies(self, now_s: float) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.delete(REPLIES).where(REPLIES.c.time_s < now_s - KEEP_REPLIES_S))

    def _next_cut(self, now_s: float, tidy: bool) -> tuple[int, float]:
        """The last row to let go of, and its time; whole batches only, unless it is time to tidy."""
        limit_s = now_s - self.keep_days * DAY_S
        cut, time_s = self._cut, 0.0
        with self.engine.connect() as connection:
            while True:
                beyond = self._durable_row - self.max_rows  # up to here there are too many
                page = (
                    sa.select(EVENTS.c.row, EVENTS.c.time_s)
                    .where(EVENTS.c.row > cut, EVENTS.c.row <= self._durable_row)
                    .order_by(EVENTS.c.row)
                    .limit(BATCH)
                )
                rows = connection.execute(page).all()
                going = [row for row in rows if row.row <= beyond or row.time_s < limit_s]
                if not going or (len(going) < BATCH and not tidy):
                    return cut, time_s
                past = [row.time_s for row in going if row.time_s <= now_s]  # a clock that ran ahead dates nothing
                cut, time_s = going[-1].row, max([time_s, *past])

    # --- reading ------------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[int, Snapshot | None]:
        """The newest snapshot and the row after which it was taken."""
        with self.engine.connect() as connection:
            newest = sa.select(SNAPSHOTS.c.row, SNAPSHOTS.c.body).order_by(SNAPSHOTS.c.row.desc()).limit(1)
            found = connection.execute(newest).first()
        return (found.row, SNAPSHOT.decode(found.body)) if found else (0, None)

    @property
    def lineage(self) -> dict[str, Any]:
        """That of the newest snapshot; empty if there is none."""
        _, newest = self.snapshot()
        return newest.lineage if newest else {}

    def pages(self, after: int = 0) -> Iterator[list[tuple[int, Event]]]:
        """All events after a row, with their numbers, in order, some thousands at a time."""
        while True:
            query = sa.select(EVENTS.c.row, EVENTS.c.kind, EVENTS.c.body).where(EVENTS.c.row > after)
            with self.engine.connect() as connection:
                rows = connection.execute(query.order_by(EVENTS.c.row).limit(PAGE)).all()
            if not rows:
                return
            yield [(number, decode(kind, body)) for number, kind, body in rows]
            after = rows[-1][0]

    def rows(self, after: int, most: int) -> list[tuple[int, float, str, bytes]]:
        """Number, time, kind and bytes of durable events after a row, in order."""
        columns = EVENTS.c.row, EVENTS.c.time_s, EVENTS.c.kind, EVENTS.c.body
        query = sa.select(*columns).where(EVENTS.c.row > after).order_by(EVENTS.c.row).limit(most)
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def replay(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """All events after a row, in order."""
        for page in self.pages(after):
            yield from page

    def find_all(self, decision_ids: Collection[str], up_to: float = inf) -> dict[str, list[Event]]:
        """The durable events of each of these decisions, in order; up to a row, if given."""
        wanted, found = list(decision_ids), {decision_id: list[Event]() for decision_id in decision_ids}
        with self.engine.connect() as connection:
            for start in range(0, len(wanted), BATCH):
                query = sa.select(EVENTS.c.kind, EVENTS.c.decision_id, EVENTS.c.body).order_by(EVENTS.c.row)
                query = query.where(EVENTS.c.decision_id.in_(wanted[start : start + BATCH]))
                if up_to != inf:
                    query = query.where(EVENTS.c.row <= int(up_to))
                for kind, decision_id, body in connection.execute(query):
                    found[decision_id].append(decode(kind, body))
        return found

    def fact(self, name: str) -> bytes | None:
        """What was put last under this name."""
        with self.engine.connect() as connection:
            value = connection.execute(sa.select(FACTS.c.value).where(FACTS.c.name == name)).scalar()
        return None if value is None else bytes(value)

    def reply(self, key: str) -> tuple[str, str] | None:
        """Digest and status of the reply to an idempotency key, if there was one."""
        with self.engine.connect() as connection:
            row = connection.execute(sa.select(REPLIES).where(REPLIES.c.key == key)).first()
        return (row.digest, row.status) if row else None
