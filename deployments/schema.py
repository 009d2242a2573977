"""The journal's tables, and the database that they are in: made, or brought up to date, when it is opened."""

import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

_META = sa.MetaData()
EVENTS = sa.Table(
    "events",
    _META,
    sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("decision_id", sa.String(64), nullable=False, index=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("time_s", sa.Float(53), nullable=False),
)
SNAPSHOTS = sa.Table(
    "snapshots",
    _META,
    sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("cut", sa.BigInteger, nullable=False),
    sa.Column("gone_before_s", sa.Float(53), nullable=False),
)
REPLIES = sa.Table(  # to requests with an Idempotency-Key
    "replies",
    _META,
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("time_s", sa.Float(53), nullable=False, index=True),
)
FACTS = sa.Table(
    "facts",
    _META,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)


def open_database(url: str) -> sa.Engine:
    """The database at a URL, with all tables; SQLite is told to be durable, PostgreSQL is so by default.

    Columns that a journal of an earlier version lacks are added; its rows count as made now.
    """
    lite = sa.make_url(url).get_backend_name() == "sqlite"
    engine = sa.create_engine(url, pool_pre_ping=not lite)  # a server may have restarted since the last write
    if lite:
        if engine.url.database:
            Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        sa.event.listen(engine, "connect", _durable)
    _META.create_all(engine)
    inspector, given = sa.inspect(engine), {"time_s": time.time(), "cut": 0, "gone_before_s": 0.0}
    for table in _META.sorted_tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in (column for column in table.columns if column.name not in there):
            change = f"ADD COLUMN {column.name} {column.type.compile(engine.dialect)} NOT NULL"
            with engine.begin() as connection:
                connection.exec_driver_sql(f"ALTER TABLE {table.name} {change} DEFAULT {given[column.name]}")
    return engine


def _durable(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
