"""Model revisions: detects when another model is deployed under the name of an arm.

A digest identifies what is deployed for an arm: the source of the model and its engine arguments. When the digest of
an arm changes, a new revision has replaced the old one, and the policy discounts what it learned about the old one
(`Policy.discount`). The journal's snapshots contain each change with its row, so a replay discounts at the same row.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import msgspec

from policies.types import Arm

# the arguments of a model's application that determine its answers
MODEL_ARGUMENTS = (
    "model_loading_config",
    "engine_kwargs",
    "lora_config",
    "accelerator_type",
    "source",
)


class RevisionChange(msgspec.Struct, frozen=True):
    """After this row of the journal, everything learned about an arm counts for only `keep` events."""

    row: int
    arm: str
    keep: float


class RevisionState(msgspec.Struct, kw_only=True):
    """The revisions as a snapshot stores them: the digest of each arm, and all changes in order."""

    digests: dict[str, str] = {}
    successions: list[RevisionChange] = []


def digest_of(args: Mapping[str, object]) -> str:
    """Digest of a model, from the arguments of its application in serve_config.yaml."""
    deployed = {key: args[key] for key in MODEL_ARGUMENTS if key in args}
    encoded = json.dumps(deployed, sort_keys=True, default=str).encode()
    return blake2b(encoded, digest_size=16).hexdigest()


class ModelRevisions:
    """The digests of all arms that were ever deployed, and the changes of revision in their order.

    Args:
        stored: the `state()` of another instance.
    """

    def __init__(self, stored: Mapping[str, object] | None = None):
        state = msgspec.convert(dict(stored or {}), RevisionState)
        self.digests: dict[str, str] = state.digests
        self.changes: list[RevisionChange] = state.successions

    def update(
        self, arms: Sequence[Arm], found: Mapping[str, str], row: int
    ) -> list[RevisionChange]:
        """Record the digests of the deployed models.

        Args:
            arms: the arms of the policy.
            found: digest of the model that each application serves.
            row: the last row of the journal.

        Returns:
            The new changes; they take effect after `row`.
        """
        new = []
        for arm in arms:
            if not found.get(arm.application):
                continue
            digest = f"{found[arm.application]}{arm.revision}"
            before = self.digests.get(arm.name)
            if digest == before:
                continue
            self.digests[arm.name] = digest
            if before is not None:
                new.append(RevisionChange(row, arm.name, arm.inherit))
        self.changes += new
        return new

    def after(self, row: int) -> list[RevisionChange]:
        """The changes that a policy which has learned up to this row has not applied yet."""
        return [change for change in self.changes if change.row > row]

    def state(self) -> dict[str, object]:
        """The revisions as plain data, for a snapshot."""
        state = RevisionState(digests=self.digests, successions=self.changes)
        plain: dict[str, object] = msgspec.to_builtins(state)
        return plain
