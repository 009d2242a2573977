"""The stored form of a rollout: which policy version has which role, and what its tests have measured.

The names and the order of the fields are part of the format of snapshots. Their meaning is in router/rollout.py.
"""

import msgspec

from deployments.journal.snapshot import Plain
from policies.rollout.first_day import FirstDayState
from policies.rollout.reward_sampling import SamplingState

OPERATOR = "an operator"  # who changed a role, where the gateway has no keys
AUTOMATIC = "automatic"


class RoleAssignment(msgspec.Struct, frozen=True):
    """The policy version that has a role.

    version: number in the registry; 0 if the policy was never published.
    policy, options: as make_policy takes them.
    """

    version: int
    policy: str
    options: Plain


class RoleChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change of a role, or of the version number that has it.

    what: configured, seated, retired, promoted, restored or rolled back; advanced, to the next stage of the first day;
        registered, under a new number; or adopted, at the start of a router that had learned nothing.
    role: the role; "" for a version that was registered without one. version: the policy version that has the role
        after the change, or had it before `retired`.
    reason: why.
    loser: the version that a rollback removed.
    time_s: in seconds since the epoch; None in journals of earlier releases.
    by: name of the operator's key, or OPERATOR if the gateway has no keys; AUTOMATIC if the router did it by itself;
        None in journals of earlier releases, whose `reason` says it.
    first: the first of several versions that were registered one after another, and of which `version` is the last.
    """

    what: str
    role: str
    version: int
    reason: str
    loser: int | None = None
    time_s: float | None = None
    by: str | None = None
    first: int | None = None

    @property
    def account(self) -> str:
        """By whom and why, in words."""
        return account(self.reason, self.by)


def account(reason: str, by: str | None) -> str:
    """By whom and why a role was changed, in words."""
    if by is None or by == AUTOMATIC:
        return reason
    return f"by {by}: {reason}" if reason else f"by {by}"


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
