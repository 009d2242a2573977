"""Starts and stops the whole system on this machine: `python -m deployments.operations.launcher up|down|reload|status`.

The launcher starts MLflow, Ray and every application of serve_config.yaml, all on loopback, and prints its progress.
Every process that it starts carries a mark in its environment. By the mark `down` finds all of them, even if their
parents have ended.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import yaml

from deployments.operations import haproxy
from deployments.operations.config_check import Config, check_config, check_keys

ROOT = Path(__file__).resolve().parents[2]
MARK = "ROUTER_CLUSTER"
READY_S = 900


@dataclass(frozen=True)
class Cluster:
    """One instance of the system.

    Attributes:
        config: the content of serve_config.yaml.
        state: folder of the journal, MLflow and logs.
        offset: added to every port, so two instances can run on one machine.
    """

    config: Config
    state: Path
    offset: int

    @property
    def gateway_port(self) -> int:
        """The port of the config, moved by the offset."""
        return int(self.config["http_options"]["port"]) + self.offset

    @property
    def ports(self) -> dict[str, int]:
        """All ports, by purpose."""
        fixed = {"MLflow": 5000, "Ray dashboard": 8265, "Ray": 6379}
        moved = {what: port + self.offset for what, port in fixed.items()}
        return {"gateway": self.gateway_port} | moved | haproxy.ports(self.offset)

    def url(self, what: str) -> str:
        """Where a part of the system answers, on loopback."""
        return f"http://127.0.0.1:{self.ports[what]}"

    def environment(self) -> dict[str, str]:
        """Environment variables of every process."""
        http = self.config["http_options"]
        return {
            **os.environ,
            **haproxy.environment(
                self.state, self.offset, f"{http['host']}:{self.gateway_port}"
            ),
            MARK: str(self.state),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            # explicit, because a token in the home folder would turn authentication on
            "RAY_AUTH_MODE": "disabled",
            # otherwise each of Ray's thirty threads keeps the memory that it once needed, and memory creeps up
            "MALLOC_ARENA_MAX": "2",
            # the node's address is 127.0.0.1, as on Windows and macOS, and nothing listens on another address
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Ray lists these two for Prometheus, also if another instance on this machine has taken the ports
            "AUTOSCALER_METRIC_PORT": str(44217 + self.offset),
            "DASHBOARD_METRIC_PORT": str(44227 + self.offset),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_AI_GATEWAY": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "OMP_NUM_THREADS": "1",
        }

    def processes(self) -> list[psutil.Process]:
        """All processes with the mark, and their descendants: some overwrite their environment with their title."""
        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid == os.getpid():
                    continue
                if process.environ().get(MARK) == str(self.state):
                    found |= {process, *process.children(recursive=True)}
        return list(found)


def load(path: Path, state: Path, offset: int, keys: Path | None = None) -> Cluster:
    """Read and check the config of an instance.

    Args:
        path: of the config.
        state: folder of the instance.
        offset: added to all ports.
        keys: file of the API keys to ask for; None for what the config says.

    Raises:
        SystemExit: the config is not valid. The message lists what is wrong.
    """
    config = yaml.safe_load(path.read_text())
    for application in config.get("applications", ()):
        if keys is not None and str(application.get("import_path")).endswith(
            ":gateway"
        ):
            arguments = application["args"] = application.get("args") or {}
            arguments["keys"] = {
                **(arguments.get("keys") or {}),
                "file": str(keys.resolve()),
            }
    problems = check_config(config) or check_keys(config)
    if problems:
        lines = [f"{path.name} is not valid:", *(f"  {line}" for line in problems)]
        raise SystemExit("\n".join(lines))
    state = state.resolve()
    cluster = Cluster(config, state, offset)
    for application in config["applications"]:
        if application["import_path"].endswith(":gateway"):
            arguments = application["args"]
            default = "sqlite:///var/journal.db"
            if arguments.get("journal", default) == default:
                arguments["journal"] = f"sqlite:///{state / 'journal.db'}"
            if arguments.get("mlflow_uri") == "http://127.0.0.1:5000":
                arguments["mlflow_uri"] = cluster.url("MLflow")
    return cluster


def print_progress(message: str, began: float) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - began:5.0f} s] {message}", flush=True)


def prepare_state(state: Path) -> None:
    """Make the folder of an instance for this user only: the journal has a secret salt, and MLflow has the versions."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if state.stat().st_uid == os.getuid():
        state.chmod(0o700)


def start(cluster: Cluster) -> None:
    """Start the system and wait until it answers.

    Raises:
        SystemExit: a port is in use, or a part of the system did not become ready.
    """
    began = time.monotonic()
    if cluster.processes():
        raise SystemExit("it is running already; `make stop` ends it")
    _check_ports(cluster)
    prepare_state(cluster.state)
    haproxy.prepare(cluster.state)
    print_progress("starting MLflow", began)
    _spawn(cluster, "mlflow", _mlflow(cluster))
    print_progress("starting Ray", began)
    process = _spawn(cluster, "ray", _ray(cluster))
    _wait_for(
        cluster.url("Ray dashboard") + "/api/version", "Ray", cluster, began, process
    )
    _spawn(cluster, "standby_proxy", haproxy.standby_command(cluster.state))
    names = ", ".join(a["name"] for a in cluster.config["applications"])
    print_progress(f"deploying {names}", began)
    _deploy(cluster, began)
    # the router counts the replicas every other second, so it learns a little later that a model is ready
    _wait_for(
        cluster.url("gateway") + "/readyz?models=all", "the gateway", cluster, began
    )
    _wait_for(cluster.url("MLflow") + "/health", "MLflow", cluster, began)
    print_progress("ready", began)
    print(
        f"""
  gateway        {cluster.url("gateway")}/v1   (docs: /docs)
  MLflow         {cluster.url("MLflow")}
  Ray dashboard  {cluster.url("Ray dashboard")}

curl {cluster.url("gateway")}/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"model": "auto", "messages": [{{"role": "user", "content": "What is 347 plus 586?"}}]}}'
"""
    )


def reload(cluster: Cluster) -> None:
    """Apply the changed config to the running system. Serve restarts only the parts that have changed.

    Raises:
        SystemExit: the system does not run, or Serve refused the config.
    """
    began = time.monotonic()
    if not cluster.processes():
        raise SystemExit("it is not running; `make serve` starts it")
    _deploy(cluster, began)
    print_progress("applied", began)


def stop(cluster: Cluster) -> None:
    """End every process that `start` started: by SIGTERM, and after 15 s by SIGKILL."""
    processes = set(cluster.processes())
    if not processes:
        print("nothing to stop")
        return
    dashboard = cluster.url("Ray dashboard") + "/api/serve/applications/"
    with suppress(httpx.HTTPError):  # lets the engines end their own children
        httpx.delete(dashboard, timeout=20)
    processes |= set(cluster.processes())
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=15)
    for process in {*left, *cluster.processes()}:
        with suppress(psutil.Error):
            process.kill()
    haproxy.remove(cluster.state)
    print(f"stopped {len(processes)} processes")


def status(cluster: Cluster) -> None:
    """Print how much memory and CPU each process of the running system takes."""
    processes = cluster.processes()
    for process in processes:
        with suppress(psutil.Error):
            process.cpu_percent()
    time.sleep(10)
    rows = []
    for process in processes:
        with suppress(psutil.Error):
            memory = process.memory_full_info().pss / 2**20
            rows.append(
                (" ".join(process.cmdline())[:60], memory, process.cpu_percent())
            )
    for name, memory, cpu in sorted(rows, key=lambda row: -row[1]):
        print(f"{memory:8.0f} MiB {cpu:6.1f} % CPU  {name}")
    memory = sum(row[1] for row in rows)
    cpu = sum(row[2] for row in rows)
    print(f"{memory:8.0f} MiB {cpu:6.1f} % of a core, in all {len(rows)} processes")


def _mlflow(cluster: Cluster) -> list[str]:
    folder = cluster.state / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "art"),
    ]
    port = str(cluster.ports["MLflow"])
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--workers",
        "1",
        *store,
    ]


def _ray(cluster: Cluster) -> list[str]:
    options: Mapping[str, object] = {
        "node-ip-address": "127.0.0.1",
        "port": cluster.ports["Ray"],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": cluster.ports["Ray dashboard"],
        "dashboard-agent-listen-port": 52365 + cluster.offset,
        # below the workers' range, which begins at 10002
        "ray-client-server-port": 9801 + cluster.offset,
        "object-store-memory": 256 * 2**20,
    }
    script = str(Path(sys.executable).parent / "ray")
    return [
        script,
        "start",
        "--head",
        "--block",
        *(f"--{key}={value}" for key, value in options.items()),
    ]


def _spawn(cluster: Cluster, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    path = cluster.state / f"{name}.log"
    with open(
        path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)
    ) as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=cluster.environment(),
            # Ray's own folder has to stay readable: Prometheus, another user, finds its targets there
            umask=-1 if name == "ray" else 0o077,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _check_ports(cluster: Cluster) -> None:
    listening = {
        c.laddr.port: c.pid
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }
    for what, port in cluster.ports.items():
        if port in listening:
            pid = listening[port]
            name = "another user's process"
            if pid:
                name = " ".join(psutil.Process(pid).cmdline())[:80]
            raise SystemExit(
                f"port {port} ({what}) is taken by process {pid}: {name}; end it first"
            )


def _wait_for(
    url: str,
    what: str,
    cluster: Cluster,
    began: float,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    while time.monotonic() - began < READY_S:
        if process is not None and process.poll() is not None:
            raise SystemExit(f"{what} ended at once; see the logs in {cluster.state}")
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).is_success:
                return
        time.sleep(0.5)
    raise SystemExit(f"{what} did not answer at {url}; see the logs in {cluster.state}")


def _deploy(cluster: Cluster, began: float) -> None:
    http = {**cluster.config["http_options"], "port": cluster.gateway_port}
    config = {**cluster.config, "http_options": http}
    answer = httpx.put(
        cluster.url("Ray dashboard") + "/api/serve/applications/",
        json=config,
        timeout=60,
    )
    if answer.is_error:
        raise SystemExit(f"Serve refused the configuration: {answer.text[:2000]}")
    _wait_for_applications(cluster, began)


def _wait_for_applications(cluster: Cluster, began: float) -> None:
    seen: dict[str, str] = {}
    url = cluster.url("Ray dashboard") + "/api/serve/applications/"
    while time.monotonic() - began < READY_S:
        with suppress(httpx.HTTPError):
            for name, application in (
                httpx.get(url, timeout=10).json()["applications"].items()
            ):
                now = application["status"]
                if seen.get(name) != now:
                    print_progress(f"  {name}: {now.lower().replace('_', ' ')}", began)
                if now == "DEPLOY_FAILED":
                    raise SystemExit(
                        f"{name} failed to start: {application['message'][-2000:]}"
                    )
                seen[name] = now
            if seen and all(
                seen.get(a["name"]) == "RUNNING" for a in cluster.config["applications"]
            ):
                return
        time.sleep(1)
    raise SystemExit(f"not all applications became ready within {READY_S} s: {seen}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("up", "down", "reload", "status"))
    parser.add_argument("--config", type=Path, default=ROOT / "serve_config.yaml")
    parser.add_argument(
        "--state",
        type=Path,
        default=ROOT / "var",
        help="journal, MLflow and logs live here",
    )
    parser.add_argument("--offset", type=int, default=0, help="added to all ports")
    parser.add_argument(
        "--keys", type=Path, help="up, reload: ask for the API keys in this file"
    )
    arguments = parser.parse_args()
    keys = arguments.keys if arguments.verb in ("up", "reload") else None
    cluster = load(arguments.config, arguments.state, arguments.offset, keys)
    verbs = {"up": start, "down": stop, "reload": reload, "status": status}
    verbs[arguments.verb](cluster)


if __name__ == "__main__":
    main()
