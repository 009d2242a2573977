"""Start and stop the whole system on this machine: `python -m deployments.launch up|down|reload|status`.

Starts MLflow, Ray and every application of serve_config.yaml, all on loopback, and shows how far it is. Every process
it starts carries a mark in its environment, by which `down` finds exactly these, whatever became of their parents.
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
from typing import Any

import httpx
import psutil
import yaml

from deployments import dataplane
from deployments.lint import lint, no_key

ROOT = Path(__file__).resolve().parent.parent
MARK = "ROUTER_CLUSTER"
READY_S = 900


@dataclass(frozen=True)
class Cluster:
    """Where one instance lives: its folder, its ports, its applications."""

    config: dict[str, Any]
    state: Path
    offset: int  # added to every port but the gateway's, so that two can live on one machine

    @property
    def gateway_port(self) -> int:
        """As the config says, moved by the offset."""
        return int(self.config["http_options"]["port"]) + self.offset

    @property
    def ports(self) -> dict[str, int]:
        """By what they are for."""
        fixed = {"MLflow": 5000, "Ray dashboard": 8265, "Ray": 6379}
        moved = {what: port + self.offset for what, port in fixed.items()}
        return {"gateway": self.gateway_port} | moved | dataplane.ports(self.offset)

    def url(self, what: str) -> str:
        """On loopback."""
        return f"http://127.0.0.1:{self.ports[what]}"

    def environment(self) -> dict[str, str]:
        """Of every process; RAY_AUTH_MODE is explicit because a token left in the home folder would turn it on."""
        http = self.config["http_options"]
        return {
            **os.environ,
            **dataplane.environment(self.state, self.offset, f"{http['host']}:{self.gateway_port}"),
            MARK: str(self.state),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "MALLOC_ARENA_MAX": "2",  # or each of Ray's thirty threads keeps what it once needed, and memory creeps up
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as there: the node is 127.0.0.1, and nothing listens elsewhere
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_AI_GATEWAY": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "OMP_NUM_THREADS": "1",
        }

    def processes(self) -> list[psutil.Process]:
        """All that carry the mark, and their descendants (some overwrite their environment with their title)."""
        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(MARK) == str(self.state):
                    found |= {process, *process.children(recursive=True)}
        return list(found)


def load(path: Path, state: Path, offset: int, keys: Path | None = None) -> Cluster:
    """Read the config, refuse what nobody would read, and lay out where this instance lives.

    Args: as on the command line; `keys` is the file of API keys to ask for, None for what the config says.

    Raises:
        SystemExit: with the list of what is wrong.
    """
    config = yaml.safe_load(path.read_text())
    for application in config.get("applications", ()):
        if keys is not None and str(application.get("import_path")).endswith(":gateway"):
            arguments = application["args"] = application.get("args") or {}
            arguments["keys"] = {**(arguments.get("keys") or {}), "file": str(keys.resolve())}
    if wrong := lint(config) or no_key(config):
        raise SystemExit("\n".join([f"{path.name} is not valid:", *(f"  {line}" for line in wrong)]))
    state = state.resolve()
    cluster = Cluster(config, state, offset)
    for application in config["applications"]:
        if application["import_path"].endswith(":gateway"):
            arguments = application["args"]
            if arguments.get("journal", "sqlite:///var/journal.db") == "sqlite:///var/journal.db":
                arguments["journal"] = f"sqlite:///{state / 'journal.db'}"
            if arguments.get("mlflow_uri") == "http://127.0.0.1:5000":
                arguments["mlflow_uri"] = cluster.url("MLflow")
    return cluster


def say(message: str, began: float) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.monotonic() - began:5.0f} s] {message}", flush=True)


def up(cluster: Cluster) -> None:
    """Start everything and wait until it answers.

    Raises:
        SystemExit: a port is taken, or something did not become ready.
    """
    began = time.monotonic()
    if cluster.processes():
        raise SystemExit("it is running already; `make stop` ends it")
    _check_ports(cluster)
    cluster.state.mkdir(parents=True, exist_ok=True)
    dataplane.prepare(cluster.state)
    say("starting MLflow", began)
    _spawn(cluster, "mlflow", _mlflow(cluster))
    say("starting Ray", began)
    process = _spawn(cluster, "ray", _ray(cluster))
    _wait_for(cluster.url("Ray dashboard") + "/api/version", "Ray", cluster, began, process)
    _spawn(cluster, "understudy", dataplane.understudy(cluster.state))
    say("deploying " + ", ".join(a["name"] for a in cluster.config["applications"]), began)
    _deploy(cluster, began)
    # the router looks every other second; until then it holds a model that just became ready for absent
    _wait_for(cluster.url("gateway") + "/readyz?models=all", "the gateway", cluster, began)
    _wait_for(cluster.url("MLflow") + "/health", "MLflow", cluster, began)
    say("ready", began)
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
    """Give the running system its file as it is now: what did not change goes on as it is.

    Raises:
        SystemExit: it does not run, or Serve refused the file.
    """
    began = time.monotonic()
    if not cluster.processes():
        raise SystemExit("it is not running; `make serve` starts it")
    _deploy(cluster, began)
    say("applied", began)


def down(cluster: Cluster) -> None:
    """End every process that `up` started, gently first."""
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
    dataplane.remove(cluster.state)
    print(f"stopped {len(processes)} processes")


def status(cluster: Cluster) -> None:
    """How much memory and CPU the running system takes, by program."""
    processes = cluster.processes()
    for process in processes:
        with suppress(psutil.Error):
            process.cpu_percent()
    time.sleep(10)
    rows = []
    for process in processes:
        with suppress(psutil.Error):
            memory = process.memory_full_info().pss / 2**20
            rows.append((" ".join(process.cmdline())[:60], memory, process.cpu_percent()))
    for name, memory, cpu in sorted(rows, key=lambda row: -row[1]):
        print(f"{memory:8.0f} MiB {cpu:6.1f} % CPU  {name}")
    print(
        f"{sum(r[1] for r in rows):8.0f} MiB {sum(r[2] for r in rows):6.1f} % of a core, in all {len(rows)} processes"
    )


def _mlflow(cluster: Cluster) -> list[str]:
    folder = cluster.state / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "art")]
    port = str(cluster.ports["MLflow"])
    return [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1", *store]


def _ray(cluster: Cluster) -> list[str]:
    options: Mapping[str, Any] = {
        "node-ip-address": "127.0.0.1",
        "port": cluster.ports["Ray"],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": cluster.ports["Ray dashboard"],
        "dashboard-agent-listen-port": 52365 + cluster.offset,
        "ray-client-server-port": 9801 + cluster.offset,  # below the workers' range, which begins at 10002
        "object-store-memory": 256 * 2**20,
    }
    script = str(Path(sys.executable).parent / "ray")
    return [script, "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())]


def _spawn(cluster: Cluster, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    with open(cluster.state / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip


def _check_ports(cluster: Cluster) -> None:
    listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    for what, port in cluster.ports.items():
        if port in listening:
            pid = listening[port]
            name = " ".join(psutil.Process(pid).cmdline())[:80] if pid else "another user's process"
            raise SystemExit(f"port {port} ({what}) is taken by process {pid}: {name}; end it first")


def _wait_for(
    url: str, what: str, cluster: Cluster, began: float, process: subprocess.Popen[bytes] | None = None
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
    config = {**cluster.config, "http_options": {**cluster.config["http_options"], "port": cluster.gateway_port}}
    answer = httpx.put(cluster.url("Ray dashboard") + "/api/serve/applications/", json=config, timeout=60)
    if answer.is_error:
        raise SystemExit(f"Serve refused the configuration: {answer.text[:2000]}")
    _wait_for_applications(cluster, began)


def _wait_for_applications(cluster: Cluster, began: float) -> None:
    seen: dict[str, str] = {}
    url = cluster.url("Ray dashboard") + "/api/serve/applications/"
    while time.monotonic() - began < READY_S:
        with suppress(httpx.HTTPError):
            for name, application in httpx.get(url, timeout=10).json()["applications"].items():
                now = application["status"]
                if seen.get(name) != now:
                    say(f"  {name}: {now.lower().replace('_', ' ')}", began)
                if now == "DEPLOY_FAILED":
                    raise SystemExit(f"{name} failed to start: {application['message'][-2000:]}")
                seen[name] = now
            if seen and all(seen.get(a["name"]) == "RUNNING" for a in cluster.config["applications"]):
                return
        time.sleep(1)
    raise SystemExit(f"not all applications became ready within {READY_S} s: {seen}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down", "reload", "status"))
    parser.add_argument("--config", type=Path, default=ROOT / "serve_config.yaml")
    parser.add_argument("--state", type=Path, default=ROOT / "var", help="journal, MLflow and logs live here")
    parser.add_argument("--offset", type=int, default=0, help="added to all ports")
    parser.add_argument("--keys", type=Path, help="up, reload: ask for the API keys in this file")
    arguments = parser.parse_args()
    keys = arguments.keys if arguments.verb in ("up", "reload") else None
    cluster = load(arguments.config, arguments.state, arguments.offset, keys)
    {"up": up, "down": down, "reload": reload, "status": status}[arguments.verb](cluster)


if __name__ == "__main__":
    main()
