"""All that the router has learned, at one moment: what is kept, handed round, and published."""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from deployments.codec import decode_array


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a policy had learned after a row of the journal.

    policy, arms: whose state it is. sequence: decisions made by then. version: last published policy version.
    pacer: the state of the budget's account. trust: which keys are quarantined, and why (trust.py).
    held: decisions that are waited for (ledger.py).
    row: of the journal, the last that it has learned from. journal: which one, by its `id`.
    options: of the policy, as make_policy takes them. rollout: who else decides or is on trial (rollout.py).
    lineage: what served each arm, and which took another's place (lineage.py).
    """

    policy: str
    arms: tuple[str, ...]
    sequence: int
    version: int
    state: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    pacer: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    row: int = 0
    journal: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    trust: dict[str, Any] = field(default_factory=dict)


SNAPSHOT = msgspec.msgpack.Decoder(Snapshot, dec_hook=decode_array)
