"""The event loop: requests arrive, a router chooses a size, replicas answer, and the router learns from the answers."""

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Protocol

import numpy as np

from benchmarks.cluster.fleet import Pool
from benchmarks.cluster.hardware import Size
from benchmarks.cluster.replica import Job
from benchmarks.cluster.workload import Workload
from deployments.settings import AdmissionSettings
from policies.base import Policy
from policies.constraints import Exclusion
from policies.events import Decision, Outcome
from policies.scarcity import ScarcityPrices, ScarcitySettings
from policies.types import Arm, ModelState, Objective, Request, Vector

EXPLORE = 0.2  # as the judge's default
NO_EVENT = ""


@dataclass(frozen=True)
class Plan:
    """What happens besides the arrivals.

    rate: requests a second.
    scored: share of the answers that get a score, which is known before the choice. first: share of these scores that
        go to the first requests.
    event: "", or what happens at noon, half of the way: "degrade", "death" or "price" (see `run`).
    scarcity: the constants of the scarcity price; None switches it off.
    """

    rate: float
    scored: float = 0.1
    first: float = 0.5
    event: str = NO_EVENT
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    scarcity: ScarcitySettings | None = field(default_factory=ScarcitySettings)

    def rates(self, count: int) -> Vector:
        """[N] the probability of each request that its answer is scored."""
        at_first = round(self.first * self.scored * count)
        later = max(0.0, self.scored * count - at_first) / max(1, count - at_first)
        return np.where(np.arange(count) < at_first, 1.0, later)


@dataclass(frozen=True)
class Run:
    """What happened to N requests on K sizes.

    chosen: [N] column of the size that answered; -1 if the request was refused.
    scored: [N] whether the answer got a score.
    score, cost: [N] 0 if refused. ttft_s, latency_s, tpot_s: [N] NaN if refused.
    decision_s: [N] processor time of each decision.
    utilisation: [K] share of the replicas' time with work.
    gpu_hours: [K] of all replicas, those that start included. busy_gpu_hours: of those with work.
    starts, stops, retries: numbers of replicas started and stopped, and of requests that began anew.
    """

    chosen: Vector
    scored: Vector
    score: Vector
    cost: Vector
    ttft_s: Vector
    latency_s: Vector
    tpot_s: Vector
    decision_s: Vector
    utilisation: Vector
    gpu_hours: Vector
    busy_gpu_hours: float
    starts: int
    stops: int
    retries: int

    def utility(self, objective: Objective) -> Vector:
        """[N] of each request; 0 for a refused one."""
        latency = np.nan_to_num(self.latency_s)
        return (
            self.score
            - objective.latency_weight * latency
            - objective.cost_weight * self.cost
        )


class Scaler(Protocol):
    """Starts and stops replicas while requests are routed.

    Attributes:
        every_s: time between two looks.
    """

    every_s: float

    def decided(self, decision: Decision, now_s: float) -> None:
        """Take note of a request, unless every queue was full."""

    def answered(self, decision: Decision, outcome: Outcome) -> None:
        """Take note of an answer."""

    def look(
        self,
        pools: Sequence[Pool],
        router: Policy,
        states: Mapping[str, ModelState],
        now_s: float,
    ) -> None:
        """Change the number of replicas."""


class Simulation:
    """A router on a workload.

    Args:
        sizes: K sizes, in the order of the workload's columns.
        load: the requests.
        plan: what happens besides.
        cost: [K] cost of an answer, as a share of the dearest size's.
        objective: of every request.
        seed: of all random choices.
        scaler: starts and stops replicas; None leaves their numbers as they are.
    """

    def __init__(
        self,
        sizes: tuple[Size, ...],
        load: Workload,
        plan: Plan,
        cost: Vector,
        objective: Objective,
        seed: int,
        scaler: Scaler | None = None,
    ):
        self._scaler = scaler
        self._sizes = sizes
        self._load = load
        self._plan = plan
        self._objective = objective
        self._rng = np.random.default_rng(seed)
        self._slots = max(size.engine.max_running for size in sizes)
        places = np.random.default_rng(seed + 1)
        self._names = [size.name for size in sizes]
        self._column = {name: k for k, name in enumerate(self._names)}
        self._now_s = 0.0
        self._pools = [
            Pool(size, plan.admission, lambda: self._now_s, places) for size in sizes
        ]
        arms = [Arm(size.name, ("chat",)) for size in sizes]
        self._prices = ScarcityPrices(arms, plan.scarcity or ScarcitySettings())
        count = len(load)
        self._rates = plan.rates(count)
        self._scored = np.random.default_rng(seed + 2).random(count) < self._rates
        self._scores = load.scores.copy()
        self._costs = np.tile(np.asarray(cost, float), (count, 1))
        self._arrivals = load.arrival_s / plan.rate
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._decisions: dict[int, Decision] = {}
        self._jobs: dict[int, Job] = {}
        self._entries: dict[int, tuple[int, int, Job] | None] = {}  # the latest ones
        self._decision_s = np.zeros(count)
        self._decided = self._given = self._retries = 0

    def run(
        self,
        router: Policy,
        only: str = "",
        reprice: Callable[[Policy, Vector], Policy] | None = None,
        progress: Callable[[], object] | None = None,
    ) -> Run:
        """Simulate the whole workload.

        At noon "degrade" halves the scores of the dearest size and doubles the time of its steps, "death" kills one of
        its replicas, and "price" makes it four times as expensive.

        Args:
            router: decides and learns.
            only: the size that every request names; "" for none.
            reprice: the router with other costs [K], for "price".
            progress: is called after each arrival.
        """
        self._router = router
        self._only = only
        for n, at_s in enumerate(self._arrivals.tolist()):
            self._at(at_s, lambda n=n: self._arrive(n))  # type: ignore[misc]
        if self._plan.event:
            noon_s = float(self._arrivals[len(self._arrivals) // 2])
            self._at(noon_s, lambda: self._noon(reprice))
        if self._scaler is not None:
            self._scale(self._scaler)
        arrived = 0
        while True:
            event_s = self._events[0][0] if self._events else inf
            next_s = min(event_s, *(pool.next_s() for pool in self._pools))
            if next_s == inf:
                break
            self._now_s = max(self._now_s, next_s)
            for pool in self._pools:
                for job in pool.advance(self._now_s):
                    self._finish(pool, job)
            while self._events and self._events[0][0] <= self._now_s:
                heapq.heappop(self._events)[2]()
            if progress:
                while arrived < self._decided:
                    progress()
                    arrived += 1
        return self._result()

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, event))

    def _arrive(self, n: int) -> None:
        load = self._load
        at_s = float(self._arrivals[n])
        job = Job(n, at_s, int(load.prompts[n]), 0, load.blocks[n])
        self._jobs[n] = job
        self._route(job)

    def _route(self, job: Job) -> None:
        """Decide, and send the request to the queue of the chosen size, unless all queues are full."""
        n = job.number
        states = self._states()
        full = [pool.size.name for pool in self._pools if pool.full()]
        sentence = Exclusion.QUEUE_FULL.sentence()
        objective = replace(
            self._objective,
            models=(self._only,) if self._only else (),
            unavailable=tuple((name, sentence) for name in full),
        )
        scored = bool(self._scored[n])
        request = Request(
            str(n),
            self._load.profiles[n],
            objective,
            score_chance=float(scored),
            explore=EXPLORE * (1.0 - float(self._rates[n])) if scored else 0.0,
        )
        self._router.advance(self._decided, self._given)
        started = time.process_time()
        (decision,) = self._router.decide([request], states, self._rng, self._decided)
        self._decision_s[n] = time.process_time() - started
        self._prices.decided(decision)
        if self._scaler is not None and len(full) < len(self._pools):
            self._scaler.decided(decision, self._now_s)
        self._decided += 1
        if not decision.arm:
            job.size = -1  # refused: 429
            return
        self._decisions[n] = decision
        job.size = self._column[decision.arm]
        job.answer = int(self._load.answers[n, job.size])
        pool = self._pools[job.size]
        entry = pool.submit(job)
        self._entries[n] = entry
        if entry is not None:
            limit_s = self._now_s + self._plan.admission.max_queue_wait_s
            self._at(limit_s, lambda: self._give_up(pool, job, entry))

    def _states(self) -> dict[str, ModelState]:
        states = {pool.size.name: pool.state() for pool in self._pools}
        if self._plan.scarcity is not None:
            states = self._prices.priced(states, self._now_s, self._slots)
        return states

    def _give_up(self, pool: Pool, job: Job, entry: tuple[int, int, Job]) -> None:
        """Refuse a request that has waited as long as the admission allows."""
        if job.started_s == inf and self._entries[job.number] is entry:
            pool.places.withdraw(entry)
            job.size = -1

    def _finish(self, pool: Pool, job: Job) -> None:
        """Teach the router what the answer shows."""
        pool.finish(job)
        n = job.number
        decision = self._decisions.pop(n)
        outcome = Outcome(
            decision.id,
            ttft_s=job.first_s - job.arrived_s,
            latency_s=job.finished_s - job.arrived_s,
            prompt_tokens=job.prompt,
            output_tokens=job.answer,
            waited_s=job.started_s - job.arrived_s,
            streamed=True,
        )
        self._router.learn(decision, outcome)
        if self._scaler is not None:
            self._scaler.answered(decision, outcome)
        if self._scored[n]:
            self._router.score(decision, float(self._scores[n, job.size]))
            self._given += 1

    def _noon(self, reprice: Callable[[Policy, Vector], Policy] | None) -> None:
        n = len(self._arrivals) // 2
        dearest = len(self._sizes) - 1
        pool = self._pools[dearest]
        if self._plan.event == "degrade":
            self._scores[n:, dearest] *= 0.5
            pool.slow_down(2.0)
        elif self._plan.event == "price":
            self._costs[n:, dearest] *= 4.0
            if reprice:
                self._router = reprice(self._router, self._costs[n])
        elif self._plan.event == "death":
            lost = pool.kill(self._now_s)
            self._at(self._now_s + pool.size.engine.start_s, pool.assign)
            for job in lost:
                self._retries += 1
                self._decisions.pop(job.number)
                job.started_s = job.first_s = inf
                self._route(job)

    def _scale(self, scaler: Scaler) -> None:
        scaler.look(self._pools, self._router, self._states(), self._now_s)
        for pool in self._pools:
            pool.assign()
        if self._now_s < self._arrivals[-1]:
            self._at(self._now_s + scaler.every_s, lambda: self._scale(scaler))

    def _result(self) -> Run:
        jobs = [self._jobs[n] for n in range(len(self._load))]
        chosen = np.array([job.size for job in jobs])
        rows = np.arange(len(jobs))
        refused = chosen < 0
        first = np.array([job.first_s - job.arrived_s for job in jobs])
        whole = np.array([job.finished_s - job.arrived_s for job in jobs])
        further = np.array([max(1, job.answer - 1) for job in jobs])
        first[refused] = whole[refused] = np.nan
        pools = self._pools
        return Run(
            chosen,
            self._scored & ~refused,
            np.where(refused, 0.0, self._scores[rows, chosen]),
            np.where(refused, 0.0, self._costs[rows, chosen]),
            first,
            whole,
            (whole - first) / further,
            self._decision_s,
            np.array([pool.busy_gpus_s() / max(pool.gpu_s, 1e-9) for pool in pools]),
            np.array([pool.gpu_s for pool in pools]) / 3600,
            sum(pool.busy_gpus_s() for pool in pools) / 3600,
            sum(pool.starts for pool in pools),
            sum(pool.stops for pool in pools),
            self._retries,
        )


def arms_of(
    sizes: Sequence[Size], cost: Vector, answer_tokens: Vector
) -> tuple[Arm, ...]:
    """The sizes as arms, with a price of a token at which the mean answer has the given cost [K]."""
    prices: Mapping[str, float] = {
        size.name: float(price / tokens)
        for size, price, tokens in zip(sizes, cost, answer_tokens, strict=True)
    }
    return tuple(
        Arm(size.name, ("chat",), 1 << 30, 0.0, prices[size.name]) for size in sizes
    )
