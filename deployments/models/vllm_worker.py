"""Makes waiting vLLM workers sleep: vLLM loads this module into its processes by `worker_extension_cls`.

A vLLM worker spins for a second after every step before it sleeps. That saves microseconds on a machine with a core for
every worker. Where several engines share few cores, the idle engines take CPU time from the busy one. Worse, a spin is
a loop of sched_yield, and on two cores under Linux 6.18 these loops kept every other process from running for up to two
seconds. With this module a worker polls with short sleeps for as long as a step of these small models takes, and then
waits for a message.

The module replaces a private method of vLLM. tests/deployments/models/test_vllm_worker.py says what to do when vLLM
changes it.
"""

import time

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

POLL_S = 0.02  # after the last read; to wait for a message at once is not safe, because vLLM drops some in a burst
PAUSE_S = 0.0001  # between two polls

_wait = SpinCondition.wait


def _wait_without_spinning(self: SpinCondition, timeout_ms: int | None = None) -> None:
    if time.monotonic() <= self.last_read + POLL_S:
        time.sleep(PAUSE_S)
        return
    self.busy_loop_s = 0.0
    _wait(self, timeout_ms)


SpinCondition.wait = _wait_without_spinning


class IdleSleepWorker:
    """Adds no methods to the worker; vLLM imports this module to find the class."""
