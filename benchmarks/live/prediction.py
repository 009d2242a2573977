"""Measured requests at one replica of the simulated cluster, and the percentiles that it predicts of them."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from benchmarks.cluster.fleet import Pool
from benchmarks.cluster.hardware import Engine, Size
from benchmarks.cluster.replica import Job
from benchmarks.validation import Bounds, Fitted, Measured, Row
from deployments.settings import AdmissionSettings
from policies.types import Vector

TTFT, LATENCY = "TTFT", "latency"
FIGURES = ((TTFT, 50), (TTFT, 95), (LATENCY, 50), (LATENCY, 95))
MODEL = "model"
Waiting = deque[tuple[float, tuple[int, int, Job]]]  # until when, entry of the queue


@dataclass(frozen=True)
class Times:
    """Seconds from the sending of N requests to their first and last token; NaN where one was refused."""

    ttft_s: Vector
    latency_s: Vector

    def of(self, name: str) -> Vector:
        """Those of the answers: TTFT or LATENCY."""
        values = self.ttft_s if name == TTFT else self.latency_s
        return np.asarray(values[~np.isnan(values)])


def measured(run: Measured) -> Times:
    """What was measured of a run."""
    answered = np.array([one.answered for one in run.requests])
    first = np.array([one.ttft_s for one in run.requests])
    whole = np.array([one.latency_s for one in run.requests])
    return Times(np.where(answered, first, np.nan), np.where(answered, whole, np.nan))


def simulated(fitted: Fitted, run: Measured, bounds: Bounds) -> Times:
    """The requests of a run at the simulated cluster's pool of one replica, with its admission.

    A refused request has no tokens, and gets the median of the others.
    """
    engine = Engine(
        1.0,
        fitted.prefill_tokens_s,
        fitted.step_s,
        fitted.sequence_s,
        bounds.kv_tokens,
        fitted.chunk,
        bounds.max_running,
    )
    prompts = _filled([one.prompt for one in run.requests])
    answers = _filled([one.answer for one in run.requests])
    jobs = [
        Job(n, one.sent_s, int(prompts[n]), int(answers[n]))
        for n, one in enumerate(run.requests)
    ]
    Line(engine, bounds).serve(jobs)
    first = np.array([job.first_s - job.arrived_s for job in jobs])
    whole = np.array([job.finished_s - job.arrived_s for job in jobs])
    refused = np.isinf(whole)
    first[refused] = whole[refused] = np.nan
    return Times(first + fitted.overhead_s, whole + fitted.overhead_s)


class Line:
    """One replica of the simulated cluster, and the queue in front of it.

    Args:
        engine: of the replica.
        bounds: of the queue.
    """

    def __init__(self, engine: Engine, bounds: Bounds):
        self._now_s = 0.0
        self._wait_s = bounds.max_wait_s
        admission = AdmissionSettings(
            max_queued=bounds.max_queued, max_queue_wait_s=bounds.max_wait_s
        )
        self._pool = Pool(
            Size(MODEL, engine, 1),
            admission,
            lambda: self._now_s,
            np.random.default_rng(0),
        )

    def serve(self, jobs: Sequence[Job]) -> None:
        """Answer all requests, which then have their times; those of a refused one stay infinite."""
        waiting: Waiting = deque()
        for job in sorted(jobs, key=lambda one: one.arrived_s):
            self._advance(job.arrived_s, waiting)
            if self._pool.full():
                continue
            entry = self._pool.submit(job)
            if entry is not None:
                waiting.append((job.arrived_s + self._wait_s, entry))
        self._advance(inf, waiting)

    def _advance(self, until_s: float, waiting: Waiting) -> None:
        """Work up to a time. Requests that have waited as long as the admission allows are given up."""
        while True:
            change_s = self._pool.next_s()
            limit_s = waiting[0][0] if waiting else inf
            next_s = min(change_s, limit_s)
            if next_s > until_s or next_s == inf:
                break
            self._now_s = max(self._now_s, next_s)
            for job in self._pool.advance(self._now_s):
                self._pool.finish(job)
            if limit_s <= self._now_s:
                _, entry = waiting.popleft()
                if entry[2].started_s == inf:
                    self._pool.places.withdraw(entry)
        if until_s < inf:
            self._now_s = until_s
            for job in self._pool.advance(until_s):
                self._pool.finish(job)


def _filled(tokens: Sequence[int]) -> Vector:
    found = np.array(tokens, float)
    known = found[found > 0]
    return np.where(found > 0, found, np.median(known) if len(known) else 1.0)


def predict(fitted: Fitted, runs: Sequence[Measured], bounds: Bounds) -> list[Row]:
    """The FIGURES at each load, predicted and measured. A load at which a run has no answers is left out.

    Args:
        fitted: the parameters.
        runs: at loads that were not fitted; those of a load have the same arrivals and questions.
        bounds: of the model.
    """
    rows = []
    for load in sorted({run.load for run in runs}):
        own = [run for run in runs if run.load == load]
        real = [measured(run) for run in own]
        expected = [simulated(fitted, run, bounds) for run in own]
        if not all(len(times.of(TTFT)) for times in (*real, *expected)):
            continue
        for name, share in FIGURES:
            values = [_percentile(times, name, share) for times in real]
            predicted = [_percentile(times, name, share) for times in expected]
            mean = float(np.mean(values))
            rows.append(
                Row(
                    load,
                    f"{name} p{share}",
                    float(np.mean(predicted)),
                    mean,
                    (max(values) - min(values)) / mean,
                )
            )
    return rows


def _percentile(times: Times, name: str, share: int) -> float:
    return float(np.percentile(times.of(name), share))
