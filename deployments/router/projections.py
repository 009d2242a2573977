"""Projections: the state that the router derives from the journal's events, beside the policy."""

import time
from dataclasses import replace
from math import inf

from deployments.journal.snapshot import Snapshot
from deployments.observability.metrics import Telemetry
from deployments.profiler.trainer import ForecastTrainer
from deployments.router.arm_stats import ArmStats
from deployments.router.interface import ExportSummary
from deployments.router.learner import Projection
from deployments.router.rollout import Rollout
from deployments.settings import GatewaySettings
from policies.budget import BudgetPacer
from policies.demand import DemandMeter
from policies.evaluation.kind_figures import ROWS, Totals
from policies.events import Decision, Event, Feedback, Outcome, Record
from policies.feedback.scoring_rates import ScoringRates
from policies.rollout.reward_sampling import RewardSampler


class ScoreProjections(Projection):
    """The part of the router's derived state that scores change, derived again from another part of the journal.

    Attributes:
        arm_stats: the totals and the windows.
        scoring_rates, rewards: see RouterProjections and Rollout.
    """

    rebuild_rows = ROWS

    def __init__(self) -> None:
        self.arm_stats = ArmStats()
        self.scoring_rates = ScoringRates()
        self.rewards = RewardSampler()

    def record(self, event: Event, record: Record) -> None:
        """See Projection."""
        self.arm_stats.record(event, record)
        self.scoring_rates.record(event, record)
        self.rewards.record(event, record)

    def rebuild(self, event: Event, record: Record) -> None:
        """See Projection."""
        self.arm_stats.rebuild(event, record)
        self.rewards.record(event, record)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the totals and the scoring rates from a snapshot."""
        self.arm_stats.totals = (snapshot.totals or Totals()).copy()
        self.scoring_rates.restore(snapshot.scoring)


class RouterProjections(Projection):
    """The rollout, the live statistics, the budget and the forecasts of one router.

    Attributes:
        pacer: charges the cost of each decision to the budget.
        scoring_rates: how often each API key scores its answers.
        demand: what the autoscaler does not see.
    export: how far the export to MLflow is, by the tracker's reports.
    last_used_s: by API key, the time of its latest decision since the start, and of those that `rebuild` has seen.

    Args:
        rollout: assigns the roles.
        arm_stats: measures the arms.
        trainer: trains the forecasts; it reads the journal by itself, so `record` does not concern it.
        telemetry: counts the scores when they take effect, and what routing costs and saves.
    """

    rebuild_rows = ROWS

    def __init__(
        self,
        rollout: Rollout,
        arm_stats: ArmStats,
        trainer: ForecastTrainer,
        telemetry: Telemetry,
    ):
        self.rollout = rollout
        self.arm_stats = arm_stats
        self.trainer = trainer
        self.telemetry = telemetry
        self.pacer = BudgetPacer(inf)
        self.demand = DemandMeter()
        self.export = ExportSummary()
        self.last_used_s: dict[str, float] = {}
        self.scoring_rates = ScoringRates()
        self._arms: frozenset[str] = frozenset()

    def apply_settings(self, settings: GatewaySettings) -> None:
        """Use the models and the budget of these settings; the budget starts anew until `restore`."""
        arms = settings.arms()
        self._arms = frozenset(arm.name for arm in arms)
        self.arm_stats.set_arms(arms)
        self.pacer = BudgetPacer(settings.max_mean_cost_usd or inf)

    def record(self, event: Event, record: Record) -> None:
        """Give an event to the rollout, the statistics, the scoring rates and the budget, in this order."""
        self.rollout.record(event, record)
        self.arm_stats.record(event, record)
        self.scoring_rates.record(event, record)
        if not self.replaying:
            self.telemetry.routed(event, record)
            if isinstance(event, Decision):
                self.demand.decided(event, time.monotonic())
            elif isinstance(event, Outcome):
                self.demand.answered(record.decision.arm, event)
            if isinstance(event, Feedback):
                self.telemetry.score_counted(event, record)
        if isinstance(event, Decision):
            self.pacer.decided(event)
            self._record_use(event)
        elif isinstance(event, Outcome) and record.decision.arm in self._arms:
            self.pacer.finished(record.decision, event)

    def take_over(self, other: ScoreProjections, snapshot: Snapshot) -> None:
        """Replace what scores have changed.

        Args:
            other: was derived from the scores that count.
            snapshot: has the forecasts to start from; the next fit reads the journal again.
        """
        self.arm_stats.take_over(other.arm_stats)
        self.scoring_rates = other.scoring_rates
        self.rollout.rewards = other.rewards
        self.trainer.start_over(snapshot.state, snapshot.arms)

    def reset(self) -> None:
        """Clear the statistics."""
        self.arm_stats.reset()

    def rebuild(self, event: Event, record: Record) -> None:
        """Give the statistics an event from which they rebuild their windows."""
        self.arm_stats.rebuild(event, record)
        if isinstance(event, Decision):
            self._record_use(event)

    def _record_use(self, decision: Decision) -> None:
        if decision.owner:
            self.last_used_s[decision.owner] = decision.time_s

    def add_to(self, snapshot: Snapshot) -> Snapshot:
        """Add the forecasts, the budget, the scoring rates, the totals and the rollout to a snapshot."""
        snapshot = replace(
            snapshot,
            state=snapshot.state | self.trainer.state(),
            pacer=self.pacer.state(),
            scoring=self.scoring_rates.state(),
            totals=self.arm_stats.totals.copy(),
        )
        return self.rollout.add_to(snapshot)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the budget, the scoring rates, the totals, the forecasts and the rollout from a snapshot."""
        if snapshot.pacer:
            self.pacer.restore(snapshot.pacer)
            self.arm_stats.totals = (snapshot.totals or Totals()).copy()
        self.scoring_rates.restore(snapshot.scoring if snapshot.pacer else {})
        self.trainer.restore(snapshot.state, snapshot.arms)
        self.rollout.restore(snapshot)
