"""Coverage of intervals where few answers are scored, and failures are always seen: a part of offpolicy.py.

Each world says what its logs are like, and which policies are compared. Its logs have a few hundred scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from benchmarks.statistics.worlds import (
    ALWAYS,
    BETTER,
    BY_KIND,
    CHAMPION,
    CLEAR,
    FLAKY,
    Log,
    World,
    collect_logs,
)
from policies.evaluation.offpolicy import (
    Estimate,
    confidence_sequence,
    difference,
    estimate,
)
from policies.evaluation.overlap import LoggedDecisions, UnanswerableError
from policies.types import Vector

FAILURES = (0.03, 0.10, 0.30)
# Code is scored in 20 %, chat in 2 %.
RATES_BY_KIND = ((0.20,) * 3,) * 2 + ((0.02,) * 3,) * 2
RATES_BY_BOTH = ((0.20, 0.10, 0.05),) * 2 + ((0.04, 0.08, 0.03),) * 2


@dataclass(frozen=True)
class Plan:
    """A world, and what is estimated from its logs.

    decisions: length of a log.
    challenger, champion: [4, 3] the policies. The first is estimated alone, and less the second.
    valid: whether the intervals should hold the truth.
    """

    world: World
    decisions: int = 4000
    challenger: Vector = field(default_factory=lambda: BETTER)
    champion: Vector = field(default_factory=lambda: CHAMPION)
    valid: bool = True


WORLDS: Mapping[str, Plan] = {
    "flaky: 3 % failures, 5 % scored": Plan(
        World(FLAKY, failures=(0.03, 0.0, 0.0), feedback=(0.05,) * 3, floor=0.1),
        8000,
        *ALWAYS[:2],
    ),
    "3, 10, 30 % failures, 5 % scored": Plan(
        World(CLEAR, failures=FAILURES, feedback=(0.05,) * 3, floor=0.2), 10_000
    ),
    "20 % of code and 2 % of chat scored": Plan(
        World(BY_KIND, feedback=RATES_BY_KIND, floor=0.25), 8000, *ALWAYS[:2]
    ),
    "rates by size and kind, failures": Plan(
        World(CLEAR, failures=FAILURES, feedback=RATES_BY_BOTH, floor=0.2), 6000
    ),
    "hedged, 10 % scored": Plan(
        World(CLEAR, slow=(0.4, 0.1, 0.0), feedback=(0.1,) * 3, floor=0.2), 6000
    ),
    "hedged, rates by size and kind, failures": Plan(
        World(
            CLEAR,
            slow=(0.4, 0.1, 0.0),
            failures=FAILURES,
            feedback=RATES_BY_BOTH,
            floor=0.2,
        ),
        6000,
    ),
    "a judge's sample of 5 % of 20,000": Plan(
        World(CLEAR, failures=FAILURES, feedback=(0.95,) * 3, sample=0.05, floor=0.1),
        1000,
    ),
    "no scores of one size's chat": Plan(
        World(
            BY_KIND,
            feedback=((0.2,) * 3,) * 2 + ((0.0, 0.2, 0.2),) * 2,
            floor=0.1,
        ),
        4000,
        ALWAYS[0] * [[1.0], [1.0], [0.05], [0.05]]
        + ALWAYS[1] * [[0.0], [0.0], [0.95], [0.95]],
        ALWAYS[1],
    ),
    "bad answers scored three times as often": Plan(
        World(BY_KIND, feedback=(0.15,) * 3, good_scored=1 / 3, floor=0.1),
        4000,
        *ALWAYS[:2],
        valid=False,
    ),
}


@dataclass
class Tally:
    """The intervals of one method for one target: whether each held the truth, its error, and its width."""

    held: list[bool] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)

    def add(self, found: Estimate, truth: float) -> None:
        """Count an interval of one look."""
        self.held.append(found.low <= truth <= found.high)
        self.errors.append(found.value - truth)
        self.widths.append(found.high - found.low)

    def add_sequence(self, low: Vector, high: Vector, truth: float) -> None:
        """Count a confidence sequence, which holds the truth if it does at all times."""
        self.held.append(bool(((low <= truth) & (truth <= high)).all()))
        self.errors.append(float(low[-1] + high[-1]) / 2 - truth)
        self.widths.append(float(high[-1] - low[-1]))


def coverage(
    logs: int, names: Sequence[str], seed: int, naive: bool = True
) -> list[dict[str, object]]:
    """A row for each world, target and method: the share of the intervals that hold the truth, and their width.

    Args:
        logs: of each world.
        names: of the worlds.
        seed: of the first world.
        naive: add the interval that takes rates by size alone, and loses the hedged requests.
    """
    rows: list[dict[str, object]] = []
    for name in names:
        plan = WORLDS[name]
        tallies: dict[tuple[str, str], Tally] = {}
        refused = 0
        found = collect_logs(
            plan.world, logs, plan.decisions, seed + list(WORLDS).index(name)
        )
        for log in tqdm(found, total=logs, desc=name):
            try:
                _evaluate(plan, log, log.logged(), tallies)
            except UnanswerableError:
                refused += 1
                continue
            if naive:
                _evaluate_naively(plan, log, tallies)
        for (target, method), tally in tallies.items():
            rows.append(
                {
                    "world": name,
                    "target": target,
                    "method": method,
                    "refused": refused / logs,
                    "cover": float(np.mean(tally.held)),
                    "bias": float(np.mean(tally.errors)),
                    "deviation": float(np.std(tally.errors)),
                    "width": float(np.mean(tally.widths)),
                }
            )
    return rows


def _evaluate(
    plan: Plan,
    log: Log,
    data: LoggedDecisions,
    tallies: dict[tuple[str, str], Tally],
) -> None:
    challenger = plan.challenger[log.kinds]
    champion = plan.champion[log.kinds]
    value = plan.world.value(plan.challenger)
    gain = value - plan.world.value(plan.champion)
    alone = estimate(data, challenger)
    apart = difference(data, champion, challenger)
    _tally(tallies, "value", "DR").add(alone, value)
    _tally(tallies, "difference", "DR").add(apart, gain)
    for target, truth, pair in (
        ("value", value, (challenger,)),
        ("difference", gain, (challenger, champion)),
    ):
        sequence = confidence_sequence(data, *pair)
        _tally(tallies, target, "sequence").add_sequence(*sequence, truth)


def _evaluate_naively(
    plan: Plan, log: Log, tallies: dict[tuple[str, str], Tally]
) -> None:
    gain = plan.world.value(plan.challenger) - plan.world.value(plan.champion)
    try:
        apart = difference(
            log.naive(), plan.champion[log.kinds], plan.challenger[log.kinds]
        )
    except UnanswerableError:
        return
    _tally(tallies, "difference", "DR, naive").add(apart, gain)


def _tally(tallies: dict[tuple[str, str], Tally], target: str, method: str) -> Tally:
    return tallies.setdefault((target, method), Tally())
