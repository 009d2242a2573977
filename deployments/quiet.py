"""Keeps idle engines from burning the processor: loaded into vLLM's processes by `worker_extension_cls`.

A vLLM worker spins for a second after every step before it goes to sleep, to save microseconds on machines with a
core to spare for each. Where several engines share two cores, the idle ones take the time of the busy one: and
a mixed stream is answered later. Here a worker spins only as long as a step of these small models takes.
"""

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SPIN_S = 0.02

_wait = SpinCondition.wait


def _wait_asleep(self: SpinCondition, *args: object, **options: object) -> None:
    self.busy_loop_s = SPIN_S
    _wait(self, *args, **options)


SpinCondition.wait = _wait_asleep


class QuietWorker:
    """Adds nothing to the worker but the import of this module."""
