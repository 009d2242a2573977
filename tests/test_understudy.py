"""A proxy that is killed: another serves in its place until Serve's own is back, and does not stay longer."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from deployments import dataplane, understudy
from deployments.dataplane import WRAPPER

SLOW = """#!/bin/sh
trap 'while [ ! -e "$0.over" ]; do sleep 0.1; done; exit 0' USR1
echo >> "$0.started"
while true; do sleep 0.1; done
"""
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


def until(what: Callable[[], object], seconds: float = 60.0) -> float:
    """Seconds that it took to come true."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


class Proxy:
    """Serve's, and the understudy beside it."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.admin, self.config = folder / "a.sock", folder / "haproxy.cfg"
        self.config.write_text(CONFIG.format(admin=self.admin, port=port))
        self.environment = {"PATH": "/usr/bin:/bin", **dataplane.environment(folder, 90)}
        self.own = self.start()
        until(self.well)
        command = [*dataplane.understudy(folder)[:-1], str(folder)]
        self.understudy = subprocess.Popen(command, env=self.environment)
        time.sleep(3.0)  # it has looked

    def start(self, *more: str) -> psutil.Popen:
        """As Serve starts it."""
        alone = [] if self.environment.get("SERVE_SOCKET_REUSE_PORT_ENABLED") == "1" else ["-dR"]
        return psutil.Popen([str(WRAPPER), "-db", "-f", str(self.config), *alone, *more], env=self.environment)

    def well(self) -> bool:
        """Whether the gateway answers."""
        with suppress(httpx.HTTPError):
            return httpx.get(self.url, timeout=1.0).text == "here"
        return False

    def stand_ins(self) -> list[psutil.Process]:
        """Those that the understudy has started."""
        return psutil.Process(self.understudy.pid).children()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """One that runs, and everything of it killed afterwards."""
    made = Proxy(tmp_path)
    yield made
    for process in (*made.stand_ins(), made.understudy, made.own):
        with suppress(psutil.Error):
            process.kill()
    made.understudy.wait()


def test_a_killed_proxy_is_replaced_at_once_and_hands_over_to_serve_s_next(proxy: Proxy) -> None:
    """Nobody else would serve here; then a new one with the admin socket takes over."""
    for _ in range(2):
        proxy.own.kill()
        proxy.own.wait()
        print(f"served again after {until(proxy.well):.2f} s")
        assert not understudy.answers(str(proxy.admin))  # or Serve would not notice
        proxy.own = proxy.start()
        until(lambda: not proxy.stand_ins())
        assert understudy.answers(str(proxy.admin)) and proxy.well()


def test_a_proxy_that_another_relieves_is_not_stood_in_for(proxy: Proxy) -> None:
    """As in each of Serve's reloads: the new one has the admin socket before the old one ends."""
    following = proxy.start("-sf", str(proxy.own.pid))
    proxy.own.wait(60)
    time.sleep(0.5)
    assert proxy.well() and not proxy.stand_ins()
    proxy.own = following


def test_a_stand_in_that_drains_keeps_nobody_from_standing_in_again(tmp_path: Path) -> None:
    """Its last stream may take minutes; Serve's next proxy may be killed meanwhile."""
    admin, binary, started = tmp_path / "a.sock", tmp_path / "slow", tmp_path / "slow.started"
    (tmp_path / "haproxy.cfg").write_text(CONFIG.format(admin=admin, port=1))
    binary.write_text(SLOW)
    binary.chmod(0o755)
    watch, times = understudy.Understudy(tmp_path, str(binary)), 0
    for times in (1, 2):
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(str(admin))
            own.listen(100)
            for _ in range(30):  # Serve's is well: it hands over
                watch.look()
        admin.unlink()
        watch.look()
        until(lambda times=times: started.exists() and started.read_text() == "\n" * times)
    (drains,), proxy = watch._draining, watch._proxy
    assert drains.poll() is None and proxy is not None  # so no look has waited for it
    (tmp_path / "slow.over").touch()
    proxy.kill()
    proxy.wait()
    until(lambda: drains.poll() is not None)
    watch.look()
    assert not watch._draining


def test_the_gateway_opens_with_its_first_server(tmp_path: Path) -> None:
    """Serve's first configuration has none: all it could say is 404."""
    config = tmp_path / "haproxy.cfg"
    for server, bound_to in (("", f"unix@{config}.closed"), ("  server a 127.0.0.1:30001 check", "127.0.0.1:8090")):
        config.write_text(f"frontend gateway\n    bind *:8090\nbackend b\n{server}\n")
        variables = dataplane.environment(tmp_path, 90, "127.0.0.1:8090") | {"ROUTER_HAPROXY": "true"}
        subprocess.run([str(WRAPPER), "-f", str(config)], env={"PATH": "/usr/bin:/bin", **variables}, check=True)
        assert config.read_text().splitlines()[1].split() == ["bind", bound_to]
