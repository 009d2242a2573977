"""Makes idle vLLM workers sleep: vLLM loads this module into its processes by `worker_extension_cls`.

A vLLM worker spins for a second after every step before it sleeps. That saves microseconds on a machine with a core for
every worker. Where several engines share few cores, the idle engines take CPU time from the busy one. With this module
a worker spins only as long as a step of these small models takes.
"""

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SPIN_S = 0.02

_wait = SpinCondition.wait


def _wait_briefly(self: SpinCondition, *args: object, **options: object) -> None:
    self.busy_loop_s = SPIN_S
    _wait(self, *args, **options)


SpinCondition.wait = _wait_briefly


class IdleSleepWorker:
    """Adds no methods to the worker; vLLM imports this module to find the class."""
