"""Finds and erases the rows of a journal that belong to one API key, or to one user of a client.

Erased rows leave no bytes behind: SQLite overwrites them, and its write-ahead log is emptied. What was learned from
them stays in the snapshots, as sums over all requests.
"""

import asyncio
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import sqlalchemy as sa

from deployments.journal.codec import decode
from deployments.journal.tables import (
    EVENTS,
    FORGOTTEN,
    IDEMPOTENT_REPLIES,
    METADATA,
    SNAPSHOTS,
)
from policies.events import Feedback

PAGE_ROWS = 2_000
BATCH = 400  # rows or ids in one statement
# a reader of another process may use the write-ahead log for a while
CHECKPOINT_TRIES = 100
CHECKPOINT_PAUSE_S = 0.1


@dataclass(frozen=True)
class Person:
    """Whose data: those of the API key of this name, or those of the user with this salted hash."""

    key: str = ""
    user: str = ""


class _Head(msgspec.Struct):
    """The fields of a stored decision that say whose it is."""

    id: str
    owner: str = ""
    users: list[str] = []
    pair: str = ""


_HEADS = msgspec.msgpack.Decoder(_Head)


@dataclass
class Found:
    """Rows of a person.

    decisions: ids of the person's decisions, and of the second answers that were given beside them.
    scores: rows and scores that the person's key gave, those for other decisions included.
    """

    decisions: set[str]
    scores: dict[int, Feedback]

    def scores_for_others(self) -> set[str]:
        """The decisions of others, or not known yet, to which the key gave a score."""
        scored = {score.decision_id for score in self.scores.values()}
        return scored - self.decisions

    def __bool__(self) -> bool:
        """Whether there is any row."""
        return bool(self.decisions or self.scores)


class PersonalData:
    """The rows of one journal by the person whose they are. Methods that are no coroutines block.

    Args:
        engine: the database of the journal.
        writing: held while the journal writes; erasures wait for it.
    """

    def __init__(self, engine: sa.Engine, writing: asyncio.Lock):
        self._engine = engine
        self._writing = writing

    def find(self, person: Person) -> Found:
        """The durable rows of a person."""
        decisions: set[str] = set()
        for _, body in self._bodies("decision"):
            head = _HEADS.decode(body)
            if (person.key and head.owner == person.key) or (
                person.user and person.user in head.users
            ):
                decisions |= {head.id, head.pair} - {""}
        scores = {}
        for row, body in self._bodies("feedback") if person.key else ():
            event = decode("feedback", body)
            assert isinstance(event, Feedback)
            if event.is_of_key(person.key):
                scores[row] = event
        return Found(decisions, scores)

    def scores_of(self, decision_ids: Collection[str]) -> list[Feedback]:
        """All scores of these decisions, also those that count no more."""
        scores = []
        with self._engine.connect() as connection:
            for part in _batches(decision_ids):
                query = sa.select(EVENTS.c.body).where(
                    EVENTS.c.kind == "feedback", EVENTS.c.decision_id.in_(part)
                )
                for (body,) in connection.execute(query):
                    event = decode("feedback", body)
                    assert isinstance(event, Feedback)
                    scores.append(event)
        return scores

    def with_rows(self, decision_ids: Collection[str]) -> set[str]:
        """Those of these decisions that have a row."""
        found: set[str] = set()
        with self._engine.connect() as connection:
            for part in _batches(decision_ids):
                query = sa.select(EVENTS.c.decision_id).where(
                    EVENTS.c.decision_id.in_(part)
                )
                found |= set(connection.execute(query).scalars())
        return found

    def bodies_of(self, decision_ids: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Kind and encoded event of every row of these decisions, in order for each of them."""
        with self._engine.connect() as connection:
            for part in _batches(decision_ids):
                query = (
                    sa.select(EVENTS.c.kind, EVENTS.c.body)
                    .where(EVENTS.c.decision_id.in_(part))
                    .order_by(EVENTS.c.decision_id, EVENTS.c.row)
                )
                yield from (tuple(row) for row in connection.execute(query).all())

    async def erase(self, found: Found, up_to: int, replies: Collection[str]) -> None:
        """Erase rows up to this one, which a durable snapshot has learned from.

        Args:
            found: the rows.
            up_to: the last row of the snapshot. Older snapshots are erased, too, because they name decisions.
            replies: digests of the idempotent requests whose replies are erased.
        """
        async with self._writing:
            await asyncio.to_thread(self._erase, found, up_to, replies)

    async def compact(self) -> None:
        """Rewrite the database, so that no free page or log of it holds what was erased; writes wait meanwhile."""
        async with self._writing:
            await asyncio.to_thread(self._compact)

    def _erase(self, found: Found, up_to: int, replies: Collection[str]) -> None:
        with self._engine.begin() as connection:
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA secure_delete=ON")
            old = EVENTS.c.row <= up_to
            for ids in _batches(found.decisions):
                connection.execute(
                    sa.delete(EVENTS).where(EVENTS.c.decision_id.in_(ids), old)
                )
            for rows in _batches(found.scores):
                connection.execute(sa.delete(EVENTS).where(EVENTS.c.row.in_(rows), old))
            for digests in _batches(replies):
                replied = IDEMPOTENT_REPLIES.c.digest.in_(digests)
                connection.execute(sa.delete(IDEMPOTENT_REPLIES).where(replied))
            connection.execute(sa.delete(SNAPSHOTS).where(SNAPSHOTS.c.row < up_to))

    def _compact(self) -> None:
        """Rewrite all tables, and empty SQLite's write-ahead log.

        Raises:
            RuntimeError: another reader kept the write-ahead log in use.
        """
        with self._engine.connect() as connection:
            alone = connection.execution_options(isolation_level="AUTOCOMMIT")
            if self._engine.dialect.name == "sqlite":
                alone.exec_driver_sql("PRAGMA secure_delete=ON")
                alone.exec_driver_sql("VACUUM")
                for _ in range(CHECKPOINT_TRIES):
                    checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)"
                    if not alone.exec_driver_sql(checkpoint).scalar():
                        return
                    time.sleep(CHECKPOINT_PAUSE_S)
                raise RuntimeError(
                    "another process reads the journal, so its write-ahead log cannot be emptied; try again"
                )
            for table in (EVENTS, FORGOTTEN, SNAPSHOTS, IDEMPOTENT_REPLIES, METADATA):
                alone.exec_driver_sql(f"VACUUM FULL {table.name}")

    def _bodies(self, kind: str) -> Iterator[tuple[int, bytes]]:
        after = 0
        while True:
            query = (
                sa.select(EVENTS.c.row, EVENTS.c.body)
                .where(EVENTS.c.row > after, EVENTS.c.kind == kind)
                .order_by(EVENTS.c.row)
                .limit(PAGE_ROWS)
            )
            with self._engine.connect() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            for row, body in rows:
                yield row, bytes(body)
            after = rows[-1][0]


def _batches(items: Iterable[str | int]) -> Iterator[Sequence[str | int]]:
    ordered = sorted(items)  # type: ignore[type-var]
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]
