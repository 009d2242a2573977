"""Deletes old journal rows, in two steps that lose nothing that the router has learned.

1. `apply` raises `retention_row`. From then on, feedback for decisions up to that row is refused (`deleted_before_s`).
2. The next snapshot is taken after that. When it is on disk, no restart reads the rows up to `retention_row` again,
   and `apply` deletes them, one batch at a time.
"""

import asyncio
from math import inf

import sqlalchemy as sa

from deployments.journal.tables import EVENTS, FORGOTTEN, IDEMPOTENT_REPLIES

BATCH_ROWS = 500  # rows deleted at once
DAY_S = 86_400.0
KEEP_REPLIES_S = DAY_S
TIDY_EVERY_S = 3600.0


class Retention:
    """Limits the age and the number of a journal's rows.

    Attributes:
        keep_days, max_rows: limits on the age and the number of rows.
        retention_row: the last row that is to be deleted.
        deletable_row: the last row that may be deleted now, because a durable snapshot was taken after it.
        durable_row: the last event that is on disk.
        deleted_before_s: feedback for decisions that were made before this time is refused.

    Args:
        engine: the database of the journal.
        writing: held while the journal writes; deletions wait for it.
        keep_days, max_rows: see the attributes.
    """

    def __init__(
        self,
        engine: sa.Engine,
        writing: asyncio.Lock,
        keep_days: float = inf,
        max_rows: float = inf,
    ):
        self.keep_days = keep_days
        self.max_rows = max_rows
        self.retention_row = 0
        self.deletable_row = 0
        self.durable_row = 0
        self.deleted_before_s = 0.0
        self._engine = engine
        self._writing = writing
        self._tidied_s = 0.0

    async def apply(self, now_s: float) -> bool:
        """Delete the rows that a durable snapshot has made superfluous, then look for more rows beyond the limits.

        The deletion runs in small batches, between which the journal can write.

        Returns:
            Whether `retention_row` was raised: the caller should then take a snapshot.
        """
        # rows that do not fill a batch are deleted once an hour
        tidy = now_s - self._tidied_s >= TIDY_EVERY_S
        if tidy:
            self._tidied_s = now_s
            async with self._writing:
                await asyncio.to_thread(self._delete_replies, now_s)
        while await self._delete_batch():
            await asyncio.sleep(0.01)
        row, time_s = await asyncio.to_thread(self._next_retention_row, now_s, tidy)
        if row <= self.retention_row:
            return False
        self.retention_row = row
        self.deleted_before_s = max(self.deleted_before_s, time_s)
        return True

    async def _delete_batch(self) -> bool:
        async with self._writing:
            return await asyncio.to_thread(self._delete_events)

    def _delete_events(self) -> bool:
        first = sa.select(sa.func.min(EVENTS.c.row))
        with self._engine.begin() as connection:
            oldest = connection.execute(first).scalar()
            if oldest is None or oldest > self.deletable_row:
                return False
            last = min(self.deletable_row, oldest + BATCH_ROWS - 1)
            connection.execute(sa.delete(EVENTS).where(EVENTS.c.row <= last))
            # a mark covers only rows before it, which are deleted now
            connection.execute(sa.delete(FORGOTTEN).where(FORGOTTEN.c.row <= last))
        return True

    def _delete_replies(self, now_s: float) -> None:
        replies = IDEMPOTENT_REPLIES
        expired = replies.c.time_s < now_s - KEEP_REPLIES_S
        with self._engine.begin() as connection:
            connection.execute(sa.delete(replies).where(expired))

    def _next_retention_row(self, now_s: float, tidy: bool) -> tuple[int, float]:
        """The last row beyond the limits, and its time; whole batches only, unless `tidy`."""
        oldest_s = now_s - self.keep_days * DAY_S
        last = self.retention_row
        time_s = 0.0
        with self._engine.connect() as connection:
            while True:
                surplus_row = self.durable_row - self.max_rows
                batch = (
                    sa.select(EVENTS.c.row, EVENTS.c.time_s)
                    .where(EVENTS.c.row > last, EVENTS.c.row <= self.durable_row)
                    .order_by(EVENTS.c.row)
                    .limit(BATCH_ROWS)
                )
                expired = [
                    row
                    for row in connection.execute(batch)
                    if row.row <= surplus_row or row.time_s < oldest_s
                ]
                if not expired or (len(expired) < BATCH_ROWS and not tidy):
                    return last, time_s
                last = expired[-1].row
                # a time in the future comes from a clock that ran ahead, so it is ignored
                past = [row.time_s for row in expired if row.time_s <= now_s]
                time_s = max([time_s, *past])
