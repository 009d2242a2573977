"""Snapshot: everything that the router has learned up to one journal row.

The journal stores snapshots, the registry publishes them as policy versions, and the ingresses decide with them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from deployments.journal.codec import decode_array
from policies.evaluation.kind_figures import Totals
from policies.profiling.forecast import Forecaster
from policies.types import Arm, Vector

# data whose owner converts it to a record of its own; msgspec decodes a value of any type only as Any
Plain = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that a policy and its router had learned up to one row of the journal.

    policy: name of the policy.
    arms: names of the arms, in the order of the arrays.
    sequence: number of decisions made so far.
    version: the last published policy version.
    state: the arrays of the policy, and those of the forecasts (names with PREFIX).
    pacer: state of the budget pacer.
    held: ids of the decisions whose outcome or feedback arrived before the decision itself.
    row: the last row of the journal that was learned from.
    journal: the `id` of that journal.
    options: options of the policy, as make_policy takes them.
    rollout: roles of the policy versions (router/rollout.py).
    lineage: revisions of the models behind the arms (router/model_revisions.py).
    trust: reputation of the API keys that give feedback (policies/feedback/reputation.py).
    scored: number of decisions that have had a score; the forgetting clock of quality.
    scoring: by API key, the number of its answers and of those that it scored (policies/feedback/scoring_rates.py).
    totals: numbers of decisions, answers and scores up to the row; None in snapshots of earlier releases.
    """

    policy: str
    arms: tuple[str, ...]
    sequence: int
    version: int
    state: dict[str, Vector]
    pacer: dict[str, Vector] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    row: int = 0
    journal: str = ""
    options: Plain = field(default_factory=dict)
    rollout: Plain = field(default_factory=dict)
    lineage: Plain = field(default_factory=dict)
    trust: Plain = field(default_factory=dict)
    scored: int = 0
    scoring: dict[str, tuple[float, float]] = field(default_factory=dict)
    totals: Totals | None = None


SNAPSHOT = msgspec.msgpack.Decoder(Snapshot, dec_hook=decode_array)


# starts the names of the forecasts' arrays in `Snapshot.state`
PREFIX = "profile."


Arrays = Mapping[str, Vector]


def unpack(
    state: Arrays, names: Sequence[str], arms: Sequence[Arm]
) -> Forecaster | None:
    """Restore the forecasts from the state of a snapshot; None if the snapshot has none.

    Args:
        state: arrays of the snapshot.
        names: the arms of the snapshot.
        arms: the arms to forecast for.

    Raises:
        ValueError: the arrays have other shapes, or are not finite.
    """
    arrays = {
        name.removeprefix(PREFIX): value
        for name, value in state.items()
        if name.startswith(PREFIX)
    }
    if not arrays:
        return None
    known = {arm.name: arm for arm in arms}
    stored_arms = [known.get(name, Arm(name)) for name in names]
    return Forecaster.restored(arrays, stored_arms).for_arms(arms)
