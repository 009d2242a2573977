"""The recorded periods on which rules are compared: an hour of Azure, a day of ServeGen."""

from dataclasses import dataclass

import numpy as np

from benchmarks.cluster import hardware
from benchmarks.cluster.routers import World
from benchmarks.cluster.workload import recorded_rate, workload
from benchmarks.decisions.streams import load
from policies.types import Objective

DAY_S = 86_400.0


@dataclass(frozen=True)
class Period:
    """A part of a recording.

    trace: see workload.TRACES.
    requests: their number. A day has far more, and is scaled down to this number.
    look_s: time between two looks of the autoscaler.
    """

    trace: str
    requests: int
    look_s: float

    def rate(self, count: int, data: str | None) -> float:
        """Requests a second of a part with so many requests."""
        if self.trace == "servegen_rates":
            return count / DAY_S
        return recorded_rate(self.trace, data)


PERIODS = {
    "azure_code hour": Period("azure_code", 8_819, 1.0),
    "azure_conv hour": Period("azure_conv", 19_366, 1.0),
    "servegen day": Period("servegen_rates", 8_640, 5.0),
    "quiet servegen day": Period("servegen_rates", 2_592, 5.0),
}


def world(
    name: str,
    portfolio_name: str,
    objective: Objective,
    calibrate: int,
    seed: int,
    requests: int | None = None,
    data: str | None = None,
) -> World:
    """The sizes, the requests and the calibration prompts of a period.

    Args:
        name: one of PERIODS.
        portfolio_name: of the prompts and their scores.
        objective: of every request.
        calibrate: number of prompts that every size has answered beforehand.
        seed: of the prompts, and of the day.
        requests: fewer than the period has: a part of the hour, or a day at a lower rate.
        data: folder of the recordings.

    Raises:
        SystemExit: a recording is missing.
    """
    period = PERIODS[name]
    portfolio = load(portfolio_name, data=data)
    order = np.random.default_rng((seed, 7)).permutation(len(portfolio.profiles))
    kept, rows = order[:calibrate], order[calibrate:]
    count = min(requests or period.requests, period.requests)
    stream = workload(period.trace, portfolio, rows, count, seed, data)
    rate = period.rate(len(stream), data)
    sizes = hardware.sizes(portfolio.arms)
    return World(sizes, portfolio, stream, objective, rate, kept, seed)
