"""A proxy that is killed: another serves in its place until Serve's own is back, and does not stay longer."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from deployments import dataplane, understudy
from deployments.dataplane import WRAPPER

CONFIG = """global
    stats socket {admin} mode 600 level admin expose-fd listeners
    stats timeout 30s
defaults
    mode http
    timeout client 10s
frontend gateway
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain string "here"
"""


def until(what: Callable[[], object], seconds: float = 10.0) -> float:
    """Seconds that it took to come true."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


class Proxy:
    """Started as Serve starts it, by a process that stands for its manager."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.admin, self.config = folder / "a.sock", folder / "haproxy.cfg"
        self.config.write_text(CONFIG.format(admin=self.admin, port=port))
        self.environment = {"PATH": "/usr/bin:/bin", **dataplane.environment(folder, 90)}
        script = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", script, str(WRAPPER), "-db", "-f", str(self.config)]
        pipe = subprocess.PIPE
        self.manager = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe)
        assert self.manager.stdout is not None
        self.own = psutil.Process(int(self.manager.stdout.readline()))
        until(self.well)
        until(lambda: self.processes("understudy.py"))

    def well(self) -> bool:
        """Whether the gateway answers."""
        with suppress(httpx.HTTPError):
            return httpx.get(self.url, timeout=1.0).text == "here"
        return False

    def processes(self, word: str) -> list[psutil.Process]:
        """Those that have this test's folder and this word in their command line."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                found += [process] if str(self.config.parent) in line and word in line else []
        return found


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """One that runs, and everything of it killed afterwards."""
    made = Proxy(tmp_path)
    yield made
    made.manager.kill()
    for process in made.processes(""):
        with suppress(psutil.Error):
            process.kill()
    made.manager.communicate()


def test_a_killed_proxy_is_replaced_at_once_and_hands_over_to_serve_s_next(proxy: Proxy) -> None:
    """Two seconds are plenty even on a busy machine; then a new one with the admin socket takes over."""
    proxy.own.kill()
    assert until(lambda: proxy.own.status() == psutil.STATUS_ZOMBIE) < 2
    print(f"served again after {until(proxy.well, 2.0):.2f} s")
    assert not understudy.answers(str(proxy.admin))  # or Serve would not notice
    line = [str(WRAPPER), "-db", "-f", str(proxy.config)]
    with subprocess.Popen(line, env=proxy.environment) as following:
        until(lambda: understudy.answers(str(proxy.admin)))
        until(lambda: not proxy.processes(".understudy"))
        assert proxy.well()
        following.terminate()


def test_a_proxy_that_another_relieves_is_not_stood_in_for(proxy: Proxy) -> None:
    """As in each of Serve's reloads: the new one has the admin socket before the old one ends."""
    line = [str(WRAPPER), "-db", "-f", str(proxy.config), "-sf", str(proxy.own.pid)]
    with subprocess.Popen(line, env=proxy.environment) as following:
        until(lambda: proxy.own.status() == psutil.STATUS_ZOMBIE)
        until(lambda: len(proxy.processes("understudy.py")) == 1)  # the new one's own
        assert proxy.well() and not proxy.processes(".understudy")
        following.terminate()


def test_nobody_stands_in_where_the_manager_has_gone_as_well(proxy: Proxy) -> None:
    """The system was stopped."""
    proxy.manager.kill()
    proxy.manager.wait()
    proxy.own.kill()
    until(lambda: not proxy.processes(""))
