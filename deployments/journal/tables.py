"""The database tables of the journal. Opening the database creates the tables and adds missing columns."""

import time
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection

_SCHEMA = sa.MetaData()
EVENTS = sa.Table(
    "events",
    _SCHEMA,
    sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("decision_id", sa.String(64), nullable=False, index=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("time_s", sa.Float(53), nullable=False),
)
# cut: Retention.retention_row when the snapshot was taken; gone_before_s: Retention.deleted_before_s at that time
SNAPSHOTS = sa.Table(
    "snapshots",
    _SCHEMA,
    sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("cut", sa.BigInteger, nullable=False),
    sa.Column("gone_before_s", sa.Float(53), nullable=False),
)
# replies to requests with an Idempotency-Key
IDEMPOTENT_REPLIES = sa.Table(
    "replies",
    _SCHEMA,
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("time_s", sa.Float(53), nullable=False, index=True),
)
# named values: the salt, the current settings
METADATA = sa.Table(
    "facts",
    _SCHEMA,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)


def open_database(url: str) -> sa.Engine:
    """Open the database at a URL and bring its tables up to date.

    SQLite is configured for durable writes; PostgreSQL writes durably by default. Columns that a journal of an
    earlier version lacks are added; the creation time of its rows is then the present time.
    """
    sqlite = sa.make_url(url).get_backend_name() == "sqlite"
    # a database server may have restarted since the last write, so connections are tested before use
    engine = sa.create_engine(url, pool_pre_ping=not sqlite)
    if sqlite:
        if engine.url.database and engine.url.database != ":memory:":
            _keep_private(Path(engine.url.database))
        sa.event.listen(engine, "connect", _configure_sqlite)
    _SCHEMA.create_all(engine)
    _add_missing_columns(engine)
    return engine


def _keep_private(path: Path) -> None:
    """Let only this user read the file of a journal: it holds the salt, and prompts if `store_text` is on.

    SQLite gives its other two files the same permissions.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    for file in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        # another user's file: its owner decides
        with suppress(FileNotFoundError, PermissionError):
            file.chmod(0o600)


def _add_missing_columns(engine: sa.Engine) -> None:
    inspector = sa.inspect(engine)
    defaults = {"time_s": time.time(), "cut": 0, "gone_before_s": 0.0}
    for table in _SCHEMA.sorted_tables:
        existing = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name in existing:
                continue
            kind = column.type.compile(engine.dialect)
            with engine.begin() as connection:
                connection.exec_driver_sql(
                    f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind} "
                    f"NOT NULL DEFAULT {defaults[column.name]}"
                )


def _configure_sqlite(connection: DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
