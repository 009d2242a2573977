"""Engines that hang are noticed, and none outlives its replica."""

import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from deployments.watchdog import HungEngineError, Watchdog
from tests.gateway import ROOT, eventually

REPLICA = """
import subprocess, sys, time
from deployments import orphans
orphans.guard()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
engine = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stubborn!r}])"
subprocess.Popen([sys.executable, "-c", engine])
print("started", flush=True)
time.sleep(600)
"""


class Outputs:
    """vLLM's output processor, as far as the watchdog knows it."""

    def __init__(self) -> None:
        self.unfinished, self.processed = False, 0

    def process_outputs(self, outputs: list[Any], stamp: float | None = None) -> int:
        self.processed += len(outputs)
        return self.processed

    def has_unfinished_requests(self) -> bool:
        return self.unfinished


def test_silence_with_requests_is_a_hang_and_silence_without_is_not() -> None:
    """Idle for an hour is well; busy and silent beyond the limit is not; a token makes it well again."""
    outputs, now = Outputs(), [0.0]
    watchdog = Watchdog(outputs, stall_s=20, clock=lambda: now[0])
    for now[0] in (10.0, 3600.0):
        watchdog.check()
    outputs.unfinished, now[0] = True, 3619.0
    watchdog.check()
    now[0] = 3621.0
    with pytest.raises(HungEngineError, match="no token for 21 s"):
        watchdog.check()
    assert outputs.process_outputs([1, 2], stamp=0.0) == 2  # what it listens to still works
    watchdog.check()
    now[0] = 3700.0
    outputs.unfinished = False
    watchdog.check()


def test_vllm_still_has_what_the_watchdog_listens_to() -> None:
    """A newer vLLM that calls it otherwise would be watched by nobody."""
    from vllm.v1.engine.output_processor import OutputProcessor

    assert callable(OutputProcessor.process_outputs) and callable(OutputProcessor.has_unfinished_requests)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_replica(end: signal.Signals) -> None:
    """Neither the engine nor its worker, which ignores SIGTERM, nor the guard; this process's own group stays."""
    replica = subprocess.Popen([sys.executable, "-c", REPLICA], cwd=ROOT, stdout=subprocess.PIPE)
    assert replica.stdout is not None and replica.stdout.readline() == b"started\n"
    process = psutil.Process(replica.pid)
    eventually(lambda: len(process.children(recursive=True)) >= 3)
    family = process.children(recursive=True)
    assert len(family) == 3
    replica.send_signal(end)
    replica.wait(5)
    began = time.monotonic()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive and time.monotonic() - began < 6
