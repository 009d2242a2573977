"""Parts of recorded arrivals, scaled to a rate."""

import numpy as np

from benchmarks.cluster.workload import recorded_arrivals
from policies.types import Vector

TRACES = (
    "azure_code",
    "azure_conv",
    "mooncake_conversation",
    "mooncake_synthetic",
)


def window(
    trace: str, rate: float, seconds: float, seed: int, data: str | None = None
) -> Vector:
    """[N] ascending seconds from 0 of consecutive recorded arrivals, which begin at a random place.

    All gaps are divided by the same number, so bursts stay bursts. N is the rate times the seconds, and the mean
    rate is exactly the rate that is asked for.

    Args:
        trace: one of TRACES.
        rate: requests a second.
        seconds: duration.
        seed: of the place.
        data: folder of the recordings.

    Raises:
        SystemExit: the recording is missing.
        ValueError: the recording is shorter, or less than two arrivals are asked for.
    """
    recorded = recorded_arrivals(trace, data)
    count = round(rate * seconds)
    if not 2 <= count < len(recorded):
        raise ValueError(
            f"{rate:.3g} requests a second for {seconds:g} s are {count} requests; {trace} has windows of 2 to "
            f"{len(recorded) - 1}"
        )
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(recorded) - count))
    # The gap after the last arrival belongs to the window, so that N arrivals take N mean gaps.
    part = recorded[start : start + count + 1] - recorded[start]
    return np.asarray(part[:-1] * (seconds / max(float(part[-1]), 1e-9)))
