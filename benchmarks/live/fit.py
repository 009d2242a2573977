"""The parameters of a simulated replica that fit measured requests best."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

from benchmarks.live.prediction import LATENCY, TTFT, Times, measured, simulated
from benchmarks.validation import Bounds, Fitted, Measured
from policies.types import Vector

QUANTILES = (10, 25, 50, 75, 90, 95)  # whose logarithms are fitted
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
    """Parameters of the right order, from the answers at the least load: a step is the time of a further token.

    Raises:
        ValueError: no request was answered.
    """
    answers = next(
        (
            found
            for run in sorted(runs, key=lambda run: run.load)
            if (found := [one for one in run.requests if one.answered])
        ),
        [],
    )
    if not answers:
        raise ValueError("no request was answered, so nothing can be fitted")
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
    for name in (TTFT, LATENCY):
        values = times.of(name)
        if not len(values):
            parts.append(np.full(len(QUANTILES), np.nan))
            continue
        parts.append(np.log(np.maximum(np.percentile(values, QUANTILES), 1e-6)))
    return np.concatenate(parts)
