"""The free pages of a SQLite file, which still hold what was deleted."""

import sqlite3
from contextlib import closing
from pathlib import Path


def compact(uri: str) -> None:
    """Rewrite a database if it is a SQLite file here, so that its free pages hold nothing that was deleted."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as database:
        database.execute("VACUUM")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
