"""Promotion gate: decides whether a challenger may replace the champion.

The challenger must beat the champion on the log of decisions, by the lower confidence bound of the difference
(offpolicy.py). After the promotion, regression_watch.py tests the promoted policy on its rewards.
"""

from dataclasses import asdict

import numpy as np

from policies.evaluation.offpolicy import confidence_sequence, difference, estimate
from policies.evaluation.overlap import LoggedDecisions, UnanswerableError, overlap
from policies.types import Vector

Report = dict[str, object]
CERTAIN = 0.999  # a largest propensity from here on leaves nothing to chance


def may_promote(
    data: LoggedDecisions,
    champion: Vector,
    challenger: Vector,
    margin: float = 0.0,
    level: float = 0.95,
    repeated: bool = False,
) -> Report:
    """Whether the challenger may be promoted, and why.

    Both are evaluated by DR with stabilised weights on the same log, so choices that they share cancel out. The lower
    end of a two-sided interval at 95 % lets an equal challenger pass in 2.5 % of all looks.

    Args:
        data: decisions of any policy, made after the last event that champion and challenger learned from.
        champion: [N, K] probabilities with which the champion chooses each arm.
        challenger: [N, K] probabilities of the challenger.
        margin: by how much the challenger must be better, in units of the reward.
        level: coverage of the interval.
        repeated: use the confidence sequence, which holds for any number of looks at the growing log.

    Returns:
        Plain data: `promote` (bool), `reason` (in words), `difference`, `champion`, `challenger` (estimates, with the
        overlap of each), `bound` (the kind of bound that decides), `lower`, `upper`, `margin`, `level`, `decisions`,
        `randomised` (decisions in which more than one arm had a chance), `feedback` (rewards that could be missing).
        If the log does not suffice, the estimates are missing and the reason says why.
    """
    report: Report = {
        "promote": False,
        "reason": "",
        "bound": "confidence sequence" if repeated else "interval",
        "margin": margin,
        "level": level,
        "decisions": len(data.chosen),
        "randomised": _randomised(data),
        "feedback": data.scores,
    }
    try:
        gain = difference(data, champion, challenger, level=level)
    except UnanswerableError as error:
        return report | {"reason": f"refused: {error}"}
    lower = gain.low
    upper = gain.high
    if repeated:
        sequence = confidence_sequence(data, challenger, champion, level)
        lower = float(sequence[0][-1])
        upper = float(sequence[1][-1])
    for name, target in (("champion", champion), ("challenger", challenger)):
        report[name] = estimate(data, target, level=level).as_dict() | asdict(
            overlap(data, target)
        )
    report |= {
        "difference": gain.as_dict(),
        "lower": lower,
        "upper": upper,
        "promote": bool(lower > margin),
    }
    found = f"the challenger's reward is {gain.value:+.4f} beside the champion's, between {lower:+.4f} and {upper:+.4f}"
    if report["promote"]:
        verdict = f"promoted: {found}, all above {margin:g}"
    elif np.abs(champion - challenger).max(initial=0.0) < 1e-6:
        verdict = "refused: champion and challenger decide alike"
    elif upper < margin:
        verdict = f"refused: {found}, all below {margin:g}"
    else:
        verdict = f"refused: {found}, which leaves open whether it is more than {margin:g}; more decisions would tell"
    return report | {"reason": verdict}


def _randomised(data: LoggedDecisions) -> int:
    """Number of decisions in which no arm was certain."""
    propensities = data.propensities
    largest = propensities.max(axis=1) if propensities.ndim == 2 else propensities
    return int((largest < CERTAIN).sum())
