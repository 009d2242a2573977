"""Stands in for Serve's HAProxy when that is killed: `python understudy.py FOLDER`, where its files are.

Serve takes seconds to notice, and nobody reaches the gateway until then. The stand-in serves from the same
configuration but for the admin socket, by which Serve asks whether its own is well: so Serve still notices, and starts
another, which shares the port; then this one drains and ends. It is no child of the actor that runs HAProxy, as Ray
ends those with it. Standard library only.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

LOOK_S = 0.1
HANDOVER_S = 2.0  # Serve's next one starts without a backend, and within a second once more with them
ADMIN = re.compile(r"^ *stats +socket +(\S+).*\n", re.MULTILINE)


def answers(path: str) -> bool:
    """Whether a proxy listens at this admin socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(path)
        except OSError:
            return False
    return True


class Understudy:
    """For the proxy that has its files in this folder, or one below.

    Args:
        folder: where haproxy.cfg will be.
        binary: HAProxy.
    """

    def __init__(self, folder: Path, binary: str):
        self._folder, self._binary = folder, binary
        self._config = self._admin = ""  # of the proxy while it was well
        self._well_s = 0.0
        self._proxy: subprocess.Popen[bytes] | None = None
        self._draining: list[subprocess.Popen[bytes]] = []

    def look(self) -> None:
        """To be called every LOOK_S; never waits."""
        self._draining = [proxy for proxy in self._draining if proxy.poll() is None]
        if self._admin and not answers(self._admin):
            self._well_s = 0.0
            if self._proxy is None or self._proxy.poll() is not None:
                own = self._folder / "understudy.cfg"
                own.write_text(ADMIN.sub("", self._config))
                self._proxy = subprocess.Popen([self._binary, "-db", "-f", str(own)])
            return
        self._well_s += LOOK_S
        if self._proxy is not None and self._well_s >= HANDOVER_S:
            self._proxy.send_signal(signal.SIGUSR1)  # no new connections; those it has may end
            self._draining.append(self._proxy)
            self._proxy = None
        if self._proxy is None:
            self._read()

    def _read(self) -> None:
        for path in self._folder.glob("**/haproxy.cfg"):
            text = path.read_text()
            if (admin := ADMIN.search(text)) is not None and answers(admin[1]):
                self._config, self._admin = text, admin[1]


if __name__ == "__main__":
    understudy = Understudy(Path(sys.argv[1]), os.environ["ROUTER_HAPROXY"])
    while True:
        understudy.look()
        time.sleep(LOOK_S)
