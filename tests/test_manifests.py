"""deploy/rayservice.yaml, compose.yaml and the Dockerfile: as far as they can be judged without a cluster."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deployments import dataplane
from deployments.lint import lint
from deployments.settings import GatewaySettings
from tests.balancer import within

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
SERVICE = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
SCHEMA = json.loads((ROOT / "tests/rayservice.schema.json").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CONFIG = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
GPU = yaml.safe_load((ROOT / "serve_config.gpu.yaml").read_text())


def pods() -> list[dict[str, Any]]:
    """The container of every kind of pod."""
    cluster = SERVICE["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def keys_file() -> str:
    """Where the gateway looks for API keys."""
    gateway = next(a for a in CONFIG["applications"] if a["name"] == "gateway")
    file: str = gateway["args"]["keys"]["file"]
    return file


def test_the_rayservice_keeps_kuberays_schema() -> None:
    """KubeRay's own, cut down to what is used, with unknown keys refused."""
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    jsonschema.validate(SERVICE["spec"], SCHEMA)
    for path, typo in ((("rayClusterConfig",), "rayVersio"), (("rayClusterConfig", "headGroupSpec"), "templates")):
        broken = json.loads(json.dumps(SERVICE["spec"]))
        inner = broken
        for key in path:
            inner = inner[key]
        inner[typo] = {}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_it_deploys_what_serve_config_gpu_says() -> None:
    """Whoever changes one file changes the other; both keep the journal off the nodes, which share no disk."""
    assert lint(CONFIG) == []
    assert CONFIG == GPU
    gateway = next(a for a in GPU["applications"] if a["name"] == "gateway")
    assert GatewaySettings.model_validate(gateway["args"]).journal.startswith("postgresql+psycopg://")


def test_every_pod_asks_for_a_token_and_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_AUTH_MODE explicit, memory limited, secrets by reference, the port that the balancer asks, and the data plane
    that `make serve` has.
    """
    port = CONFIG["http_options"]["port"]
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    monkeypatch.delenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", raising=False)
    here = dataplane.environment(tmp_path, 0)
    for container in pods():
        environment = {e["name"]: e.get("value") for e in container["env"]}
        assert environment["RAY_AUTH_MODE"] == "token" == SERVICE["spec"]["rayClusterConfig"]["authOptions"]["mode"]
        assert environment["PGPASSWORD"] is None  # from the secret
        for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
            assert environment[name] == here[name] == "1"
        for name in ("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"):
            assert environment[name] == here[name]
        assert {p["name"]: p["containerPort"] for p in container["ports"]}["serve"] == port
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        (mount,) = container["volumeMounts"]
        assert mount["readOnly"] and Path(keys_file()).parent == Path(mount["mountPath"])
        assert "readinessProbe" not in container  # KubeRay's own know the raylet and Serve's proxy
    assert " wget" in (DEPLOY / "Dockerfile").read_text()  # which they call
    assert SERVICE["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_smallest_deployment_fits_on_the_smallest_cluster() -> None:
    """GPUs of all models at min_replicas, packed on whole GPUs; and grace enough for the longest shutdown."""
    (group,) = SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    models = [a for a in CONFIG["applications"] if a["name"] != "gateway"]
    wanted = sum(a["args"]["deployment_config"]["autoscaling_config"]["min_replicas"] for a in models)
    here = group["minReplicas"] * int(pods()[1]["resources"]["limits"]["nvidia.com/gpu"])
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] and wanted <= here
    deployed = [d for a in CONFIG["applications"] for d in a.get("deployments", ())]
    deployed += [a["args"]["deployment_config"] for a in models]
    longest = max(d.get("graceful_shutdown_timeout_s", 0) for d in deployed)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > longest


def test_versions_agree() -> None:
    """Ray's, of the manifest and of requirements.txt."""
    pinned = re.search(r"^ray==(.*)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned and SERVICE["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_compose_is_valid() -> None:
    """By docker compose, where there is one."""
    commands = (["docker", "compose"], ["docker-compose"])
    there = [
        c
        for c in commands
        if shutil.which(c[0]) and subprocess.run([*c, "version"], capture_output=True).returncode == 0
    ]
    if not there:
        pytest.skip("neither docker compose nor docker-compose is here; the other tests read the file")
    where = ["-f", str(DEPLOY / "compose.yaml"), "config", "-q"]
    done = subprocess.run(
        [*there[0], *where], env={**os.environ, "GRAFANA_PASSWORD": "x"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    without = {key: value for key, value in os.environ.items() if key != "GRAFANA_PASSWORD"}
    done = subprocess.run([*there[0], *where], env=without, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "GRAFANA_PASSWORD" in done.stderr


def test_compose_publishes_the_balancer_and_nothing_else() -> None:
    """Grafana on loopback only; all others live in the router's network and mount what exists."""
    services = COMPOSE["services"]
    listen = services["balancer"]["environment"]["LISTEN"]
    assert services["router"]["ports"] == [f"{listen[1:]}{listen}", "127.0.0.1:3000:3000"]
    assert services["router"]["environment"]["RAY_AUTH_MODE"] == "disabled"
    local = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["http_options"]
    gateway = f"{local['host']}:{local['port']}"
    assert services["balancer"]["environment"]["GATEWAY_A"] == gateway and local["host"] == "127.0.0.1"
    assert services["router"]["healthcheck"]["test"][-1] == f"http://{gateway}/readyz"
    for name, service in services.items():
        if name != "router":
            assert "ports" not in service and service["network_mode"] == "service:router"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_the_containers_command_serves_and_stops_in_order(tmp_path: Path) -> None:
    """`make serve`, then it stays; told to end, it runs `make stop` and is gone."""
    (tmp_path / "make").write_text('#!/bin/sh\necho "$1" >> "$LOG"\n')
    (tmp_path / "make").chmod(0o755)
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log)}
    process = subprocess.Popen(COMPOSE["services"]["router"]["command"], env=environment, start_new_session=True)
    try:
        within(5, lambda: log.exists() and log.read_text() == "serve\n")
        assert process.poll() is None
        process.terminate()
        assert process.wait(5) == 0
        assert log.read_text() == "serve\nstop\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the sleep, which a container's end takes along


def test_the_dockerfile_installs_what_the_makefile_does() -> None:
    """By the same target, not as root, without this checkout's leftovers."""
    text = (DEPLOY / "Dockerfile").read_text()
    assert "make .venv/installed" in text and "'.[gpu]'" in text
    assert text.index("USER router") < text.index("COPY")
    assert {".venv", "var", ".git"} <= set((DEPLOY / "Dockerfile.dockerignore").read_text().split())


@pytest.mark.parametrize(
    ("given", "has_it", "asked"),
    [
        ("", "torch==2.13.0+cpu", [""]),
        ("", "download.pytorch.org", ["", "https://download.pytorch.org/whl/cpu"]),
        ("https://mirror.example", "mirror.example", ["https://mirror.example"]),
        ("https://mirror.example", "download.pytorch.org", ["https://mirror.example"]),
    ],
)
def test_torch_is_looked_for_where_pip_looks_and_then_at_pytorchs_own(
    tmp_path: Path, given: str, has_it: str, asked: list[str]
) -> None:
    """The CPU build is on PyTorch's index only; TORCH_INDEX names another one. Found nowhere, it says what to set."""
    programs, log = tmp_path / ".venv/bin", tmp_path / "log"
    programs.mkdir(parents=True)
    (tmp_path / "requirements.txt").touch()
    (programs / "python").write_text('#!/bin/sh\n[ "$2" != "import torch" ]\n')
    (programs / "pip").write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{has_it}*|*-r*) ;; *) exit 1;; esac\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    command = ["make", "-f", str(ROOT / "Makefile"), ".venv/installed", f"TORCH_INDEX={given}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    tries = [line for line in log.read_text().splitlines() if "torch==" in line]
    assert [line.partition("--index-url ")[2] for line in tries] == asked
    assert (done.returncode == 0) == (has_it in tries[-1]) == (tmp_path / ".venv/installed").exists()
    assert done.returncode == 0 or "make TORCH_INDEX=" in done.stdout
