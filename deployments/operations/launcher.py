"""Starts and stops the whole system on this machine: `router up`, `router down`, `router reload`.

The launcher starts MLflow, Ray and every application of serve_config.yaml, all on loopback, and prints its progress.
Every process that it starts carries a mark in its environment. By the mark `down` finds all of them, even if their
parents have ended.
"""

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import yaml

from deployments.errors import NoAnswerError
from deployments.operations import haproxy, prerequisites, weights
from deployments.operations.config_change import ConfigChange, compare
from deployments.operations.config_check import Config, check_config, check_keys
from deployments.operations.progress import Progress
from deployments.paths import IS_CHECKOUT, ROOT, home

MARK = "ROUTER_CLUSTER"
CLIENT_PORT = 9801  # of Ray
MOST_OFFSET = 10_001 - CLIENT_PORT  # Ray's workers have the ports from 10002
# MLflow is run by `python -m`, which would import a user's module that has the name of a package
OWN_ENVIRONMENT = {"mlflow": {"PYTHONSAFEPATH": "1"}}
READY_S = 900
DEFAULT_PORT = 8000  # Serve's
LOGS = "/tmp/ray/session_latest/logs"  # of Ray
MAX_ERROR = 500  # characters of an engine's error that are shown
APPLICATIONS = "/api/serve/applications/"  # of Serve's REST API at the dashboard


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
        http = self.config.get("http_options") or {}
        return int(http.get("port", DEFAULT_PORT)) + self.offset

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
            # an installed package is found without it
            **({"PYTHONPATH": str(ROOT)} if IS_CHECKOUT else {}),
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


@dataclass(frozen=True)
class ProcessUsage:
    """What a process of the system uses.

    pid: its number.
    name: its command line, shortened.
    memory_mib: proportional set size.
    cpu: share of one core.
    """

    pid: int
    name: str
    memory_mib: float
    cpu: float


class StartingReplicas:
    """Notices replicas of an application that end while they start; Serve reports that only after several failures."""

    def __init__(self) -> None:
        self._starting: set[str] = set()

    def failed(self, application: Config) -> set[str]:
        """Identifiers of the replicas that were starting at the last call, and are being stopped or gone now.

        Args:
            application: as in Serve's REST API.
        """
        states = {
            replica["replica_id"]: replica["state"]
            for deployment in (application.get("deployments") or {}).values()
            for replica in deployment.get("replicas") or ()
        }
        failed = {
            name
            for name in self._starting
            if states.get(name, "STOPPING") == "STOPPING"
        }
        self._starting = {name for name, state in states.items() if state == "STARTING"}
        return failed


def failure_of(application: Config) -> str:
    """The last line of the error with which a replica of an application ended, after a colon; "" if Serve has none.

    Args:
        application: as in Serve's REST API.
    """
    for deployment in (application.get("deployments") or {}).values():
        _, error, lines = (deployment.get("message") or "").partition("Error:\n")
        if error and lines.strip():
            return f": {lines.strip().splitlines()[-1].strip()[:MAX_ERROR]}"
    return ""


def read_config(path: Path) -> Config:
    """The content of a file like serve_config.yaml, unchecked.

    Raises:
        SystemExit: the file cannot be read, or is no YAML with settings.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SystemExit(
            f"cannot read {path}: there is no such file; name another one, or make one with `router init`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise SystemExit(f"cannot read {path}: {why}; name another file") from None
    except yaml.YAMLError as error:
        raise SystemExit(f"{path} is no valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"{path} has no settings; see serve_config.yaml")
    return config


def unchecked(path: Path, state: Path, offset: int) -> Cluster:
    """An instance whose config is not checked, for what needs its ports and processes only.

    Raises:
        SystemExit: the file cannot be read.
    """
    return Cluster(read_config(path), state.resolve(), offset)


def load(
    path: Path,
    state: Path,
    offset: int,
    keys: Path | None = None,
    without: Sequence[str] = (),
) -> Cluster:
    """Read and check the config of an instance. Weights that it needs and that are not here are fetched.

    Args:
        path: of the config.
        state: folder of the instance.
        offset: added to all ports.
        keys: file of the API keys to ask for; None for what the config says.
        without: names of models to leave out. A model whose weights cannot be had is left out, too.

    Raises:
        SystemExit: the config is not valid. The message lists what is wrong.
    """
    config = weights.without(read_config(path), without)
    config = weights.with_weights(config, _tell)
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


def _tell(sentence: str) -> None:
    """Print a sentence on standard error: it is no result."""
    print(sentence, file=sys.stderr, flush=True)


def prepare_state(state: Path) -> None:
    """Make the folder of an instance for this user only: the journal has a secret salt, and MLflow has the versions."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if state.stat().st_uid == os.getuid():
        state.chmod(0o700)


def start(cluster: Cluster) -> None:
    """Start the system and wait until it answers.

    Raises:
        SystemExit: a port is in use, a compiler or a library is missing, or a part of the system did not become ready.
    """
    progress = Progress()
    if cluster.processes():
        raise SystemExit("it is running already; `router down` ends it")
    if problems := prerequisites.missing(cluster.config):
        raise SystemExit("\n".join(problems))
    _check_ports(cluster)
    prepare_state(cluster.state)
    haproxy.prepare(cluster.state)
    progress.say("starting MLflow")
    _spawn(cluster, "mlflow", _mlflow(cluster))
    progress.say("starting Ray")
    process = _spawn(cluster, "ray", _ray(cluster))
    _wait_for(
        cluster.url("Ray dashboard") + "/api/version", "Ray", cluster, progress, process
    )
    _spawn(cluster, "standby_proxy", haproxy.standby_command(cluster.state))
    names = ", ".join(a["name"] for a in cluster.config["applications"])
    progress.say(f"deploying {names}")
    _deploy(cluster, progress)
    # the router counts the replicas every other second, so it learns a little later that a model is ready
    _wait_for(
        cluster.url("gateway") + "/readyz?models=all", "the gateway", cluster, progress
    )
    _wait_for(cluster.url("MLflow") + "/health", "MLflow", cluster, progress)
    progress.say("ready")


def serve_details(cluster: Cluster) -> Config:
    """What Serve says of its applications: the config in force, and the state of each deployment.

    Raises:
        NoAnswerError: the dashboard does not answer.
    """
    url = cluster.url("Ray dashboard")
    try:
        answer = httpx.get(url + APPLICATIONS, timeout=10)
        details = answer.raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        raise NoAnswerError(
            f"the Ray dashboard does not answer at {url}; `router up` starts the system"
        ) from None
    if not isinstance(details, dict):
        raise NoAnswerError(f"what answers at {url} is no Ray dashboard")
    return details


def pending_change(cluster: Cluster) -> ConfigChange:
    """How the config differs from the one in force, and what a reload would restart.

    Raises:
        NoAnswerError: the system does not run.
    """
    return compare(serve_details(cluster), _moved(cluster))


def reload(cluster: Cluster) -> ConfigChange:
    """Apply the changed config to the running system. Serve restarts only the parts that have changed.

    Without a change nothing is sent to Serve, unless an application does not run.

    Returns:
        What has changed.

    Raises:
        NoAnswerError: the system does not run.
        SystemExit: Serve refused the config.
    """
    progress = Progress()
    if not cluster.processes():
        raise NoAnswerError("it is not running; `router up` starts it")
    change = pending_change(cluster)
    if change.changes or change.not_running:
        _deploy(cluster, progress)
        progress.say("applied")
    return change


def stop(cluster: Cluster) -> int:
    """End every process that `start` started: by SIGTERM, and after 15 s by SIGKILL; returns their number."""
    processes = set(cluster.processes())
    if not processes:
        return 0
    dashboard = cluster.url("Ray dashboard") + APPLICATIONS
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
    return len(processes)


def process_usage(cluster: Cluster, seconds: float = 10.0) -> list[ProcessUsage]:
    """What each process of the running system uses, largest first; measured over so many seconds."""
    processes = cluster.processes()
    for process in processes:
        with suppress(psutil.Error):
            process.cpu_percent()
    if processes:
        time.sleep(seconds)
    usages = []
    for process in processes:
        with suppress(psutil.Error):
            name = " ".join(process.cmdline())[:60]
            memory_mib = process.memory_full_info().pss / 2**20
            cpu = process.cpu_percent() / 100
            usages.append(ProcessUsage(process.pid, name, memory_mib, cpu))
    return sorted(usages, key=lambda usage: -usage.memory_mib)


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
        "ray-client-server-port": CLIENT_PORT + cluster.offset,
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
            cwd=home(),
            env={**cluster.environment(), **OWN_ENVIRONMENT.get(name, {})},
            # Ray's own folder has to stay readable: Prometheus, another user, finds its targets there
            umask=-1 if name == "ray" else 0o077,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _check_ports(cluster: Cluster) -> None:
    if not 0 <= cluster.offset <= MOST_OFFSET:
        raise SystemExit(
            f"an offset of {cluster.offset} would move a port of Ray into the range of its workers; "
            f"choose one from 0 to {MOST_OFFSET}"
        )
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
    progress: Progress,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    while progress.seconds < READY_S:
        if process is not None and process.poll() is not None:
            raise SystemExit(f"{what} ended at once; see the logs in {cluster.state}")
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).is_success:
                return
        progress.waiting(what)
        time.sleep(0.5)
    raise SystemExit(f"{what} did not answer at {url}; see the logs in {cluster.state}")


def _moved(cluster: Cluster) -> Config:
    """The config with the gateway's port of this instance, as Serve gets it."""
    http = {**cluster.config["http_options"], "port": cluster.gateway_port}
    return {**cluster.config, "http_options": http}


def _deploy(cluster: Cluster, progress: Progress) -> None:
    answer = httpx.put(
        cluster.url("Ray dashboard") + APPLICATIONS,
        json=_moved(cluster),
        timeout=60,
    )
    if answer.is_error:
        raise SystemExit(f"Serve refused the configuration: {answer.text[:2000]}")
    _wait_for_applications(cluster, progress)


def _wait_for_applications(cluster: Cluster, progress: Progress) -> None:
    seen: dict[str, str] = {}
    starting: defaultdict[str, StartingReplicas] = defaultdict(StartingReplicas)
    url = cluster.url("Ray dashboard") + APPLICATIONS
    while progress.seconds < READY_S:
        with suppress(httpx.HTTPError):
            for name, application in (
                httpx.get(url, timeout=10).json()["applications"].items()
            ):
                for replica in sorted(starting[name].failed(application)):
                    progress.say(
                        f"  {name}: replica {replica} ended while it started, and another one starts"
                        f"{failure_of(application)}; see the newest worker-*.err under {LOGS}"
                    )
                now = application["status"]
                if seen.get(name) != now:
                    progress.say(f"  {name}: {now.lower().replace('_', ' ')}")
                if now == "DEPLOY_FAILED":
                    raise SystemExit(
                        f"{name} failed to start: {application['message'][-2000:]}{failure_of(application)}"
                    )
                seen[name] = now
            if seen and all(
                seen.get(a["name"]) == "RUNNING" for a in cluster.config["applications"]
            ):
                return
        late = [name for name, status in seen.items() if status != "RUNNING"]
        progress.waiting(", ".join(late) or "Serve")
        time.sleep(1)
    raise SystemExit(f"not all applications became ready within {READY_S} s: {seen}")
