"""The stored form of a rollout: which policy version has which role, and what its tests have measured.

The names and the order of the fields are part of the format of snapshots. Their meaning is in router/rollout.py.
"""

import msgspec

from deployments.journal.snapshot import Plain
from policies.rollout.first_day import FirstDayState
from policies.rollout.reward_sampling import SamplingState


class RoleAssignment(msgspec.Struct, frozen=True):
    """The policy version that has a role.

    version: number in the registry; 0 if the policy was never published.
    policy, options: as make_policy takes them.
    """

    version: int
    policy: str
    options: Plain


class RoleChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change of a role.

    what: configured, seated, retired, promoted, restored or rolled back; or advanced, to the next stage of the first
        day.
    role: the role; version: the policy version that has the role after the change, or had it before `retired`.
    reason: why, and by whom.
    loser: the version that a rollback removed.
    """

    what: str
    role: str
    version: int
    reason: str
    loser: int | None = None


class WatchState(msgspec.Struct):
    """The regression test of a promotion."""

    margin: float
    alpha: float
    state: Plain


class RolloutState(msgspec.Struct, kw_only=True):
    """A rollout; see the attributes of Rollout for the meaning."""

    configured: Plain
    seats: dict[str, RoleAssignment]
    share: float
    since: float
    borne: list[str] = []
    watch: WatchState | None
    history: list[RoleChange]
    rewarded: list[str]
    shadowed: dict[str, int]
    agreed: int
    rewards: SamplingState = msgspec.field(default_factory=SamplingState)
    first_day: FirstDayState | None = None
    restored: int = 0
    undone: int = 0

    def plain(self) -> dict[str, object]:
        """Plain data, for a snapshot; without the last three fields where they are empty."""
        plain: dict[str, object] = msgspec.to_builtins(self)
        for name in ("first_day", "restored", "undone"):
            if not plain[name]:
                del plain[name]
        return plain
