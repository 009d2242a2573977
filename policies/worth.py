"""What an arm was worth at a decision: quality - time - money - scarcity, as plain numbers and in words.

Quality is the expected score. Time is the expected latency times the objective's latency_weight, money the expected
cost times its cost_weight. Scarcity is what the request pays for its place at an arm with too many requests
(scarcity.py). All four are score points.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any

from policies.constraints import Exclusion
from policies.evaluation.kind_figures import Figures
from policies.events import ArmEstimate, Decision

PLACES = 3  # decimal places of score points
NONE = ArmEstimate("")
LEAST_SHOWN = 1e-4  # a smaller probability is shown as "under 0.0001"


@dataclass(frozen=True)
class Worth:
    """The worth of one arm, rounded so that worth = quality - time - money - scarcity holds for the numbers shown.

    It may differ from the utility that decided by the rounding, and the draw by as much.

    quality, time, money, scarcity, worth, drawn: score points. None if the policy made no estimate, or if the task has
        no quality, as embeddings have none. `drawn` is the draw of Thompson sampling.
    scored_answers: number of scored answers of this arm and kind in the window of the figures; None if not known.
    made: the estimate as the decision has it.
    known: whether the policy made an estimate for this task; otherwise the numbers in `made` mean nothing.
    """

    arm: str
    quality: float | None = None
    time: float | None = None
    money: float | None = None
    scarcity: float | None = None
    worth: float | None = None
    drawn: float | None = None
    scored_answers: int | None = None
    made: ArmEstimate = NONE
    known: bool = False

    @property
    def removed_by(self) -> str:
        """See ArmEstimate."""
        return self.made.removed_by

    @property
    def differs(self) -> bool:
        """Whether the draw and the mean differ in the numbers that are shown."""
        return self.drawn is not None and self.drawn != self.worth

    def plain(self) -> dict[str, Any]:
        """The arm's row in the table `models` of an explanation."""
        made = self.made
        measured = (
            *("latency_s", "ttft_s", "tpot_s"),
            *("output_tokens", "cost_usd", "availability"),
        )
        numbers = {
            name: rounded(getattr(made, name)) if self.known else None
            for name in measured
        }
        if self.quality is None:
            numbers["availability"] = None
        return {
            "arm": self.arm,
            "removed_by": self.removed_by,
            "propensity": _short(made.propensity),
            "worth": self.worth,
            "quality": self.quality,
            "time": self.time,
            "money": self.money,
            "scarcity": self.scarcity,
            "drawn": self.drawn,
            "scored_answers": self.scored_answers,
            **numbers,
            "load": rounded(made.load),
            "total_load": rounded(made.total_load),
        }


def worths(
    decision: Decision,
    estimates: Iterable[ArmEstimate],
    of_kind: Mapping[str, Figures] | None = None,
) -> list[Worth]:
    """The worth of each arm at a decision, in the order of the estimates."""
    return [_worth(decision, estimate, of_kind) for estimate in estimates]


def _worth(
    decision: Decision, estimate: ArmEstimate, of_kind: Mapping[str, Figures] | None
) -> Worth:
    arm = estimate.arm
    if Exclusion.of(estimate.removed_by) is Exclusion.TASK:
        return Worth(arm, made=estimate)  # the arm cannot do the task at all
    scored = None
    if of_kind is not None and decision.profile.task != "embed":
        scored = of_kind[arm].votes if arm in of_kind else 0
    if not is_estimated(estimate):
        return Worth(arm, scored_answers=scored, made=estimate)
    objective = decision.objective
    time = round(objective.latency_weight * estimate.latency_s, PLACES)
    money = round(objective.cost_weight * estimate.cost_usd, PLACES)
    scarcity = round(decision.scarcity(estimate), PLACES)
    if decision.profile.task == "embed":
        return Worth(
            arm, time=time, money=money, scarcity=scarcity, made=estimate, known=True
        )
    quality = round(estimate.quality, PLACES)
    worth = round(quality - time - money - scarcity, PLACES)
    drawn = None
    if estimate.sampled_utility and not estimate.removed_by:
        drawn = round(worth + estimate.sampled_utility - estimate.utility, PLACES)
    return Worth(
        arm,
        quality=quality,
        time=time,
        money=money,
        scarcity=scarcity,
        worth=worth,
        drawn=drawn,
        scored_answers=scored,
        made=estimate,
        known=True,
    )


def is_estimated(estimate: ArmEstimate) -> bool:
    """Whether the policy made this estimate; the estimates of a static rule are empty."""
    return bool(estimate.utility or estimate.latency_s)


def rounded(value: float, digits: int = 6) -> float:
    """A number with so many significant digits, or with three decimal places if that is more."""
    if abs(value) >= 10 ** (digits - 3):
        return round(value, 3)
    return float(f"{value:.{digits}g}")


def _short(value: float) -> float:
    """A probability with six decimal places; a very small one with two significant digits."""
    return rounded(value, 2) if 0 < value < LEAST_SHOWN else round(value, 6)


def in_words(value: float, digits: int = 2) -> str:
    """A number in decimal notation, with so many significant digits."""
    if value == 0 or not isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:.{places}f}"


def seconds(value: float) -> str:
    """A duration in words."""
    return (
        f"{in_words(value)} s" if value >= LEAST_SHOWN or not value else "under 0.1 ms"
    )


def dollars(value: float) -> str:
    """An amount of money in words."""
    return f"${in_words(value)}" if value >= 1e-9 or not value else "under $0.000000001"


def probability(value: float) -> str:
    """A probability in words."""
    if 0 < value < LEAST_SHOWN:
        return f"under {LEAST_SHOWN:.4f}"
    if 0.995 <= value < 1:
        return "over 0.99"
    return f"{value:.2f}" if value >= 0.01 or not value else in_words(value, 1)
