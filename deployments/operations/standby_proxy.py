"""Runs a standby HAProxy while Serve's own is dead: `python standby_proxy.py FOLDER`, the folder of HAProxy's files.

Serve needs seconds to notice a dead HAProxy, and until then the gateway cannot be reached. The standby serves the same
configuration without the admin socket, which Serve polls; so Serve still notices and starts another HAProxy. The two
share the port, then the standby drains and ends. This script is started outside Serve's proxy actor, because Ray kills
an actor's children with it. Standard library only.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CHECK_EVERY_S = 0.1
# Serve's next HAProxy starts without a backend, and is reloaded with its backends within a second
HANDOVER_S = 2.0
ADMIN = re.compile(r"^ *stats +socket +(\S+).*\n", re.MULTILINE)


def answers(path: str) -> bool:
    """Whether a HAProxy listens at this admin socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(path)
        except OSError:
            return False
    return True


class StandbyProxy:
    """The standby of the HAProxy that has its files in this folder, or in a folder below.

    Args:
        folder: where haproxy.cfg will be.
        binary: HAProxy.
    """

    def __init__(self, folder: Path, binary: str):
        self._folder = folder
        self._binary = binary
        # of Serve's HAProxy, as of the last time that it answered
        self._config = ""
        self._admin_socket = ""
        self._healthy_s = 0.0  # for how long Serve's HAProxy has answered
        self._proxy: subprocess.Popen[bytes] | None = None
        self._draining: list[subprocess.Popen[bytes]] = []

    def check(self) -> None:
        """Start or end the standby as needed. Called every CHECK_EVERY_S; does not wait for any process."""
        self._draining = [proxy for proxy in self._draining if proxy.poll() is None]
        if self._admin_socket and not answers(self._admin_socket):
            self._healthy_s = 0.0
            if self._proxy is None or self._proxy.poll() is not None:
                self._start()
            return
        self._healthy_s += CHECK_EVERY_S
        if self._proxy is not None and self._healthy_s >= HANDOVER_S:
            # no new connections; present ones may end
            self._proxy.send_signal(signal.SIGUSR1)
            self._draining.append(self._proxy)
            self._proxy = None
        if self._proxy is None:
            self._read_config()

    def _start(self) -> None:
        config = self._folder / "standby.cfg"
        config.write_text(ADMIN.sub("", self._config))
        self._proxy = subprocess.Popen([self._binary, "-db", "-f", str(config)])

    def _read_config(self) -> None:
        for path in self._folder.glob("**/haproxy.cfg"):
            text = path.read_text()
            admin = ADMIN.search(text)
            if admin is not None and answers(admin[1]):
                self._config = text
                self._admin_socket = admin[1]


if __name__ == "__main__":
    standby = StandbyProxy(Path(sys.argv[1]), os.environ["ROUTER_HAPROXY"])
    while True:
        standby.check()
        time.sleep(CHECK_EVERY_S)
