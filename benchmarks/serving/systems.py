"""Starts and stops the systems that benchmarks/serving/gateways.py compares, and measures their CPU and memory."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.serving.echo_engine import TPOT_S, TTFT_S
from deployments.operations import launcher

ROOT = Path(__file__).resolve().parents[2]
# Added to every port. A running system has the offset 0, the system of the tests 100.
PORT_OFFSET = 150
LITELLM = "litellm[proxy]==1.106.2"
ENDPOINT_PORT = 8710
LITELLM_PORT = 8711
MODELS = ("small", "large")


def configuration(ingresses: int = 1) -> dict[str, Any]:
    """Configuration of one Serve instance with all systems but LiteLLM.

    It has two echo models behind our gateway, the same two behind Ray's own ingress, and the minimal HTTP application.

    Args:
        ingresses: replicas of our gateway's ingress.
    """
    replicas = {
        "num_replicas": 1,
        "max_ongoing_requests": 1000,
        "ray_actor_options": {"num_cpus": 0},
    }
    engine = {
        "engine_kwargs": {"max_model_len": 512},
        "log_engine_metrics": False,
        "placement_group_config": {"bundles": [{"CPU": 0.2}]},
        "experimental_configs": {
            "stream_batching_interval_ms": 10,
            "echo_ttft_s": TTFT_S,
            "echo_tpot_s": TPOT_S,
        },
        "deployment_config": replicas,
    }
    source = str(ROOT / "assets/models/nano")
    models = [
        {"model_loading_config": {"model_id": name, "model_source": source}, **engine}
        for name in MODELS
    ]
    product = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    gateway = next(a for a in product["applications"] if a["name"] == "gateway")
    gateway["args"]["models"] = {
        name: {"context_tokens": 512, **_prices(i)} for i, name in enumerate(MODELS)
    }
    del gateway["args"]["mlflow_uri"]
    ingress = next(d for d in gateway["deployments"] if d["name"] == "Ingress")
    ingress["num_replicas"] = ingresses
    del ingress["user_config"]["admission"]  # its limits are for two ingresses
    applications = []
    for name, arguments in zip(MODELS, models, strict=True):
        application = {
            "name": name,
            "route_prefix": None,
            "import_path": "deployments.app:model",
            "args": arguments,
        }
        applications.append(application)
    return {
        "proxy_location": "HeadOnly",
        "http_options": product["http_options"],
        "logging_config": product["logging_config"],
        "applications": [
            *applications,
            gateway,
            {
                "name": "peer",
                "route_prefix": "/peer",
                "import_path": "benchmarks.serving.echo_engine:peer",
                "args": {"llm_configs": models, "ingress_deployment_config": replicas},
            },
            {
                "name": "floor",
                "route_prefix": "/floor",
                "import_path": "benchmarks.serving.echo_engine:floor",
                "args": {},
            },
        ],
    }


def _prices(i: int) -> dict[str, float]:
    return {
        "prompt_price_usd_per_million": 0.1 * (i + 1),
        "output_price_usd_per_million": 0.1 * (i + 1),
    }


class Systems:
    """All compared systems; a context manager that starts and stops them.

    Args:
        state: folder of their files.
        litellm: whether to include LiteLLM.
        ingresses: replicas of our gateway's ingress; the other systems have one.
    """

    def __init__(self, state: Path, litellm: bool = True, ingresses: int = 1):
        state.mkdir(parents=True, exist_ok=True)
        for old in state.glob("journal.db*"):  # so that the router starts without data
            old.unlink()
        path = state / "speed.yaml"
        path.write_text(yaml.safe_dump(configuration(ingresses)))
        os.environ["RAYLLM_VLLM_ENGINE_CLS"] = (
            "benchmarks.serving.echo_engine:EchoEngine"
        )
        self.cluster = launcher.load(path, state, PORT_OFFSET)
        self.state = state
        self._wanted = litellm
        self._beside: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Systems":
        try:
            launcher.start(self.cluster)
            if self._wanted and (
                binary := install_litellm(self.state.parent / "litellm")
            ):
                self._start_litellm(binary)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._beside.values():
            process.terminate()
            process.wait(20)
        launcher.stop(self.cluster)

    @property
    def targets(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """For each system the URL, and the models to ask for in turn."""
        gateway = self.cluster.url("gateway")
        path = "/v1/chat/completions"
        targets = {
            "routed": (gateway + path, ("auto",)),
            "explicit": (gateway + path, MODELS),
            "ray.serve.llm": (f"{gateway}/peer{path}", MODELS),
            "floor": (f"{gateway}/floor{path}", MODELS),
        }
        if "LiteLLM" in self._beside:
            targets["LiteLLM"] = (f"http://127.0.0.1:{LITELLM_PORT}{path}", MODELS)
        return targets

    def _start_litellm(self, binary: Path) -> None:
        base = f"http://127.0.0.1:{ENDPOINT_PORT}/v1"
        routes = [
            {
                "model_name": m,
                "litellm_params": {
                    "model": f"openai/{m}",
                    "api_base": base,
                    "api_key": "none",
                },
            }
            for m in MODELS
        ]
        config = self.state / "litellm.json"
        config.write_text(
            json.dumps({"model_list": routes, "litellm_settings": {"telemetry": False}})
        )
        endpoint = [
            sys.executable,
            "-m",
            "benchmarks.serving.echo_engine",
            "--port",
            str(ENDPOINT_PORT),
        ]
        proxy = [
            str(binary),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(LITELLM_PORT),
        ]
        environment = {
            **os.environ,
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            # LiteLLM is faster without keys, and it listens on loopback only
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        for name, command in (
            ("endpoint", endpoint),
            ("LiteLLM", [*proxy, "--num_workers", "1"]),
        ):
            with open(self.state / f"{name}.log", "ab") as log:
                self._beside[name] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=log
                )
        for _ in range(120):
            with suppress(httpx.HTTPError):
                if httpx.get(
                    f"http://127.0.0.1:{LITELLM_PORT}/health/liveliness", timeout=2
                ).is_success:
                    return
            time.sleep(0.5)
        print("LiteLLM's proxy did not start; it is left out")
        self._beside.pop("LiteLLM").terminate()

    def cpu(self) -> dict[str, float]:
        """CPU seconds of each process so far. A key is the process id and the name."""
        used = {}
        for process in self._processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                used[f"{process.pid} {_name(process)}"] = times.user + times.system
        return used

    def memory(self) -> dict[str, float]:
        """Proportional set size in MiB, by name of the process."""
        taken: dict[str, float] = {}
        for process in self._processes():
            with suppress(psutil.Error):
                name = _name(process)
                taken[name] = (
                    taken.get(name, 0.0) + process.memory_full_info().pss / 2**20
                )
        return taken

    def _processes(self) -> list[psutil.Process]:
        beside = [psutil.Process(process.pid) for process in self._beside.values()]
        found = [*self.cluster.processes(), *beside]
        for process in beside:
            found += process.children(recursive=True)
        return found


def _name(process: psutil.Process) -> str:
    """A name for the purpose of a process. Ray adds the running method to the name of a process."""
    command = process.cmdline()
    line = " ".join(command)
    if line.startswith("ray::"):
        return (
            line.removeprefix("ray::")
            .removeprefix("ServeReplica:")
            .split(".")[0]
            .split(" ")[0]
            .split("(")[0]
        )
    for mark, name in (
        ("litellm", "LiteLLM"),
        ("benchmarks.serving.echo_engine", "endpoint"),
        ("mlflow", "MLflow"),
    ):
        if mark in line:
            return name
    return process.name() if process.name() != "python3.11" else "Ray, other"


def install_litellm(venv: Path) -> Path | None:
    """LiteLLM's command in a virtual environment, which is created if needed; None if the installation fails."""
    binary = venv / "bin/litellm"
    pip = venv / "bin/pip"
    if binary.is_file():
        return binary
    print(f"installing {LITELLM} into {venv}", flush=True)
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", str(venv)],
            check=True,
            capture_output=True,
            timeout=120,
        )
        command = [str(pip), "install", "-q", "--disable-pip-version-check", LITELLM]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    except (subprocess.SubprocessError, OSError) as error:
        print(
            f"LiteLLM could not be installed ({type(error).__name__}); it is left out"
        )
        return None
    return binary if binary.is_file() else None
