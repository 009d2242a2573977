"""One replica of the simulated cluster that answers measured requests, and the fit of its parameters to them."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

from benchmarks.cluster.fleet import Pool
from benchmarks.cluster.hardware import Engine, Size
from benchmarks.cluster.replica import Job
from benchmarks.validation import Bounds, Fitted, Measured, Row
from deployments.settings import AdmissionSettings
from policies.types import Vector

QUANTILES = (10, 25, 50, 75, 90, 95)  # whose logarithms are fitted
FIGURES = (("TTFT", 50), ("TTFT", 95), ("latency", 50), ("latency", 95))
PRIOR = 0.02  # weight of the first guess, where the measurements leave a parameter open
STEP = 0.03  # of a logarithm, for the derivatives: the simulation is not smooth
RANGE = 7.0  # logarithms of the parameters are at most so far from the first guess
ACCURACY = 1e-3  # relative, of the sum of squares and of the logarithms
FIRST_ROUNDS, LAST_ROUNDS = 8, 25
# factors on the first guess at which the search begins, in the order of the parameters
STARTS = (
    (1.0, 1.0, 1.0, 1.0, 1.0),
    (0.2, 1.0, 3.0, 1.0, 1.0),
    (1.0, 0.7, 8.0, 0.3, 0.5),
)
MODEL = "model"


@dataclass(frozen=True)
class Times:
    """Seconds from the sending of N requests to their first and last token; NaN where one was refused."""

    ttft_s: Vector
    latency_s: Vector

    def of(self, name: str) -> Vector:
        """The answered ones of TTFT or latency."""
        values = self.ttft_s if name == "TTFT" else self.latency_s
        return values[~np.isnan(values)]


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
        waiting: deque[tuple[float, tuple[int, int, Job]]] = deque()
        for job in sorted(jobs, key=lambda one: one.arrived_s):
            self._advance(job.arrived_s, waiting)
            if self._pool.full():
                continue
            entry = self._pool.submit(job)
            if entry is not None:
                waiting.append((job.arrived_s + self._wait_s, entry))
        self._advance(inf, waiting)

    def _advance(
        self, until_s: float, waiting: deque[tuple[float, tuple[int, int, Job]]]
    ) -> None:
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


def fit(runs: Sequence[Measured], bounds: Bounds) -> Fitted:
    """The parameters at which the simulated latencies of these runs are nearest to the measured ones.

    Least squares of the differences between logarithms of the QUANTILES of TTFT and latency, by loads.

    Args:
        runs: at several loads; those of a load have the same arrivals and questions, and their mean is fitted.
        bounds: of the model.

    Raises:
        ValueError: no request was answered.
    """
    by_load: dict[float, list[Measured]] = {}
    for run in runs:
        by_load.setdefault(run.load, []).append(run)
    first = [own[0] for own in by_load.values()]
    wanted = [
        np.mean([_quantiles(measured(run)) for run in own], axis=0)
        for own in by_load.values()
    ]
    if not any(np.isfinite(values).any() for values in wanted):
        raise ValueError("no request was answered, so nothing can be fitted")
    guess = np.log(_vector(first_guess(runs)))

    def residuals(x: Vector) -> Vector:
        fitted = Fitted(*np.exp(x).tolist())
        parts = [PRIOR * (x - guess)]
        for run, target in zip(first, wanted, strict=True):
            difference = _quantiles(simulated(fitted, run, bounds)) - target
            parts.append(np.nan_to_num(difference))
        return np.concatenate(parts)

    def search(start: Vector, rounds: int) -> OptimizeResult:
        return least_squares(
            residuals,
            start,
            bounds=(guess - RANGE, guess + RANGE),
            diff_step=STEP / np.maximum(np.abs(start), STEP),
            ftol=ACCURACY,
            xtol=ACCURACY,
            max_nfev=rounds,
        )

    tried = [search(guess + np.log(start), FIRST_ROUNDS) for start in STARTS]
    best = min(tried, key=lambda found: found.cost)
    return Fitted(*np.exp(search(best.x, LAST_ROUNDS).x).tolist())


def first_guess(runs: Sequence[Measured]) -> Fitted:
    """Parameters of the right order, from the run with the least load: a step is the time of a further token."""
    calm = min(runs, key=lambda run: run.load)
    answers = [one for one in calm.requests if one.answered]
    further = [one for one in answers if one.answer > 1] or answers
    pace_s = float(
        np.median(
            [(one.latency_s - one.ttft_s) / max(1, one.answer - 1) for one in further]
        )
    )
    ttft_s = float(np.median([one.ttft_s for one in answers]))
    prompt = float(np.median([one.prompt for one in answers]))
    return Fitted(
        prefill_tokens_s=max(1.0, prompt) / max(0.2 * ttft_s, 1e-5),
        step_s=max(0.8 * pace_s, 1e-5),
        sequence_s=max(0.05 * pace_s, 1e-6),
        chunk=max(1.0, prompt),
        overhead_s=max(0.5 * ttft_s, 1e-5),
    )


def _vector(fitted: Fitted) -> Vector:
    return np.array(
        [
            fitted.prefill_tokens_s,
            fitted.step_s,
            fitted.sequence_s,
            fitted.chunk,
            fitted.overhead_s,
        ]
    )


def _quantiles(times: Times) -> Vector:
    """Logarithms of the quantiles of TTFT and latency; NaN if nothing was answered."""
    parts = []
    for name in ("TTFT", "latency"):
        values = times.of(name)
        if not len(values):
            parts.append(np.full(len(QUANTILES), np.nan))
            continue
        parts.append(np.log(np.maximum(np.percentile(values, QUANTILES), 1e-6)))
    return np.concatenate(parts)


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
        if not all(len(times.of("TTFT")) for times in (*real, *expected)):
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
