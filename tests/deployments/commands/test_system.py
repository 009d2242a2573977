"""The commands on the whole system, with a fake Ray dashboard and a gateway in this process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from deployments.operations import launcher
from deployments.operations.launcher import MARK
from tests.deployments.access.test_api_keys import Locked
from tests.support.commands import invoke
from tests.support.dashboard import Dashboard, dashboard, details_of
from tests.support.gateway import ROOT, Gateway

AWAY = 50_000  # offset of ports at which nothing listens


class System:
    """A config file and a state folder, a process with the system's mark, and the fake dashboard."""

    def __init__(self, folder: Path, fake: Dashboard):
        self.fake = fake
        self.file = folder / "serve_config.yaml"
        self.config: Any = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        self.state = (folder / "var").resolve()
        self.offset = fake.port - 8265
        self.write()
        cluster = launcher.load(self.file, self.state, self.offset)
        fake.details = details_of(launcher._moved(cluster))

    def write(self) -> None:
        """Save the config."""
        self.file.write_text(yaml.safe_dump(self.config))

    def tune(self, **objective: float) -> None:
        """Change the objective in the file."""
        ingress = self.config["applications"][-1]["deployments"][0]
        ingress["user_config"]["objective"] |= objective
        self.write()

    @property
    def where(self) -> str:
        return f"--config {self.file} --state {self.state} --offset {self.offset}"


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with dashboard() as fake:
        yield System(tmp_path, fake)


@pytest.fixture
def running(system: System) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the system."""
    code = "import time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, MARK: str(system.state)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_reload_shows_what_changes_and_applies_it(
    system: System, running: Any
) -> None:
    """Old and new value, which replicas restart and which do not; then there is nothing left to change."""
    system.tune(latency_weight=0.7)
    checked = invoke(
        None,
        f"check {system.file} --against-running --state {system.state} --offset {system.offset}",
    )
    assert checked.exit_code == 0 and system.fake.deployed == []
    result = invoke(None, f"reload {system.where}")
    assert result.exit_code == 0, result.output
    assert checked.stdout == f"valid\n\n{result.stdout}"
    (row,) = [line for line in result.stdout.splitlines() if "latency_weight" in line]
    assert row.split()[-2:] == ["0.005", "0.7"] and row.startswith("gateway")
    assert "replicas that keep running" in result.stdout
    assert "replicas that restart" not in result.stdout
    assert "applied" in result.stderr
    (sent,) = system.fake.deployed
    assert sent["http_options"]["port"] == 8000 + system.offset

    again = invoke(None, f"reload {system.where}")
    assert again.stdout == "nothing changed\n" and len(system.fake.deployed) == 1
    system.config["applications"][0]["args"]["log_engine_metrics"] = True
    system.write()
    plain = json.loads(invoke(None, f"reload {system.where} --json").stdout)
    assert [c["setting"] for c in plain["changes"]] == ["args.log_engine_metrics"]
    assert [e["deployment"] for e in plain["effects"] if e["restarts"]] == [
        "Model:nano"
    ]


def test_a_failed_application_is_deployed_again(system: System, running: Any) -> None:
    """Although no setting changed."""
    system.fake.details["applications"]["nano"]["status"] = "DEPLOY_FAILED"
    result = invoke(None, f"reload {system.where}")
    assert result.exit_code == 0 and len(system.fake.deployed) == 1
    assert "not running, and deployed again: nano" in result.stdout


def test_a_refused_reload(system: System, running: Any) -> None:
    """An invalid file is refused before Serve sees it; what Serve refuses is printed."""
    system.tune(latency_weight=0.7)
    system.fake.refusal = "no such thing"
    result = invoke(None, f"reload {system.where}")
    assert result.exit_code == 1 and "Serve refused" in result.stderr
    system.config["applications"][-1]["args"]["modles"] = {}
    system.write()
    result = invoke(None, f"reload {system.where}")
    assert result.exit_code == 1 and "did you mean 'models'?" in result.stderr
    assert system.fake.deployed == []


@pytest.mark.parametrize("line", ["reload", "status", "check --against-running"])
def test_a_system_that_does_not_run_is_exit_code_3(tmp_path: Path, line: str) -> None:
    """The message says how to start it."""
    result = invoke(None, f"{line} --state {tmp_path} --offset {AWAY}")
    assert result.exit_code == 3 and "`router up`" in result.output


def test_down_ends_the_processes_of_the_system(system: System, running: Any) -> None:
    """And only these; a second time there is nothing to stop. An invalid config does not prevent it."""
    system.file.write_text("http_options: {port: 8000}\nnonsense: 1\n")
    assert invoke(None, f"down {system.where}").stdout == "stopped 1 processes\n"
    assert running.wait(10) is not None
    result = invoke(None, f"down {system.where}")
    assert result.exit_code == 0 and result.stdout == "nothing to stop\n"
    assert json.loads(invoke(None, f"down {system.where} --json").stdout) == {
        "stopped": 0
    }


def test_up_refuses_before_it_starts_anything(system: System, running: Any) -> None:
    """It runs already; or the config is not valid, or not there."""
    result = invoke(None, f"up {system.where}")
    assert result.exit_code == 1 and "`router down` ends it" in result.stderr
    for content, words in (
        ("a: [", "is no valid YAML"),
        ("3", "has no settings"),
        ("http_option: {}", "did you mean 'http_options'?"),
    ):
        system.file.write_text(content)
        result = invoke(None, f"up {system.where}")
        assert result.exit_code == 1 and words in result.stderr
        assert result.stdout == ""
    system.file.unlink()
    for command in ("up", "down", "reload"):
        result = invoke(None, f"{command} {system.where}")
        assert result.exit_code == 1 and f"cannot read {system.file}" in result.stderr


def test_check(tmp_path: Path) -> None:
    """The shipped files are valid; problems are printed one a line, and as JSON."""
    for name in ("serve_config.yaml", "serve_config.gpu.yaml"):
        assert invoke(None, f"check {ROOT}/{name}").stdout == "valid\n"
    file = tmp_path / "wrong.yaml"
    file.write_text("proxy_locations: x\nhttp_option: {}\napplications: []\n")
    result = invoke(None, f"check {file}")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2
    plain = json.loads(invoke(None, f"check {file} --json").stdout)
    assert plain["valid"] is False and len(plain["problems"]) == 2
    result = invoke(None, f"check {tmp_path}/missing.yaml")
    assert result.exit_code == 1 and "cannot read" in result.stderr


def status(gateway: Gateway, line: str) -> Any:
    """The result of `router status` with a gateway in this process."""
    return invoke(gateway.client, f"status {line}")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether MLflow answers."""
    given = [True]
    monkeypatch.setattr("deployments.commands.system._answers", lambda _: given[0])
    return given


def test_the_status_of_a_system_that_is_well(
    system: System, gateway: Gateway, answers: list[bool]
) -> None:
    """One screen: components, addresses, roles, requests and the export."""
    assert gateway.chat().status_code == 200
    result = status(gateway, system.where)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and lines[0] == "well", result.output
    assert len(lines) < 45
    for words in (
        "model nano",
        f"http://127.0.0.1:{8000 + system.offset}/docs",
        f"http://127.0.0.1:{system.fake.port}",
        "thompson, no version yet",
        "1 decisions, 1 routed",
    ):
        assert words in result.stdout, words
    plain = json.loads(status(gateway, f"{system.where} --json").stdout)
    assert plain["status"] == "well" and plain["processes"] == []
    assert plain["router"]["counts"]["decisions"] == 1
    assert plain["router"]["champion"]["policy"] == "thompson"
    assert plain["urls"]["MLflow"].startswith("http://127.0.0.1:")
    assert {part["name"] for part in plain["components"]} >= {"router", "tracker"}


def test_the_status_of_an_earlier_release(
    system: System, gateway: Gateway, answers: list[bool]
) -> None:
    """A system that was started before an upgrade has no age and no export in its state."""
    state = gateway.client.get("/v1/router/state").json()
    for name in ("uptime_s", "journal", "export", "last_used_s"):
        del state[name]
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=state))
    client = httpx.Client(transport=transport, base_url="http://gateway")
    result = invoke(client, f"status {system.where}")
    assert "thompson, no version yet" in result.stdout
    assert result.exit_code == 0 and "of an earlier release" in result.stdout


def test_the_status_of_a_degraded_system(
    system: System, gateway: Gateway, answers: list[bool]
) -> None:
    """Exit code 1; the first line names what is not ready."""
    answers[0] = False
    nano = system.fake.details["applications"]["nano"]
    nano["deployments"]["Model:nano"]["replicas"] = []
    result = status(gateway, system.where)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == "degraded: model nano, MLflow"
    gateway.router.broken = True
    plain = json.loads(status(gateway, f"{system.where} --json").stdout)
    parts = {part["name"]: part for part in plain["components"]}
    assert parts["router"]["ready"] is False and plain["router"] is None
    gateway.router.broken = False


def test_the_status_works_with_keys(
    system: System,
    tmp_path: Path,
    answers: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a key the components are shown; with one of the scope `operate` everything is."""
    locked = Locked(tmp_path / "locked")
    with locked.client:
        for name in ("", "asks"):
            monkeypatch.setenv("ROUTER_API_KEY", locked.keys.get(name, ""))
            result = status(locked, system.where)
            assert result.exit_code == 0, result.output
            assert "not asked: " in result.stdout and "thompson" not in result.stdout
        monkeypatch.setenv("ROUTER_API_KEY", locked.keys["op"])
        assert "thompson" in status(locked, system.where).stdout


def test_the_status_of_another_machine(gateway: Gateway, system: System) -> None:
    """Only the gateway is asked, whatever runs here."""
    result = status(gateway, f"--url http://there:80 {system.where} --json")
    plain = json.loads(result.stdout)
    assert [*plain["urls"]] == ["gateway", "docs"]
    names = [part["name"] for part in plain["components"]]
    assert "model small" in names and "model nano" not in names


def test_the_processes_are_measured(
    system: System,
    gateway: Gateway,
    answers: list[bool],
    running: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory and CPU of each, and of all together."""
    monkeypatch.setattr(launcher.time, "sleep", lambda _: None)
    result = status(gateway, f"{system.where} --processes")
    assert "all 1 processes" in result.stdout
    plain = json.loads(status(gateway, f"{system.where} --processes --json").stdout)
    (process,) = plain["processes"]
    assert process["pid"] == running.pid and process["memory_mib"] > 1
    assert psutil.pid_exists(process["pid"])


def test_a_gateway_of_another_kind_is_not_running(system: System) -> None:
    """Something else answers at the port: the message asks for the right URL."""
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text="hello"))
    client = httpx.Client(transport=transport, base_url="http://x")
    result = invoke(client, "status --url http://x")
    assert result.exit_code == 3 and "is it the gateway's URL?" in result.stdout


@pytest.mark.parametrize("offset", [201, -1])
def test_an_offset_that_would_meet_the_ports_of_rays_workers_is_refused(
    tmp_path: Path, offset: int
) -> None:
    """Before anything starts, with the offsets that work."""
    where = f"--state {tmp_path} --offset {offset}"
    result = invoke(None, f"up --without general {where}")
    assert result.exit_code != 0
    assert "choose one from 0 to 200" in result.stderr
    assert not list(tmp_path.iterdir())
