"""A temporary PostgreSQL server from the system's packages, as durable as a real one (fsync is on)."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path

import psycopg

from tests.support.debian import alone, apt_get, can_install

USER = "postgres"
COMMON = Path("/etc/postgresql-common/createcluster.conf")


def binaries() -> Path | None:
    """The folder with initdb and postgres, or None.

    If it is missing, the function installs PostgreSQL; that needs root and apt.
    """
    with alone():
        if (found := _find()) is None and can_install():
            apt_get("update", "-qq")
            apt_get(
                "install", "-y", "-qq", "--no-install-recommends", "postgresql-common"
            )
            if COMMON.exists():  # the package would start a server of its own
                COMMON.write_text("create_main_cluster = false\n")
            apt_get("install", "-y", "-qq", "--no-install-recommends", "postgresql")
            found = _find()
    return found


def _find() -> Path | None:
    """The folder of the newest installed PostgreSQL, or None."""
    places = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: -float(path.parent.name),
    )
    if (initdb := shutil.which("initdb")) is not None:
        places.append(Path(initdb).resolve().parent)
    return next(
        (
            place
            for place in places
            if (place / "initdb").exists() and (place / "postgres").exists()
        ),
        None,
    )


class Postgres:
    """A server on a unix socket in a folder of its own. It ends with this process.

    Args:
        bin: folder of its programs.
    """

    def __init__(self, bin: Path):
        self.bin = bin
        self._numbers = count(1)
        self.folder = Path(tempfile.mkdtemp(prefix="router-postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self.folder, USER, USER)
        options = [
            "-D",
            str(self.folder / "data"),
            "-A",
            "trust",
            "-U",
            USER,
            "-E",
            "UTF8",
            "--locale=C",
        ]
        subprocess.run(
            [*self._user(), str(bin / "initdb"), *options],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        self.start()

    def _user(self) -> list[str]:
        """A command prefix that changes the user if this is root, as which PostgreSQL refuses to run."""
        return (
            ["setpriv", "--reuid", USER, "--regid", USER, "--init-groups"]
            if os.geteuid() == 0
            else []
        )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        user = [*self._user(), "--pdeathsig", "INT"] if self._user() else []
        where = [
            "-D",
            str(self.folder / "data"),
            "-k",
            str(self.folder),
            "-c",
            "listen_addresses=",
        ]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [*user, str(self.bin / "postgres"), *where], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while True:
            try:
                psycopg.connect(host=str(self.folder), user=USER, dbname=USER).close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.05)

    def new_url(self) -> str:
        """URL of a new, empty database."""
        name = f"test{next(self._numbers)}"
        with psycopg.connect(
            host=str(self.folder), user=USER, dbname=USER, autocommit=True
        ) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://{USER}@/{name}?host={self.folder}"

    def kill(self) -> None:
        """Kill the server by SIGKILL, like a power cut, and wait until its children are gone."""
        self.process.kill()
        self.process.wait()
        time.sleep(0.5)

    def stop(self) -> None:
        """Stop the server and remove its folder."""
        self.process.send_signal(signal.SIGQUIT)  # an immediate shutdown
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)
