"""The replicas of one size behind the product's admission rule, on a simulated clock."""

from collections.abc import Callable
from math import inf

import numpy as np

from benchmarks.cluster.hardware import Size
from benchmarks.cluster.replica import Job, Replica
from deployments.dispatch.admission import NORMAL, Places
from deployments.settings import AdmissionSettings
from policies.types import ModelState


class Pool:
    """The replicas of a size, and the queue in front of them.

    A request that has a slot goes to the less loaded of two random replicas, as in Ray Serve.

    Args:
        size: the model.
        admission: its settings; `max_running` is taken from the engine.
        clock: the simulated time.
        rng: for the choice of the two replicas.
    """

    def __init__(
        self,
        size: Size,
        admission: AdmissionSettings,
        clock: Callable[[], float],
        rng: np.random.Generator,
    ):
        self.size = size
        self.places: Places[Job] = Places(clock)
        running = {"max_running": size.engine.max_running}
        self.places.settings = admission.model_copy(update=running)
        self.replicas = [Replica(size.engine) for _ in range(size.replicas)]
        self._stopping: list[Replica] = []  # with requests that they still answer
        self.gpu_s = 0.0
        self.busy_gpu_s = 0.0  # of replicas that are gone
        self.starts = self.stops = 0
        self._clock = clock
        self._rng = rng
        self._counted_s = 0.0
        self._slowdown = 1.0

    @property
    def ready(self) -> list[Replica]:
        """The replicas that can work now."""
        return [
            replica for replica in self.replicas if replica.ready_s <= self._clock()
        ]

    def state(self) -> ModelState:
        """What the router sees of this size."""
        ready = len(self.ready)
        self.places.replicas = ready
        return ModelState(
            in_flight=self.places.running + self.places.waiting,
            replicas=ready,
            healthy=ready > 0,
            wait_s=self.places.wait_s(NORMAL),
        )

    def full(self) -> bool:
        """Whether the admission rule would refuse a request now."""
        self.places.replicas = len(self.ready)
        return self.places.full(NORMAL)

    def submit(self, job: Job) -> tuple[int, int, Job] | None:
        """Take a request; returns its entry in the queue if it must wait."""
        if self.places.take():
            self._start(job)
            return None
        return self.places.queue(NORMAL, job)

    def next_s(self) -> float:
        """When something happens next in a replica."""
        alive = (*self.replicas, *self._stopping)
        return min((replica.next_s() for replica in alive), default=inf)

    def advance(self, now_s: float) -> list[Job]:
        """Work up to this time; returns the requests that finished, in their order."""
        alive = (*self.replicas, *self._stopping)
        self.gpu_s += self.size.engine.gpus * len(alive) * (now_s - self._counted_s)
        self._counted_s = now_s
        finished = [job for replica in alive for job in replica.advance(now_s)]
        for replica in [one for one in self._stopping if not one.jobs]:
            self._stopping.remove(replica)
            self.busy_gpu_s += self.size.engine.gpus * replica.busy_s
        return sorted(finished, key=lambda job: job.finished_s)

    def finish(self, job: Job) -> None:
        """Free the slot of a finished request, and assign it."""
        self.places.release(job.started_s)
        self.assign()

    def assign(self) -> None:
        """Give free slots to the requests that wait."""
        ready = len(self.ready)
        self.places.replicas = ready
        while ready and (job := self.places.next_ticket()) is not None:
            self.places.running += 1
            self._start(job)

    def busy_gpus_s(self) -> float:
        """GPU-seconds in which a replica had work."""
        alive = (*self.replicas, *self._stopping)
        working = sum(replica.busy_s for replica in alive)
        return self.busy_gpu_s + self.size.engine.gpus * working

    def kill(self, now_s: float) -> list[Job]:
        """A replica dies and is started anew; returns its requests, whose slots are free again."""
        replica = max(self.replicas, key=lambda one: one.jobs)
        lost = replica.fail(now_s)
        replica.ready_s = now_s + self.size.engine.start_s
        self.starts += 1
        for _ in lost:
            self.places.release(None)
        return lost

    def slow_down(self, factor: float) -> None:
        """Every step takes this many times as long from now on."""
        self._slowdown = factor
        for replica in self.replicas:
            replica.slowdown = factor

    def resize(self, wanted: int) -> None:
        """Start or stop replicas until so many are there, those that start included.

        Those that are not ready stop first, then the least loaded ones. A stopped replica gets no request any more and
        ends when its last one is answered. Its GPUs count from the beginning of its start to its end.
        """
        now_s = self._clock()
        for _ in range(wanted - len(self.replicas)):
            replica = Replica(self.size.engine, now_s + self.size.engine.start_s)
            replica.slowdown = self._slowdown
            self.replicas.append(replica)
            self.starts += 1
        order = sorted(self.replicas, key=lambda one: (one.ready_s <= now_s, one.jobs))
        for replica in order[: max(0, len(self.replicas) - wanted)]:
            self.replicas.remove(replica)
            self._stopping.append(replica)
            self.stops += 1

    def _start(self, job: Job) -> None:
        now_s = self._clock()
        ready = self.ready
        if len(ready) > 2:
            pair = self._rng.choice(len(ready), 2, replace=False)
            ready = [ready[i] for i in pair]
        job.started_s = now_s
        min(ready, key=lambda replica: replica.jobs).add(job, now_s)
