"""A fake Ray dashboard: Serve's REST API for applications, with the config that was deployed last."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Config = dict[str, Any]
DEPLOYMENTS = {"gateway": ("Ingress", "Profiler")}


def details_of(config: Config, status: str = "RUNNING") -> Config:
    """What Serve says of a deployed config: each application with one running replica of each deployment."""
    applications = {}
    for application in config["applications"]:
        name = application["name"]
        replica = {"replica_id": "r", "state": "RUNNING"}
        deployments = {
            each: {"name": each, "target_num_replicas": 1, "replicas": [replica]}
            for each in DEPLOYMENTS.get(name, (f"Model:{name}",))
        }
        # Serve gives an application the logging_config of the whole system
        logging = config.get("logging_config", {})
        applications[name] = {
            "name": name,
            "status": status,
            "message": "",
            "deployed_app_config": {"logging_config": logging, **application},
            "deployments": deployments,
        }
    return {
        "proxy_location": config.get("proxy_location", "HeadOnly"),
        "http_options": {"host": "0.0.0.0", **config.get("http_options", {})},
        "applications": copy.deepcopy(applications),
    }


class Dashboard:
    """The fake's state.

    Attributes:
        details: what it answers; None for nothing.
        deployed: the configs that were sent to it, in order.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.details: Config = {"applications": {}}
        self.deployed: list[Config] = []
        self.refusal = ""


@contextmanager
def dashboard() -> Iterator[Dashboard]:
    """A fake dashboard on a free port of loopback; it also answers MLflow's /health."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, made.details)

        def do_PUT(self) -> None:
            length = int(self.headers["content-length"])
            config = json.loads(self.rfile.read(length))
            if made.refusal:
                self._reply(400, made.refusal)
                return
            made.deployed.append(config)
            made.details = details_of(config)
            self._reply(200, {})

        def _reply(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Dashboard(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
