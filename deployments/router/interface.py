"""Interface of the router actor for components in other processes: its handle, and its state for operators.

The methods of the handle are those of actor.Router. `plain` turns a record into the data that the HTTP API returns.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import msgspec
from msgspec import structs

from deployments.calibration.records import (
    RunOrder,
    RunStatus,
    RunView,
    TaskResult,
    UngradedAnswer,
    Work,
)
from deployments.journal.rollout_state import RoleChange
from deployments.journal.snapshot import Snapshot
from deployments.privacy.records import PrivacyHandle
from deployments.remote import Method
from deployments.settings import GatewaySettings, Tuning
from policies.budget import NOTHING, Spending
from policies.demand import Demand
from policies.evaluation.kind_figures import Figures, Totals
from policies.events import Decision, Feedback, Outcome, Record
from policies.profiling.forecast import Forecaster
from policies.rollout.first_day import FirstDaySummary
from policies.types import ModelState, Request


@dataclass(frozen=True, eq=False)
class IngressView:
    """Everything that an ingress needs to decide without the router actor.

    snapshot: of the champion. Its budget pacer is empty if the ingress must leave the decisions to the router.
    states: by arm, without the ingress's own requests in flight.
    policy_version: of the champion's decisions.
    scoring_rates: by API key, the probability that it scores its next answer.
    ingresses: number of ingresses that have reported lately.
    calibrating: whether a calibration runs, so that the ingress should ask for work.
    undelivered: what the other ingresses have decided, and this router does not have yet.
    """

    snapshot: Snapshot
    states: Mapping[str, ModelState]
    policy_version: str
    scoring_rates: Mapping[str, float]
    ingresses: int
    calibrating: bool = False
    undelivered: Spending = NOTHING


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
    first_day: the stages by which the policy takes over from the team's rule; None if it did so at once.
    """

    roles: Mapping[str, RoleSummary]
    watch: Mapping[str, object] | None
    shadow: ShadowSummary
    history: tuple[RoleChange, ...]
    first_day: FirstDaySummary | None = None

    def plain(self) -> dict[str, object]:
        """Plain data; `first_day` is left out where there is none."""
        history = [msgspec.to_builtins(change) for change in self.history]
        plain: dict[str, object] = {
            "roles": {role: asdict(held) for role, held in self.roles.items()},
            "watch": self.watch,
            "shadow": asdict(self.shadow),
            "history": history,
        }
        if self.first_day is not None:
            plain["first_day"] = self.first_day.plain()
        return plain


@dataclass(frozen=True)
class ArmSummary:
    """An arm.

    state: its live measurements.
    share: its share of the latest `recent` routed decisions; None without any.
    expected_quality: mean score that these decisions expected of it, in [0, 1]; None if none of them could choose it.
    prompt_price_usd, output_price_usd: per token.
    tasks: what it can do.
    demand: what the autoscaler does not see; None if that is switched off, and for a variant, whose requests count for
        its model.
    variant_of: the model of which it is a variant; None for a model.
    figures: what its latest decisions show; kinds: the same by kind of work (kind_figures.py).
    """

    state: ModelState
    share: float | None
    expected_quality: float | None
    prompt_price_usd: float
    output_price_usd: float
    tasks: tuple[str, ...]
    figures: Figures
    kinds: Mapping[str, Figures]
    demand: Demand | None = None
    variant_of: str | None = None

    def plain(self) -> dict[str, object]:
        """Plain data: the fields of the state stand beside the others."""
        fields = asdict(self)
        state: ModelState = fields.pop("state")
        fields["demand"] = None if self.demand is None else self.demand._asdict()
        return structs.asdict(state) | fields


@dataclass(frozen=True)
class ExportSummary:
    """How far the tracker has exported the journal to MLflow, by its reports. Unknown values are None.

    row: last row that is exported; None if the tracker has not reported since this router started.
    waiting_rows: rows of the journal after that one.
    succeeded_s, reported_s: time of the last export that succeeded, and of the last report, since the epoch.
    problem: why the last export failed; "" if it succeeded.
    """

    row: int | None = None
    waiting_rows: int | None = None
    succeeded_s: float | None = None
    reported_s: float | None = None
    problem: str = ""

    def reported(self, row: int, problem: str, now_s: float) -> "ExportSummary":
        """The summary after one more report."""
        succeeded_s = self.succeeded_s if problem else now_s
        return ExportSummary(row, None, succeeded_s, now_s, problem)

    def upto(self, last_row: int) -> "ExportSummary":
        """The summary, with the rows that wait of a journal with this last row."""
        if self.row is None:
            return self
        return replace(self, waiting_rows=max(0, last_row - self.row))


@dataclass(frozen=True)
class RouterSummary:
    """The router.

    policy, policy_version: of the champion.
    decisions: number of decisions made so far.
    totals: numbers of decisions, answers and scores since the journal began.
    recent: number of the latest routed decisions from which the shares are computed.
    window: the figures of the latest decisions of all arms (kind_figures.py).
    quarantined: evidence against each quarantined API key (policies/feedback/reputation.py).
    in_doubt: names of the keys whose scores do not count, although they are not quarantined.
    row, waiting_rows: number of the journal's last row that this state contains, and of the rows not yet on disk.
    routed: metrics of the latest routed decisions, as MLflow has them (recent_metrics.py).
    rollout: roles of the policy versions.
    served_by: digest of the model behind each arm.
    budget: of the budget pacer (BudgetPacer.summary).
    profiler: reliability of the forecasts (Forecaster.reliability).
    models: the arms by name.
    uptime_s: age of the actor.
    export: of the journal to MLflow.
    last_used_s: by API key, the time of its latest decision, of those that the router has in memory.
    """

    policy: str
    policy_version: str
    decisions: int
    totals: Totals
    recent: int
    window: Figures
    quarantined: Mapping[str, Mapping[str, object]]
    in_doubt: list[str]
    row: int
    waiting_rows: int
    routed: Mapping[str, float]
    rollout: RolloutSummary
    served_by: Mapping[str, str]
    budget: Mapping[str, float | None]
    profiler: Mapping[str, float | None]
    models: Mapping[str, ArmSummary]
    uptime_s: float = 0.0
    export: ExportSummary = ExportSummary()
    last_used_s: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, object]:
        """Plain data."""
        return {
            "uptime_s": round(self.uptime_s, 1),
            "export": asdict(self.export),
            "policy": self.policy,
            "policy_version": self.policy_version,
            "decisions": self.decisions,
            "counts": self._counts(),
            "recent": self.recent,
            "window": asdict(self.window),
            "quarantined": dict(self.quarantined),
            "in_doubt": self.in_doubt,
            "last_used_s": dict(self.last_used_s),
            "journal": {"row": self.row, "waiting_rows": self.waiting_rows},
            "routed": dict(self.routed),
            "rollout": self.rollout.plain(),
            "served_by": dict(self.served_by),
            "budget": dict(self.budget),
            "profiler": dict(self.profiler),
            "models": {name: arm.plain() for name, arm in self.models.items()},
        }

    def _counts(self) -> dict[str, object]:
        counts: dict[str, object] = structs.asdict(self.totals.of_all())
        counts["routed"] = self.totals.routed.decisions
        counts["forced"] = self.totals.forced.decisions
        counts["calibration"] = self.totals.calibrated.decisions
        counts["pair"] = self.totals.paired.decisions
        return counts


class RouterHandle(PrivacyHandle, Protocol):
    """A handle of Ray (`ray.get_actor`)."""

    configure: Method[[GatewaySettings], None]
    settings: Method[[], GatewaySettings]
    report_tuning: Method[[Tuning], None]
    tuning: Method[[], Tuning | None]
    decide: Method[
        [list[Request], str, dict[str, int], Mapping[str, float]], list[Decision]
    ]
    observe: Method[[list[tuple[Decision, Outcome]], str, dict[str, int]], None]
    report_unserved: Method[[list[Decision]], None]
    demand: Method[[str, bool], float]
    feedback: Method[[list[Feedback], str], list[str]]
    salt: Method[[], bytes]
    rows: Method[[int, int], list[tuple[int, float, str, bytes]]]
    record: Method[[str], Record | None]
    kind_figures: Method[[str], Mapping[str, Figures]]
    snapshot: Method[[str, dict[str, int], Spending], IngressView]
    forecaster: Method[[int], Forecaster | None]
    summary: Method[[], RouterSummary]
    adopt: Method[[Snapshot], bool]
    checkpoint: Method[[], Snapshot]
    assign_role: Method[[str, Snapshot, float, str, str], RolloutSummary]
    restore_version: Method[
        [Snapshot, float, str | None, str, bool, str], RolloutSummary
    ]
    remove_role: Method[[str, str, str], RolloutSummary]
    promote: Method[[str, str], RolloutSummary]
    roll_back: Method[[str, str], RolloutSummary]
    advance: Method[[str, bool, str], RolloutSummary]
    record_published: Method[[int, int | None, str], RolloutSummary]
    record_export: Method[[int, str], None]
    start_calibration: Method[[RunOrder], RunStatus]
    calibrate: Method[[str, list[str], list[str], list[TaskResult]], Work]
    calibration_status: Method[[], RunStatus]
    calibration_view: Method[[], RunView]
    cancel_calibration: Method[[str], RunStatus]
    ungraded_answers: Method[[], tuple[UngradedAnswer, ...]]
    grade_answers: Method[[dict[str, float]], int]
    calibration_logged: Method[[str, str], None]
