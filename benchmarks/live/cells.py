"""The cells of a replay: one contender on one window of recorded arrivals, and the order of the cells."""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from assets.tasks import Task, check
from benchmarks.live.arrivals import window
from benchmarks.live.plan import Plan, Seen, Sending
from deployments.commands.gateway import key_headers
from deployments.demonstration.client import body_of
from deployments.demonstration.run import make_stream
from policies.types import Vector

AUTO = "auto"
STREAMS = 1000  # rounds of a seed that have tasks of their own
WARM_SHARE = 0.4  # of the closed loop, before answers count: all clients begin at once
MOST = 500  # requests a second that the closed loop can send
Client = Callable[[Plan], list[Seen]]


@dataclass(frozen=True)
class Cell:
    """A contender on a window of arrivals.

    trace: the recording. factor: the multiple of the first rate. round: its number.
    contender: the model that every request names; AUTO leaves the choice to the router.
    rate: requests a second. seconds: duration of the arrivals.
    seed: of the window and of the tasks. All contenders of a round, recording and factor have the same.
    """

    trace: str
    factor: float
    round: int
    contender: str
    rate: float
    seconds: float
    seed: int

    def arrivals(self, data: str | None = None) -> Vector:
        """[N] seconds of the arrivals."""
        return window(self.trace, self.rate, self.seconds, self.seed, data)


def schedule(
    traces: Sequence[str],
    factors: Sequence[float],
    rounds: int,
    contenders: Sequence[str],
    first_rate: float,
    seconds: float,
    seed: int,
) -> list[Cell]:
    """All cells in their order.

    In a round every contender has each recording at each factor once. Who is the first changes with every group, so
    that no contender always follows the same one or a quiet system.
    """
    cells = []
    groups = 0
    for round_ in range(rounds):
        for trace in traces:
            for factor in factors:
                first = groups % len(contenders)
                groups += 1
                for contender in (*contenders[first:], *contenders[:first]):
                    cells.append(
                        Cell(
                            trace,
                            factor,
                            round_,
                            contender,
                            factor * first_rate,
                            seconds,
                            seed * STREAMS + round_,
                        )
                    )
    return cells


def open_plan(url: str, model: str, tasks: Sequence[Task], arrivals_s: Vector) -> Plan:
    """The plan that asks a model each task at its time."""
    sendings = [
        Sending(at_s, _body(model, task))
        for at_s, task in zip(arrivals_s.tolist(), tasks, strict=True)
    ]
    return Plan(url, tuple(sendings), key_headers())


def add_capacity_options(parser: ArgumentParser) -> None:
    """Add the options of `measure_capacity` to a command line."""
    parser.add_argument(
        "--capacity",
        type=float,
        help="answers a second of the model; by default it is measured",
    )
    parser.add_argument(
        "--clients", type=int, default=32, help="of the closed loop that measures it"
    )
    parser.add_argument(
        "--capacity-seconds",
        type=float,
        default=20.0,
        help="of that loop; several times as long as an answer takes in it",
    )


def measure_capacity(
    client: Client, url: str, model: str, clients: int, seconds: float, seed: int
) -> float:
    """Answers a second of a model that has as many requests as it can run at once.

    Args:
        client: carries out a plan.
        url: of the gateway.
        model: its name.
        clients: requests in flight.
        seconds: duration, of which the first WARM_SHARE is not counted; several times the latency of an answer.
        seed: of the tasks.

    Raises:
        SystemExit: it answered nothing.
    """
    tasks = make_stream(seed * STREAMS + STREAMS - 1, round(MOST * seconds))
    sendings = tuple(Sending(0.0, _body(model, task)) for task in tasks)
    seen = client(Plan(url, sendings, key_headers(), clients, seconds))
    ended_s = np.array([one.sent_s + one.served_s for one in seen if one.answered])
    counted = (ended_s > WARM_SHARE * seconds) & (ended_s <= seconds)
    if not counted.any():
        failed = next((one.status for one in seen if not one.answered), "none")
        raise SystemExit(
            f"'{model}' answered nothing within {seconds:g} s (status: {failed})"
        )
    return float(counted.sum() / ((1 - WARM_SHARE) * seconds))


def is_right(task: Task, seen: Seen) -> bool:
    """Whether the task was answered, and rightly."""
    return seen.answered and check(task, seen.text)


def _body(model: str, task: Task) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(body_of(model, task)))
