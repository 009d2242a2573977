"""The standby HAProxy serves from the death of Serve's HAProxy until Serve has started another."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from deployments.operations import haproxy, standby_proxy
from deployments.operations.haproxy import WRAPPER

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
    """Wait until a condition is true. Returns the seconds it took."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


class Proxy:
    """Serve's HAProxy, and the standby script beside it."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.admin = folder / "a.sock"
        self.config = folder / "haproxy.cfg"
        self.config.write_text(CONFIG.format(admin=self.admin, port=port))
        self.environment = {"PATH": "/usr/bin:/bin", **haproxy.environment(folder, 90)}
        self.own = self.start()
        until(self.healthy)
        command = [*haproxy.standby_command(folder)[:-1], str(folder)]
        self.standby = subprocess.Popen(command, env=self.environment)
        time.sleep(3.0)  # long enough for the first check

    def start(self, *more: str) -> psutil.Popen:
        """Start HAProxy as Serve does."""
        alone = (
            []
            if self.environment.get("SERVE_SOCKET_REUSE_PORT_ENABLED") == "1"
            else ["-dR"]
        )
        return psutil.Popen(
            [str(WRAPPER), "-db", "-f", str(self.config), *alone, *more],
            env=self.environment,
        )

    def healthy(self) -> bool:
        """Whether the gateway answers."""
        with suppress(httpx.HTTPError):
            return httpx.get(self.url, timeout=1.0).text == "here"
        return False

    def standby_processes(self) -> list[psutil.Process]:
        """HAProxy processes that the standby script has started."""
        return psutil.Process(self.standby.pid).children()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """A running HAProxy with its standby. All processes are killed after the test."""
    made = Proxy(tmp_path)
    yield made
    for process in (*made.standby_processes(), made.standby, made.own):
        with suppress(psutil.Error):
            process.kill()
    made.standby.wait()


def test_standby_replaces_a_killed_proxy_and_hands_over_to_the_next_one(
    proxy: Proxy,
) -> None:
    """Only the standby can serve until a new HAProxy with the admin socket takes over."""
    for _ in range(2):
        proxy.own.kill()
        proxy.own.wait()
        print(f"served again after {until(proxy.healthy):.2f} s")
        assert not standby_proxy.answers(str(proxy.admin))  # Serve has to notice
        proxy.own = proxy.start()
        until(lambda: not proxy.standby_processes())
        assert standby_proxy.answers(str(proxy.admin)) and proxy.healthy()


def test_standby_does_not_start_during_a_reload(proxy: Proxy) -> None:
    """In a reload by Serve the new HAProxy has the admin socket before the old one ends."""
    following = proxy.start("-sf", str(proxy.own.pid))
    proxy.own.wait(60)
    time.sleep(0.5)
    assert proxy.healthy() and not proxy.standby_processes()
    proxy.own = following


def test_standby_starts_again_while_an_earlier_one_drains(
    tmp_path: Path,
) -> None:
    """The last stream of a standby may take minutes. Serve's next HAProxy may be killed meanwhile."""
    admin = tmp_path / "a.sock"
    binary = tmp_path / "slow"
    started = tmp_path / "slow.started"
    (tmp_path / "haproxy.cfg").write_text(CONFIG.format(admin=admin, port=1))
    binary.write_text(SLOW)
    binary.chmod(0o755)
    standby = standby_proxy.StandbyProxy(tmp_path, str(binary))
    times = 0
    for times in (1, 2):
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(str(admin))
            own.listen(100)
            for _ in range(30):  # Serve's HAProxy is healthy: the standby hands over
                standby.check()
        admin.unlink()
        standby.check()
        until(
            lambda times=times: started.exists() and started.read_text() == "\n" * times
        )
    (drains,), proxy = standby._draining, standby._proxy
    assert drains.poll() is None and proxy is not None  # no check has waited for it
    (tmp_path / "slow.over").touch()
    proxy.kill()
    proxy.wait()
    until(lambda: drains.poll() is not None)
    standby.check()
    assert not standby._draining
    assert standby._proxy is not None  # started in place of the killed one
    standby._proxy.kill()
    standby._proxy.wait()


def test_the_gateway_port_stays_closed_without_a_server(tmp_path: Path) -> None:
    """Serve's first configuration has no server, so HAProxy could only answer 404."""
    config = tmp_path / "haproxy.cfg"
    for server, bound_to in (
        ("", f"unix@{config}.closed"),
        ("  server a 127.0.0.1:30001 check", "127.0.0.1:8090"),
    ):
        config.write_text(f"frontend gateway\n    bind *:8090\nbackend b\n{server}\n")
        variables = haproxy.environment(tmp_path, 90, "127.0.0.1:8090") | {
            "ROUTER_HAPROXY": "true"
        }
        subprocess.run(
            [str(WRAPPER), "-f", str(config)],
            env={"PATH": "/usr/bin:/bin", **variables},
            check=True,
        )
        assert config.read_text().splitlines()[1].split() == ["bind", bound_to]
