"""Tests an outage of MLflow under load: requests are not affected, and afterwards MLflow has all data.

The server hangs for OUTAGE_S seconds, 6 by default (SIGSTOP: it accepts connections and never answers).
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from mlflow import MlflowClient

from deployments.router.actor import Router
from deployments.settings import GatewaySettings
from policies.events import Feedback, Outcome
from policies.types import Objective, Request
from tests.support.requests import make_profile

ROOT = Path(__file__).resolve().parents[3]
OUTAGE_S = float(os.environ.get("OUTAGE_S", "6"))
RATE = 50.0  # requests a second


class Load:
    """Sends requests at a constant rate to a real router, scores them, and measures how long each decision took."""

    def __init__(self, folder: Path):
        settings = {
            "models": {"small": {}, "large": {}},
            "journal": f"sqlite:///{folder}/journal.db",
        }
        self.router = Router(
            GatewaySettings.model_validate(settings), lambda _: {"small": 1, "large": 1}
        )
        self.times: list[float] = []
        self.waits: list[float] = []
        self.scores = 0
        self.ends = False
        self._finishing: set[asyncio.Task[None]] = set()

    async def play(self) -> None:
        """Send requests until `ends` is set."""
        due = time.perf_counter()
        profile = make_profile()
        identity = self.router._learner.ids
        while not self.ends:
            due += 1 / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            request = Request(identity.new_id(time.time()), profile, Objective(0.1))
            began = time.perf_counter()
            (decision,) = await self.router.decide([request], "an ingress", {})
            self.waits.append(time.perf_counter() - began)
            self.times.append(time.time())
            task = asyncio.create_task(self._finish(decision))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)
        await asyncio.gather(*self._finishing)

    async def _finish(self, decision: object) -> None:
        await self.router.observe(
            [(decision, Outcome(decision.id, "ok", 0.05, 0.1))], "an ingress", {}
        )  # type: ignore
        await self.router.feedback([Feedback(decision.id, 1.0, "user", time.time())])  # type: ignore[attr-defined]
        self.scores += 1

    def p99(self, spans: list[tuple[float, float]]) -> float:
        """The 99th percentile of each second of these spans; returns their median, in seconds."""
        # read first, as it is the shorter one while the load runs
        at = np.array(self.times)
        waits = np.array(self.waits[: len(at)])
        starts = [
            start for begin, end in spans for start in np.arange(begin, end - 0.5)
        ]
        parts = [waits[(at >= start) & (at < start + 1)] for start in starts]
        return float(
            np.median([np.quantile(part, 0.99) for part in parts if len(part)])
        )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real MLflow server in its own process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path),
    ]
    off = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with open(tmp_path / "mlflow.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | off,
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                httpx.get(f"{uri}/health", timeout=1)
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield uri, process
    finally:
        for kind in (signal.SIGCONT, signal.SIGKILL):
            os.killpg(process.pid, kind)
        process.wait()


def follow(
    worker: subprocess.Popen[str], lines: list[tuple[float, float, int, str]]
) -> None:
    for line in worker.stdout or ():
        took, row, wrong = line.split()
        lines.append((time.time(), float(took), int(row), wrong))


def until(check: object, patience_s: float = 240.0) -> None:
    ends = time.time() + patience_s
    while not check():  # type: ignore[operator]
        assert time.time() < ends, "the condition did not become true"
        time.sleep(0.2)


@pytest.mark.slow
def test_mlflow_stops_under_load(
    tmp_path: Path, server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    """Decisions keep their rate, no row is lost, and the export catches up soon after.

    The latency that the outage adds to a decision is printed; its bar is that of T14 in the catalogue of faults.
    """
    uri, process = server
    load = Load(tmp_path)
    lines = list[tuple[float, float, int, str]]()
    command = [
        sys.executable,
        "-m",
        "tests.support.exporter_worker",
        f"sqlite:///{tmp_path}/journal.db",
        uri,
    ]
    worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    threading.Thread(target=follow, args=(worker, lines), daemon=True).start()
    player = threading.Thread(target=lambda: asyncio.run(load.play()))
    player.start()
    calm = list[tuple[float, float]]()
    away = list[tuple[float, float]]()
    journal = load.router._journal
    try:
        until(lambda: lines and lines[-1][2] > 100 and lines[-1][3] == "-")
        begins = time.time()
        time.sleep(OUTAGE_S)
        os.killpg(process.pid, signal.SIGSTOP)
        stopped = time.time()
        time.sleep(OUTAGE_S)
        os.killpg(process.pid, signal.SIGCONT)
        again = time.time()
        until(lambda: lines[-1][0] > again and lines[-1][3] == "-")
        calm.append((begins, stopped))
        away.append((stopped, again))
        print(f"\n{len(load.waits)} requests; MLflow hung for {OUTAGE_S:g} s")
        print(
            f"p99 {1000 * load.p99(calm):.3f} ms, then {1000 * load.p99(away):.3f} ms"
        )
        print(f"caught up {lines[-1][0] - again:.0f} s later")
        load.ends = True
        player.join()
        until(
            lambda: lines[-1][2] == journal.last_row and time.time() - lines[-1][0] < 1
        )
        time.sleep(4)  # the last interval is over
    finally:
        load.ends = True
        worker.kill()
    assert any(
        wrong != "-" for at, _, _, wrong in lines if away[0][0] < at < away[0][1] + 4
    ), "MLflow did not hang"
    at = np.array(load.times)
    made = [
        sum(((at >= begin) & (at < end)).sum() / (end - begin) for begin, end in spans)
        for spans in (calm, away)
    ]
    assert made[1] > made[0] / 2, "decisions a second: calm, and while it hung"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("outage").experiment_id
    (run,) = client.search_runs([experiment], "tags.policy_version = ''")
    assert run.data.metrics["feedback_total"] == load.scores == len(load.waits)
    history = client.get_metric_history(run.info.run_id, "feedback_total")
    assert history[-1].step == len(load.waits)
    told = {point.timestamp // 1000 for point in history}
    wanted = {
        second
        for stopped, again in away
        for second in range(int(stopped) + 1, int(again) + 1)
    }
    assert wanted <= told, "every second of the outage has its point"
