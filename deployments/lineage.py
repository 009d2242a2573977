"""What serves each arm, as a digest, and who took whose place: so that an arm is not believed to be what it was.

A digest is of the model's source and its engine arguments as they are deployed. Where it changes under the same name,
the new one is a successor, and what was learned of the old one counts for less from then on (policies/succession.py).
That is in the journal's snapshots, with its row, so that whoever folds the journal again comes to the same.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from policies.types import Arm

SERVING = ("model_loading_config", "engine_kwargs", "lora_config", "accelerator_type", "source")  # of a model's args


@dataclass(frozen=True)
class Succession:
    """After this row of the journal, what was known of an arm counts for `keep` events."""

    row: int
    arm: str
    keep: float


def digest_of(args: Mapping[str, Any]) -> str:
    """Of what serves an arm, from the arguments of its application in serve_config.yaml."""
    served = {key: args[key] for key in SERVING if key in args}
    return blake2b(json.dumps(served, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


class Lineage:
    """The digests of all arms there ever were, and the successions in their order.

    Args:
        kept: `state()` of another.
    """

    def __init__(self, kept: Mapping[str, Any] | None = None):
        kept = kept or {}
        self.digests: dict[str, str] = dict(kept.get("digests", {}))
        self.successions = [Succession(**each) for each in kept.get("successions", ())]

    def see(self, arms: Sequence[Arm], found: Mapping[str, str], row: int) -> list[Succession]:
        """Take note of the digests that were found; returns the successions that they show, after this row."""
        new = []
        for arm in arms:
            digest = found.get(arm.name, "") and f"{found[arm.name]}{arm.revision}"
            before = self.digests.get(arm.name)
            if not digest or digest == before:
                continue
            self.digests[arm.name] = digest
            if before is not None:
                new.append(Succession(row, arm.name, arm.inherit))
        self.successions += new
        return new

    def after(self, row: int) -> list[Succession]:
        """Those that somebody who has learned up to this row does not know."""
        return [each for each in self.successions if each.row > row]

    def state(self) -> dict[str, Any]:
        """For a snapshot, as plain data."""
        return {"digests": self.digests, "successions": [asdict(each) for each in self.successions]}
