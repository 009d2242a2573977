"""The watchdog detects engines that hang, and no engine outlives its replica."""

import asyncio
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from deployments.models.watchdog import HungEngineError, Watchdog
from tests.support import clock
from tests.support.gateway import PATIENCE_S, ROOT, eventually

REPLICA = """
import subprocess, sys, time
from deployments.models import process_reaper
process_reaper.kill_children_on_exit()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
engine = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stubborn!r}])"
subprocess.Popen([sys.executable, "-c", engine])
print("started", flush=True)
time.sleep(600)
"""


class Outputs:
    """A fake of vLLM's output processor, with what the watchdog uses."""

    def __init__(self) -> None:
        self.unfinished = 0
        self.updates = list[Any]()

    def update_scheduler_stats(self, stats: Any) -> None:
        self.updates.append(stats)

    def get_num_unfinished_requests(self) -> int:
        return self.unfinished


def test_silence_with_requests_is_a_hang_and_silence_without_is_not() -> None:
    """An idle engine is healthy; an engine with requests hangs after the limit; a step makes it healthy again."""
    outputs = Outputs()
    now = [0.0]
    watchdog = Watchdog(outputs, stall_s=20, clock=lambda: now[0])
    for now[0] in (10.0, 3600.0):
        watchdog.check()
    outputs.unfinished = 1
    now[0] = 3619.0
    watchdog.check()
    now[0] = 3621.0
    with pytest.raises(HungEngineError, match="no step for 21 s"):
        watchdog.check()
    outputs.update_scheduler_stats("stats")
    assert outputs.updates == ["stats"]  # the original method was called
    watchdog.check()
    now[0] = 3700.0
    outputs.unfinished = 0
    watchdog.check()


def test_a_step_of_a_long_prefill_is_noticed_in_vllms_own_loop() -> None:
    """Such a step makes no token. The test fails if a newer vLLM no longer calls the method that the watchdog wraps."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import SchedulerStats

    outputs = OutputProcessor(None, log_stats=False)
    now = [0.0]
    assert outputs.get_num_unfinished_requests() == 0
    outputs.get_num_unfinished_requests = lambda: 1
    watchdog = Watchdog(outputs, stall_s=20, clock=lambda: now[0])

    async def run() -> None:
        steps: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        engine: Any = SimpleNamespace(
            engine_core=SimpleNamespace(get_output_async=steps.get),
            renderer=SimpleNamespace(mm_processor_cache=None),
            **{
                "output_handler": None,
                "output_processor": outputs,
                "log_stats": False,
                "logger_manager": None,
            },
        )
        AsyncLLM._run_output_handler(engine)
        now[0] = 15.0
        steps.put_nowait(EngineCoreOutputs(scheduler_stats=SchedulerStats()))
        # the test's clock advances when all tasks wait
        await asyncio.sleep(0.1)
        engine.output_handler.cancel()

    clock.run(run())
    now[0] = 34.0
    watchdog.check()
    now[0] = 36.0
    with pytest.raises(HungEngineError):
        watchdog.check()


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.gpu.yaml"])
def test_engines_for_long_prompts_report_each_step(name: str) -> None:
    """An engine without statistics reports no partial step, so its longest prompt must fit into one step."""
    for application in yaml.safe_load((ROOT / name).read_text())["applications"]:
        engine = application["args"].get("engine_kwargs", {})
        if engine.get("disable_log_stats"):
            # a step reads at least this many tokens
            assert engine["max_model_len"] <= 2048


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_engine_outlives_its_replica(end: signal.Signals) -> None:
    """Engine, worker (which ignores SIGTERM) and reaper end with the replica; this process's own group stays."""
    replica = subprocess.Popen(
        [sys.executable, "-c", REPLICA], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert replica.stdout is not None and replica.stdout.readline() == b"started\n"
    process = psutil.Process(replica.pid)
    eventually(lambda: len(process.children(recursive=True)) >= 3)
    family = process.children(recursive=True)
    assert len(family) == 3
    replica.send_signal(end)
    replica.wait(PATIENCE_S)
    # the processes would sleep for ten minutes
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive
