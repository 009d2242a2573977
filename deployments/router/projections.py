"""Projections: the state that the router derives from the journal's events, beside the policy."""

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from deployments.journal.snapshot import Snapshot
from deployments.profiler.trainer import ForecastTrainer
from deployments.router.arm_stats import ArmStats
from deployments.router.learner import Projection
from deployments.router.rollout import Rollout
from deployments.settings import GatewaySettings
from policies.budget import BudgetPacer
from policies.events import Decision, Event, Outcome, Record


class RouterProjections(Projection):
    """The rollout, the live statistics, the budget and the forecasts of one router.

    Attributes:
        pacer: charges the cost of each decision to the budget.

    Args:
        rollout: assigns the roles.
        arm_stats: measures the arms.
        trainer: trains the forecasts; it reads the journal by itself, so `record` does not concern it.
    """

    def __init__(self, rollout: Rollout, arm_stats: ArmStats, trainer: ForecastTrainer):
        self.rollout = rollout
        self.arm_stats = arm_stats
        self.trainer = trainer
        self.pacer = BudgetPacer(inf)
        self._models: Mapping[str, object] = {}

    def apply_settings(self, settings: GatewaySettings) -> None:
        """Use the models and the budget of these settings; the budget starts anew until `restore`."""
        self._models = settings.models
        self.arm_stats.set_arms(settings.models)
        self.pacer = BudgetPacer(settings.max_mean_cost_usd or inf)

    def record(self, event: Event, record: Record) -> None:
        """Give an event to the rollout, the statistics and the budget, in this order."""
        self.rollout.record(event, record)
        self.arm_stats.record(event, record)
        if isinstance(event, Decision):
            self.pacer.decided(event)
        elif isinstance(event, Outcome) and record.decision.arm in self._models:
            self.pacer.finished(record.decision, event)

    def add_to(self, snapshot: Snapshot) -> Snapshot:
        """Add the forecasts, the budget and the rollout to a snapshot."""
        state = snapshot.state | self.trainer.state()
        snapshot = replace(snapshot, state=state, pacer=self.pacer.state())
        return self.rollout.add_to(snapshot)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the budget, the forecasts and the rollout from a snapshot."""
        if snapshot.pacer:
            self.pacer.restore(snapshot.pacer)
        self.trainer.restore(snapshot.state, snapshot.arms)
        self.rollout.restore(snapshot)
