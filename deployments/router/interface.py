"""Interface of the router actor for components in other processes: its handle, and its state for operators.

The methods of the handle are those of actor.Router. `plain` turns a record into the data that the HTTP API returns.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import msgspec

from deployments.journal.snapshot import Snapshot
from deployments.remote import Method
from deployments.settings import GatewaySettings
from policies.events import Decision, Feedback, Outcome, Record
from policies.profiling.forecast import Forecaster
from policies.types import ModelState, Request


class RoleChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """A change of a role. Snapshots store it, so the names and the order of the fields are part of their format.

    what: configured, seated, retired, promoted or rolled back.
    role: the role; version: the policy version that has the role after the change, or had it before `retired`.
    reason: why, and by whom.
    loser: the version that a rollback removed.
    """

    what: str
    role: str
    version: int
    reason: str
    loser: int | None = None


@dataclass(frozen=True)
class RoleSummary:
    """A role; `share` is its share of the traffic, and the other fields are those of RoleAssignment."""

    version: int
    policy: str
    options: Mapping[str, object]
    share: float


@dataclass(frozen=True)
class ShadowSummary:
    """The shadow's choices by arm, and how many of them equal the actual choice."""

    choices: Mapping[str, int]
    agreed: int


@dataclass(frozen=True)
class RolloutSummary:
    """The roles.

    roles: by name of the role.
    watch: report of the regression test (RegressionTest.report); None if no promotion is watched.
    shadow: what the shadow chose.
    history: the last changes, oldest first.
    """

    roles: Mapping[str, RoleSummary]
    watch: Mapping[str, object] | None
    shadow: ShadowSummary
    history: tuple[RoleChange, ...]

    def plain(self) -> dict[str, object]:
        """Plain data."""
        history = [msgspec.to_builtins(change) for change in self.history]
        return {
            "roles": {role: asdict(held) for role, held in self.roles.items()},
            "watch": self.watch,
            "shadow": asdict(self.shadow),
            "history": history,
        }


@dataclass(frozen=True)
class ArmSummary:
    """An arm.

    state: its live measurements.
    share: its share of the latest routed decisions.
    expected_quality: mean score that the latest routed decisions expected of it, in [0, 1].
    prompt_price_usd, output_price_usd: per token.
    tasks: what it can do.
    """

    state: ModelState
    share: float
    expected_quality: float
    prompt_price_usd: float
    output_price_usd: float
    tasks: tuple[str, ...]

    def plain(self) -> dict[str, object]:
        """Plain data: the fields of the state stand beside the others."""
        fields = asdict(self)
        state: dict[str, object] = fields.pop("state")
        return state | fields


@dataclass(frozen=True)
class RouterSummary:
    """The router.

    policy, policy_version: of the champion.
    decisions: number of decisions made so far.
    counts: decisions and scores since the start, by kind (ArmStats.counts).
    quarantined: evidence against each quarantined API key (policies/feedback/reputation.py).
    in_doubt: names of the keys whose scores do not count, although they are not quarantined.
    rollout: roles of the policy versions.
    served_by: digest of the model behind each arm.
    budget: of the budget pacer (BudgetPacer.summary).
    profiler: reliability of the forecasts (Forecaster.reliability).
    models: the arms by name.
    """

    policy: str
    policy_version: str
    decisions: int
    counts: Mapping[str, int]
    quarantined: Mapping[str, Mapping[str, object]]
    in_doubt: list[str]
    rollout: RolloutSummary
    served_by: Mapping[str, str]
    budget: Mapping[str, float | None]
    profiler: Mapping[str, float]
    models: Mapping[str, ArmSummary]

    def plain(self) -> dict[str, object]:
        """Plain data."""
        return {
            "policy": self.policy,
            "policy_version": self.policy_version,
            "decisions": self.decisions,
            "counts": dict(self.counts),
            "quarantined": dict(self.quarantined),
            "in_doubt": self.in_doubt,
            "rollout": self.rollout.plain(),
            "served_by": dict(self.served_by),
            "budget": dict(self.budget),
            "profiler": dict(self.profiler),
            "models": {name: arm.plain() for name, arm in self.models.items()},
        }


class RouterHandle(Protocol):
    """A handle of Ray (`ray.get_actor`)."""

    configure: Method[[GatewaySettings], None]
    settings: Method[[], GatewaySettings]
    decide: Method[
        [list[Request], str, dict[str, int], Mapping[str, float]], list[Decision]
    ]
    observe: Method[[list[tuple[Decision, Outcome]], str, dict[str, int]], None]
    feedback: Method[[list[Feedback], str], list[str]]
    salt: Method[[], bytes]
    rows: Method[[int, int], list[tuple[int, float, str, bytes]]]
    record: Method[[str], Record | None]
    snapshot: Method[[str, dict[str, int]], tuple[Snapshot, dict[str, ModelState], str]]
    forecaster: Method[[int], Forecaster | None]
    summary: Method[[], RouterSummary]
    adopt: Method[[Snapshot], bool]
    checkpoint: Method[[], Snapshot]
    assign_role: Method[[str, Snapshot, float, str], RolloutSummary]
    remove_role: Method[[str, str], RolloutSummary]
    promote: Method[[str], RolloutSummary]
    roll_back: Method[[str], RolloutSummary]
    record_published: Method[[int, int], RolloutSummary]
