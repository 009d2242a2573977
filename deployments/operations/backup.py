"""Backs up the journal, the policy versions, the API keys and the configuration of a running system; restores them.

A backup is a folder with a manifest that has the SHA-256 of every file. The journal is copied in one read transaction:
the copy has every event that was acknowledged before the backup began, and writers do not wait. The key that signs
policy versions is the journal's salt, so it is a part of the journal.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from deployments.paths import release

FORMAT = 1
MANIFEST = "manifest.json"
JOURNAL = "journal.db"  # of SQLite
JOURNAL_DUMP = "journal.sql"  # of PostgreSQL
MLFLOW = "mlflow/mlflow.db"
ARTEFACTS = "mlflow/art"
KEYS = "keys.json"
CONFIG = "serve_config.yaml"
# as the launcher replaces them (launcher.py)
DEFAULT_JOURNAL = "sqlite:///var/journal.db"
DEFAULT_KEYS = "var/keys.json"
LOCAL_MLFLOW = "http://127.0.0.1:5000"
LOCK_WAIT_S = 60.0


class BackupError(Exception):
    """A backup or a restore is not possible; the message says why and what would help."""


@dataclass(frozen=True)
class Sources:
    """What belongs to one instance of the system.

    journal: URL of the journal's database.
    mlflow: folder of MLflow, if the launcher has started it; None for another server.
    mlflow_uri: URI of MLflow; "" if none is configured.
    keys: file of the API keys; None if the gateway asks for none.
    config: the configuration.
    """

    journal: str
    mlflow: Path | None
    mlflow_uri: str
    keys: Path | None
    config: Path

    @classmethod
    def of(cls, config: Path, state: Path, keys: Path | None = None) -> "Sources":
        """What a configuration names, with the launcher's state folder in place of its defaults.

        Args:
            config: serve_config.yaml.
            state: folder of the instance.
            keys: file of the API keys, if it was given to the launcher and is not in the configuration.

        Raises:
            BackupError: the file is no configuration of a gateway.
        """
        arguments: dict[str, object] | None = None
        with suppress(OSError, yaml.YAMLError, AttributeError, KeyError):
            for application in yaml.safe_load(config.read_text())["applications"]:
                if str(application["import_path"]).endswith(":gateway"):
                    arguments = application.get("args") or {}
        if arguments is None:
            raise BackupError(
                f"{config} is no configuration of a gateway; name yours by --config"
            )
        journal = str(arguments.get("journal", DEFAULT_JOURNAL))
        if journal == DEFAULT_JOURNAL:
            journal = f"sqlite:///{state.resolve() / JOURNAL}"
        uri = str(arguments.get("mlflow_uri") or "")
        named = arguments.get("keys")
        if keys is None and isinstance(named, dict):
            keys = Path(str(named.get("file", DEFAULT_KEYS)))
        own_keys = state / KEYS
        if keys is None and own_keys.exists():
            keys = own_keys
        folder = state / "mlflow"
        local = uri == LOCAL_MLFLOW or uri.startswith("http://127.0.0.1:")
        return cls(
            journal, folder if local and folder.exists() else None, uri, keys, config
        )


# --- backup -----------------------------------------------------------------------------------------------------------


def backup(sources: Sources, target: Path) -> list[str]:
    """Copy an instance into a new folder while it runs.

    Args:
        sources: the instance.
        target: the folder, which must be missing or empty.

    Returns:
        What was copied and what was not, a sentence each.

    Raises:
        BackupError: the folder is not empty, or a part cannot be copied. The folder then has no manifest.
    """
    _require_empty(target)
    began_s = time.time()
    said = []
    with _private():
        target.mkdir(parents=True, exist_ok=True)
        target.chmod(0o700)
        said.append(_copy_journal(sources.journal, target))
        said.append(_copy_mlflow(sources, target))
        if sources.keys is None:
            said.append("no API keys are configured")
        elif not sources.keys.exists():
            raise BackupError(
                f"the file of API keys {sources.keys} is missing; name it by --keys"
            )
        else:
            _copy(sources.keys, target / KEYS)
            said.append(f"API keys: {KEYS}")
        _copy(sources.config, target / CONFIG)
        said.append(f"configuration: {CONFIG}")
        manifest = {
            "format": FORMAT,
            "began": _clock(began_s),
            "release": release(),
            "sqlite": sqlite3.sqlite_version,
            "journal": "sqlite" if _is_sqlite(sources.journal) else "postgresql",
            "notes": said,
            "files": {
                path.relative_to(target).as_posix(): {
                    "sha256": _sha256(path),
                    "bytes": path.stat().st_size,
                }
                for path in sorted(target.rglob("*"))
                if path.is_file()
            },
        }
        _write(target / MANIFEST, json.dumps(manifest, indent=1).encode())
    return said


def _copy_journal(url: str, target: Path) -> str:
    if _is_sqlite(url):
        source = Path(url.removeprefix("sqlite:///"))
        if not source.exists():
            raise BackupError(
                f"there is no journal at {source}; name the folder of the instance by --state"
            )
        copy_sqlite(source, target / JOURNAL)
        return f"journal, with the key that signs versions: {JOURNAL}"
    command = ["pg_dump", "--no-owner", "--no-privileges", f"--dbname={_libpq(url)}"]
    command.append(f"--file={target / JOURNAL_DUMP}")
    _run(command)
    _sync(target / JOURNAL_DUMP)
    return f"journal, with the key that signs versions: {JOURNAL_DUMP}"


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a SQLite database in one read transaction; its writers do not wait."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        closing(sqlite3.connect(source, timeout=LOCK_WAIT_S)) as database,
        closing(sqlite3.connect(target)) as copy,
    ):
        # all pages at once: a copy in steps would begin again after each commit
        database.backup(copy, pages=-1)
        copy.execute("PRAGMA journal_mode=DELETE")
        if copy.execute("PRAGMA quick_check").fetchall() != [("ok",)]:
            raise BackupError(f"the copy of {source} is damaged; is the disk sound?")
    _sync(target)


def _copy_mlflow(sources: Sources, target: Path) -> str:
    if not sources.mlflow_uri:
        return "no MLflow is configured"
    folder = sources.mlflow
    if folder is None or not (folder / "mlflow.db").exists():
        return (
            f"not copied: the policy versions in MLflow at {_without_user(sources.mlflow_uri)}, which was not started "
            "here; back up its own database and artefacts"
        )
    # A version's files are written before its row, so the files of every copied row exist now.
    copy_sqlite(folder / "mlflow.db", target / MLFLOW)
    (target / ARTEFACTS).mkdir(mode=0o700, exist_ok=True)
    for path in sorted((folder / "art").rglob("*")):
        if path.is_file():
            with suppress(FileNotFoundError):  # deleted meanwhile
                _copy(path, target / ARTEFACTS / path.relative_to(folder / "art"))
    return f"MLflow with the policy versions: {MLFLOW} and {ARTEFACTS}"


# --- restore ----------------------------------------------------------------------------------------------------------


def restore(source: Path, state: Path, journal: str = "") -> list[str]:
    """Restore a backup into an empty folder.

    Args:
        source: the folder of the backup.
        state: the folder of the new instance, which must be missing or empty.
        journal: URL of an empty PostgreSQL database, for a backup of one.

    Returns:
        What is where, a sentence each.

    Raises:
        BackupError: the backup is incomplete or was changed, or the folder or the database is not empty. Nothing was
            written then.
    """
    manifest = verify(source)
    _require_empty(state)
    postgres = manifest["journal"] == "postgresql"
    if postgres:
        _require_empty_database(journal)
    elif journal:
        raise BackupError(
            "this backup has a SQLite journal, which is restored into the folder; leave --journal out"
        )
    files = manifest["files"]
    assert isinstance(files, dict)
    with _private():
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
        for name in sorted(files):
            if name != JOURNAL_DUMP:
                _copy(source / name, state / name)
    said = []
    if postgres:
        script = f"--file={source / JOURNAL_DUMP}"
        _run(
            [
                "psql",
                "--quiet",
                "--no-psqlrc",
                "--single-transaction",
                "--set=ON_ERROR_STOP=1",
                "--output=/dev/null",
                f"--dbname={_libpq(journal)}",
                script,
            ]
        )
        said.append(f"the journal is in {_without_user(journal)}")
    else:
        said.append(f"the journal is {state / JOURNAL}")
    if MLFLOW in files:
        said.append(f"MLflow and the policy versions are in {state / 'mlflow'}")
    else:
        said.append("MLflow is not part of this backup")
    if KEYS in files:
        said.append(f"the API keys are {state / KEYS}")
    said.append(f"the configuration of the backup is {state / CONFIG}")
    return said


def verify(source: Path) -> dict[str, object]:
    """Check every file of a backup against its manifest; returns the manifest.

    Raises:
        BackupError: a file is missing, was changed, or is not in the manifest.
    """
    try:
        manifest = json.loads((source / MANIFEST).read_bytes())
        files = {str(name): dict(entry) for name, entry in manifest["files"].items()}
        known_format = manifest["format"] == FORMAT
    except FileNotFoundError:
        raise BackupError(
            f"{source} has no {MANIFEST}: it is no backup, or one that was not finished"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise BackupError(f"{source / MANIFEST} cannot be read") from None
    if not known_format:
        raise BackupError(
            f"{source} was made by another release ({manifest.get('release')}); restore it with that one"
        )
    found = {
        path.relative_to(source).as_posix(): path
        for path in source.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    for name in sorted(files.keys() ^ found.keys()):
        what = "is missing" if name in files else "is not in the manifest"
        raise BackupError(f"{source}: {name} {what}; use another backup")
    for name, path in found.items():
        if path.is_symlink() or _sha256(path) != files[name].get("sha256"):
            raise BackupError(
                f"{source}: {name} is not the file that was backed up; use another backup"
            )
    whole: dict[str, object] = manifest
    return whole


# --- files and programs -----------------------------------------------------------------------------------------------


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackupError(f"{folder} is not empty; choose an empty or a new folder")


def _require_empty_database(url: str) -> None:
    if not url:
        raise BackupError(
            "this backup has a PostgreSQL journal; name an empty database by --journal postgresql+psycopg://…"
        )
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    found = _run(
        [
            "psql",
            "--no-psqlrc",
            "--tuples-only",
            "--no-align",
            f"--command={tables}",
            f"--dbname={_libpq(url)}",
        ]
    )
    if found.strip() != "0":
        raise BackupError(
            f"the database {_without_user(url)} is not empty; create a new one"
        )


def _run(command: list[str]) -> str:
    """The output of a program of PostgreSQL.

    Raises:
        BackupError: it is not installed, or it failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise BackupError(
            f"the journal is in PostgreSQL, and {command[0]} is not installed here; install PostgreSQL's client "
            "programs (Debian: postgresql-client), or use the backups of your database server"
        ) from None
    if done.returncode:
        raise BackupError(f"{command[0]} failed: {done.stderr.strip()[:1000]}")
    return done.stdout


@contextmanager
def _private() -> Iterator[None]:
    """Files that are made meanwhile can be read by this user only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o600)
    _sync(target)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sqlite(url: str) -> bool:
    return url.startswith("sqlite:///")


def _libpq(url: str) -> str:
    """The URL as PostgreSQL's own programs take it, without the name of the Python driver."""
    scheme, _, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}://{rest}"


def _without_user(url: str) -> str:
    """The URL for a message, without a user's name."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))
