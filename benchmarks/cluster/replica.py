"""A replica of a model with continuous batching, on a simulated clock."""

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from benchmarks.cluster.hardware import Engine

BLOCK = 512  # tokens of a block of the prefix cache
NEGLIGIBLE = 1e-6  # tokens


@dataclass
class Job:
    """A request on its way through the cluster.

    number: of the request in the workload.
    arrived_s: its arrival. started_s: when it got its slot. first_s, finished_s: its first and its last token.
    prompt, answer: tokens. blocks: ids of the blocks of its prompt; empty if they are unknown.
    size: column of the model that answers it.
    """

    number: int
    arrived_s: float
    prompt: int
    answer: int
    blocks: Sequence[int] = ()
    size: int = -1
    started_s: float = inf
    first_s: float = inf
    finished_s: float = inf
    unread: float = 0.0  # prompt tokens that the engine has still to read

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens."""
        return self.prompt + self.answer


class Replica:
    """One engine: prompts are read one after the other, and all running answers get one token a step.

    Between two changes of the batch all rates are constant, so the clock jumps from one change to the next. A request
    begins when its prompt and its whole answer fit into the memory; no request is preempted.

    Args:
        engine: its speed and memory.
        ready_s: when it begins to work.
    """

    def __init__(self, engine: Engine, ready_s: float = 0.0):
        self.engine = engine
        self.ready_s = ready_s
        self.slowdown = 1.0  # factor on the duration of a step
        self.busy_s = 0.0
        self.now_s = ready_s
        self._queue: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._made = 0.0  # tokens of an answer that has run from the beginning
        self._answers: list[tuple[float, int, Job]] = []  # a heap, by last token
        self._memory = 0
        self._cached: OrderedDict[int, None] = OrderedDict()  # the oldest block first

    @property
    def jobs(self) -> int:
        """Number of requests that it has."""
        return len(self._queue) + len(self._reading) + len(self._answers)

    @property
    def running(self) -> int:
        """Number of requests in the batch."""
        return len(self._reading) + len(self._answers)

    def step_s(self) -> float:
        """Duration of a step with the present batch."""
        engine = self.engine
        reading = engine.chunk / engine.prefill_tokens_s if self._reading else 0.0
        step = engine.step_s + engine.sequence_s * len(self._answers) + reading
        return step * self.slowdown

    def add(self, job: Job, now_s: float) -> list[Job]:
        """Take a request; returns what has finished up to now."""
        finished = self.advance(now_s)
        self._queue.append(job)
        self._admit()
        return finished

    def next_s(self) -> float:
        """When the batch changes next; infinite if it is empty."""
        start = max(self.now_s, self.ready_s)
        step = self.step_s()
        soonest = inf
        if self._reading:
            soonest = self._reading[0].unread / self.engine.chunk * step
        if self._answers:
            soonest = min(soonest, (self._answers[0][0] - self._made) * step)
        return start + max(0.0, soonest)

    def advance(self, now_s: float) -> list[Job]:
        """Work up to this time; returns the requests that finished."""
        finished: list[Job] = []
        while self.running and (change_s := self.next_s()) <= now_s:
            self._work(change_s)
            self._change(finished)
        if self.running and now_s > self.ready_s:
            self._work(now_s)
        self.now_s = max(self.now_s, now_s)
        return finished

    def fail(self, now_s: float) -> list[Job]:
        """Lose everything; returns the requests that must begin anew elsewhere."""
        lost = [
            *(job for _, _, job in self._answers),
            *self._reading,
            *self._queue,
        ]
        self._queue.clear()
        self._reading.clear()
        self._answers.clear()
        self._cached.clear()
        self._memory = 0
        self.now_s = now_s
        return lost

    def _work(self, until_s: float) -> None:
        """Advance the rates to a time before which the batch does not change."""
        duration = until_s - max(self.now_s, self.ready_s)
        if duration > 0:
            steps = duration / self.step_s()
            self._made += steps
            self.busy_s += duration
            if self._reading:
                self._reading[0].unread -= steps * self.engine.chunk
        self.now_s = max(self.now_s, until_s)

    def _change(self, finished: list[Job]) -> None:
        """Move the requests whose prompt or answer is complete."""
        if self._reading and self._reading[0].unread <= NEGLIGIBLE:
            job = self._reading.popleft()
            job.first_s = self.now_s
            last = self._made + max(0, job.answer - 1)
            heapq.heappush(self._answers, (last, job.number, job))
        while self._answers and self._answers[0][0] - self._made <= NEGLIGIBLE:
            _, _, job = heapq.heappop(self._answers)
            job.finished_s = self.now_s
            self._memory -= job.tokens
            finished.append(job)
        self._admit()

    def _admit(self) -> None:
        engine = self.engine
        while self._queue and self.running < engine.max_running:
            job = self._queue[0]
            if self.running and self._memory + job.tokens > engine.kv_tokens:
                return
            self._queue.popleft()
            self._memory += job.tokens
            job.unread = max(1.0, job.prompt - self._known_tokens(job))
            self._reading.append(job)

    def _known_tokens(self, job: Job) -> int:
        """Prompt tokens whose blocks are cached; the prompt's blocks are cached from now on."""
        known = 0
        for block in job.blocks:
            if block not in self._cached:
                break
            known += BLOCK
        for block in job.blocks:
            self._cached[block] = None
            self._cached.move_to_end(block)
        room = max(0, self.engine.kv_tokens - self._memory) // BLOCK
        while len(self._cached) > room:
            self._cached.popitem(last=False)
        return min(known, job.prompt - 1)
