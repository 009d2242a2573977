"""The database tables of the journal. Opening the database creates them, or runs the migrations that it lacks.

Each change of a table needs a migration (migrations/versions/). A migration only adds tables, nullable columns and
columns with a default, so the previous release can still read and write the journal.
"""

import logging
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine.interfaces import DBAPIConnection

MIGRATIONS = "deployments.journal:migrations"
LOCK = 4_711_001  # PostgreSQL's advisory lock: one process at a time migrates
log = logging.getLogger(__name__)

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
# marks of scores that count no more (forgotten.py); their numbers and those of events are one sequence
FORGOTTEN = sa.Table(
    "forgotten",
    _SCHEMA,
    sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("time_s", sa.Float(53), nullable=False),
)


def open_database(url: str) -> sa.Engine:
    """Open the database at a URL and bring its tables up to date.

    SQLite is configured for durable writes; PostgreSQL writes durably by default.
    """
    sqlite = sa.make_url(url).get_backend_name() == "sqlite"
    # a database server may have restarted since the last write, so connections are tested before use
    engine = sa.create_engine(url, pool_pre_ping=not sqlite)
    if sqlite:
        if engine.url.database and engine.url.database != ":memory:":
            _keep_private(Path(engine.url.database))
        sa.event.listen(engine, "connect", _configure_sqlite)
    _migrate(engine)
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


def _migrate(engine: sa.Engine) -> None:
    """Run the migrations that the database lacks, all or none.

    A journal from before the migrations has no record of them, and gets what it lacks from the first one. A journal
    that a newer release has written is left as it is, because migrations only add.
    """
    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    scripts = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        written = MigrationContext.configure(connection).get_current_revision()
    if written == scripts.get_current_head():
        return
    if written not in {None, *(script.revision for script in scripts.walk_revisions())}:
        log.warning(
            "a newer release has written this journal (its tables are at revision %s); going on without what that "
            "release added",
            written,
        )
        return
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # without it, Python's driver would commit each change of a table by itself
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()


def _configure_sqlite(connection: DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
