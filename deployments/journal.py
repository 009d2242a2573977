"""The durable log of decisions, outcomes and feedback, and snapshots of what was learned from them.

State = fold(journal): a restart takes the last snapshot and applies the rows after it. Rows are numbered when they
are put, written in groups off the event loop, and `flush` returns only when they are on disk.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import sqlalchemy as sa

from policies.types import Decision, Feedback, Outcome

Event = Decision | Outcome | Feedback
KINDS: dict[str, type[Any]] = {"decision": Decision, "outcome": Outcome, "feedback": Feedback}

_META = sa.MetaData()
EVENTS = sa.Table(
    "events",
    _META,
    sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("decision_id", sa.String(64), nullable=False, index=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
SNAPSHOTS = sa.Table(
    "snapshots",
    _META,
    sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
KEEP_SNAPSHOTS = 3


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a policy had learned after a row of the journal.

    policy, arms: whose state it is. sequence: decisions made by then. version: last published policy version.
    pacer: the state of the budget's account.
    """

    policy: str
    arms: tuple[str, ...]
    sequence: int
    version: int
    state: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    pacer: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = field(default_factory=dict)


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "data": value.astype("<f8").tobytes()}
    raise NotImplementedError(f"cannot store a {type(value).__name__}")


def _decode_array(_: Any, value: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(value["data"], dtype="<f8").reshape(value["shape"]).astype(np.float64)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_DECODERS = {name: msgspec.msgpack.Decoder(kind, dec_hook=_decode_array) for name, kind in KINDS.items()}
_SNAPSHOT = msgspec.msgpack.Decoder(Snapshot, dec_hook=_decode_array)


class Journal:
    """One writer's log at a database URL (SQLite in WAL with synchronous=FULL, or any that SQLAlchemy knows)."""

    def __init__(self, url: str):
        self.engine = sa.create_engine(url)
        if self.engine.dialect.name == "sqlite":
            if self.engine.url.database:
                Path(self.engine.url.database).parent.mkdir(parents=True, exist_ok=True)
            sa.event.listen(self.engine, "connect", _durable)
        _META.create_all(self.engine)
        with self.engine.connect() as connection:
            last = connection.execute(sa.select(sa.func.max(EVENTS.c.row))).scalar()
        self.last_row = int(last or 0)
        self._waiting: list[tuple[sa.Table, dict[str, Any]]] = []
        self._lock = asyncio.Lock()

    @property
    def waiting_rows(self) -> int:
        """How many are queued for the next write."""
        return len(self._waiting)

    def put(self, event: Event) -> int:
        """Queue an event for the next write; returns its row number."""
        self.last_row += 1
        kind = type(event).__name__.lower()
        decision_id = event.id if isinstance(event, Decision) else event.decision_id
        row = {"row": self.last_row, "kind": kind, "decision_id": decision_id, "body": _ENCODER.encode(event)}
        self._waiting.append((EVENTS, row))
        return self.last_row

    def put_snapshot(self, snapshot: Snapshot) -> None:
        """Queue a snapshot of the state after all rows put so far."""
        self._waiting.append((SNAPSHOTS, {"row": self.last_row, "body": _ENCODER.encode(snapshot)}))

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

    def _write(self, rows: list[tuple[sa.Table, dict[str, Any]]]) -> None:
        with self.engine.begin() as connection:
            events = [row for table, row in rows if table is EVENTS]
            if events:
                connection.execute(sa.insert(EVENTS), events)
            for row in (row for table, row in rows if table is SNAPSHOTS):
                connection.execute(sa.delete(SNAPSHOTS).where(SNAPSHOTS.c.row == row["row"]))
                connection.execute(sa.insert(SNAPSHOTS), [row])
                kept = sa.select(SNAPSHOTS.c.row).order_by(SNAPSHOTS.c.row.desc()).limit(KEEP_SNAPSHOTS)
                oldest = min(connection.execute(kept).scalars())
                connection.execute(sa.delete(SNAPSHOTS).where(SNAPSHOTS.c.row < oldest))

    def snapshot(self) -> tuple[int, Snapshot | None]:
        """The newest snapshot and the row after which it was taken."""
        with self.engine.connect() as connection:
            newest = sa.select(SNAPSHOTS.c.row, SNAPSHOTS.c.body).order_by(SNAPSHOTS.c.row.desc()).limit(1)
            found = connection.execute(newest).first()
        return (found.row, _SNAPSHOT.decode(found.body)) if found else (0, None)

    def replay(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """All events after a row, in order."""
        query = sa.select(EVENTS).where(EVENTS.c.row > after).order_by(EVENTS.c.row)
        with self.engine.connect() as connection:
            for row in connection.execution_options(yield_per=1000).execute(query):
                yield row.row, _DECODERS[row.kind].decode(row.body)

    def find(self, decision_id: str, up_to: int | None = None) -> list[Event]:
        """The durable events of one decision, in order; up to a row, if given."""
        query = sa.select(EVENTS).where(EVENTS.c.decision_id == decision_id).order_by(EVENTS.c.row)
        if up_to is not None:
            query = query.where(EVENTS.c.row <= up_to)
        with self.engine.connect() as connection:
            return [_DECODERS[row.kind].decode(row.body) for row in connection.execute(query)]


def _durable(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
