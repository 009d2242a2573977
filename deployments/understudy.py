"""Stands in for Serve's HAProxy when that is killed: `python understudy.py PID CONFIG` waits for PID to end.

Serve takes up to half a minute to notice, and nobody reaches the gateway until then. The stand-in serves from the same
configuration but for the admin socket, by which Serve asks whether its own is well: so Serve still notices, and starts
another, which shares the port; then this one drains and ends. Standard library only: it starts in 20 ms.
"""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.2
HANDOVER_S = 2.0  # Serve's next one starts without a backend, and within a second once more with them
ALONE_S = 30.0  # without a manager that could start another; a new one is there within seconds
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


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for(pid: int) -> None:
    """Until it has ended."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        select.select([descriptor], [], [])
        os.close(descriptor)


def main(pid: int, config: Path, manager: int, binary: str) -> None:
    """Wait for the end of `pid`; stand in until another answers, unless one does already or the manager has gone."""
    wait_for(pid)
    text = config.read_text() if config.exists() else ""
    admin = ADMIN.search(text)
    if admin is None or gone(manager) or answers(admin[1]):
        return
    own = config.with_suffix(".understudy")
    own.write_text(ADMIN.sub("", text))
    proxy = subprocess.Popen([binary, "-db", "-f", str(own)])
    alone_s = 0.0
    while proxy.poll() is None and not answers(admin[1]) and alone_s < ALONE_S:
        time.sleep(LOOK_S)
        alone_s = alone_s + LOOK_S if gone(manager) else 0.0
    time.sleep(HANDOVER_S)
    with suppress(ProcessLookupError):
        proxy.send_signal(signal.SIGUSR1)  # no new connections; those it has may end
    proxy.wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), os.environ["ROUTER_HAPROXY"])
