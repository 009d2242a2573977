"""Rollout: how the roles of policy versions in the router change.

A promotion swaps champion and challenger. Both are in memory and learn from every event, so a promotion loads nothing
and loses nothing. The former champion stays as the challenger with a small share of the traffic. A regression test
(policies/rollout/regression_watch.py) compares the rewards of both and rolls the promotion back if the new champion
earns less. Roles and history survive a restart, because the journal's snapshots contain them.

With `rollout: {start: observe}` the team's rule is the champion at first, and the policy of the settings is the shadow
from the first request on. It takes over in the stages of policies/rollout/first_day.py. It needs no published version,
and a rollback makes the rule the champion again at any stage, while the policy keeps what it has learned.
"""

import time
from collections import Counter, deque
from collections.abc import Container, Mapping
from dataclasses import replace
from math import isnan

import msgspec
from msgspec import structs

from deployments.errors import GateRefusedError
from deployments.journal.ids import sampled
from deployments.journal.rollout_state import (
    AUTOMATIC,
    RoleAssignment,
    RoleChange,
    RolloutState,
    WatchState,
    account,
)
from deployments.journal.snapshot import Snapshot
from deployments.router.interface import (
    RoleSummary,
    RolloutSummary,
    ShadowSummary,
)
from deployments.router.learner import Projection
from deployments.router.role_table import (
    REGISTERED,
    RoleTable,
    gate_settings,
    rule_of,
    tried_role,
)
from deployments.settings import GatewaySettings
from policies.base import Policy
from policies.evaluation.replay import utility
from policies.events import Decision, Event, Record
from policies.rollout.first_day import (
    RANDOMISED,
    UTILITY_BOUNDS,
    FirstDay,
    FirstDaySummary,
    Stage,
)
from policies.rollout.regression_watch import RegressionTest
from policies.rollout.reward_sampling import RewardSampler
from policies.rollout.roles import CHALLENGER, CHAMPION, ROLES, SHADOW

MAX_SEEN_REWARDS = 1000  # decisions


class Rollout(RoleTable, Projection):
    """The roles of one router, and the rules by which they change.

    Attributes:
        watch: the regression test of the last promotion; None if no promotion is watched.
        rewards: measures how often answers are scored.
        undo_row: row of the mark (journal/forgotten.py) of a version that was restored and then rolled back, until the
            router has withdrawn the mark; 0 for none.

    Args:
        settings: see RoleTable.
        snapshot: the last snapshot of the journal.
    """

    def __init__(self, settings: GatewaySettings, snapshot: Snapshot | None = None):
        super().__init__(settings)
        if snapshot is not None and snapshot.rollout:
            self._restore_state(snapshot.rollout)
        elif snapshot is not None:
            self.version = snapshot.version

    def _reset(self) -> None:
        super()._reset()
        self._promoted_s = 0.0  # time of the last promotion
        # labels of the champion since its promotion; each publication adds one
        self._promoted_labels: list[str] = []
        self.watch: RegressionTest | None = None
        # decisions whose reward the regression test has seen
        self._seen_rewards: deque[str] = deque(maxlen=MAX_SEEN_REWARDS)
        self.rewards = RewardSampler()
        self.undo_row = 0
        self._restored_row = 0  # row of the mark, while the restored version is watched
        self._clear_shadow()

    def _clear_shadow(self) -> None:
        self._shadow_choices: Counter[str] = Counter()  # by arm
        self._shadow_agreed = 0  # shadow choices that equal the actual choice

    # --- settings and versions ----------------------------------------------------------------------------------

    def record_published(
        self, version: int, of: int | None, by: str = AUTOMATIC
    ) -> None:
        """Give the champion, or the policy that is tried on the first day, a new number after it was published.

        Args:
            version: the new number.
            of: its number before; no role changes if another version has its role now, or if there was none (None).
            by: as in RoleChange.
        """
        role = tried_role(self._stage)
        given = self._assignments[role]
        if given.version != of:
            change = RoleChange(REGISTERED, "", version, "", None, time.time(), by)
            self._append(change)
            return
        self._assignments[role] = structs.replace(given, version=version)
        if self.watch is not None:
            self._promoted_labels.append(self.label(CHAMPION))
        reason = "what it has learned since" if by == AUTOMATIC else ""
        self._add_to_history(REGISTERED, role, reason, by)

    def record_adopted(self) -> None:
        """Note that a router that had learned nothing has taken over a published version."""
        reason = "this router had learned nothing, and it is the newest version"
        self._add_to_history("adopted", CHAMPION, reason, AUTOMATIC)

    # --- changes of roles ---------------------------------------------------------------------------------------

    def restore_champion(
        self,
        policy: Policy,
        snapshot: Snapshot,
        row: int,
        reason: str,
        by: str = AUTOMATIC,
    ) -> None:
        """Make an earlier version the champion, with the former champion as its watched predecessor.

        A challenger and a shadow lose their roles, because they have learned from the scores that are forgotten.

        Args:
            policy: was built from `snapshot`, and has learned what counts since then.
            snapshot: the version.
            row: of the mark of the forgotten scores.
            reason: stored in the history.
            by: see RoleChange.

        Raises:
            ValueError: the first day is not over, or the policy has other arms.
        """
        self._require_no_first_day()
        share = self._settings.rollout.watch_share
        former = self.roles.members[CHAMPION]
        for role in (CHALLENGER, SHADOW):
            if role in self._assignments:
                self._end_role(
                    role, f"it has learned from forgotten scores; {reason}", by
                )
        self.roles.reassign({CHAMPION: policy, CHALLENGER: former}, share)
        self.first_day = None
        self._assignments[CHALLENGER] = self._assignments[CHAMPION]
        self._assignments[CHAMPION] = RoleAssignment(
            snapshot.version, snapshot.policy, snapshot.options
        )
        self._share = share
        self._start_watch()
        self._restored_row = row
        self._add_to_history("restored", CHAMPION, reason, by)

    def replace_champion(self, policy: Policy) -> None:
        """Replace what the champion has learned; all roles stay with their versions."""
        self.roles.reassign({**self.roles.members, CHAMPION: policy}, self._share)

    def assign_role(
        self,
        role: str,
        policy: Policy,
        snapshot: Snapshot,
        share: float,
        reason: str,
        by: str = AUTOMATIC,
    ) -> None:
        """Make a policy the challenger or the shadow.

        Args:
            role: challenger or shadow.
            policy: was built from `snapshot`.
            snapshot: the version.
            share: share of the traffic for a challenger, in [0, 1].
            reason: stored in the history, as in RoleChange.
            by: as in RoleChange. The other changes of roles take both, too.

        Raises:
            ValueError: a promotion is being watched, so the predecessor is the challenger; or the first day is not
                over.
        """
        self._require_no_first_day()
        if role == CHALLENGER and self.watch is not None:
            raise ValueError(
                "the predecessor is the challenger while the promotion is watched; roll back or retire it"
            )
        self.first_day = (
            None  # its last stage is over, and now other versions have roles
        )
        share = share if role == CHALLENGER else 0.0
        self.roles.assign_role(role, policy, share)
        self._assignments[role] = RoleAssignment(
            snapshot.version, snapshot.policy, snapshot.options
        )
        if role == CHALLENGER:
            self._share = share
        else:
            self._clear_shadow()
        self._add_to_history("seated", role, reason, by)

    def remove_role(self, role: str, reason: str, by: str = AUTOMATIC) -> None:
        """Remove the challenger or the shadow.

        Raises:
            ValueError: no version has this role, it is the champion's, or the policy that is observed has it.
        """
        if role == CHAMPION or role not in self._assignments:
            raise ValueError(f"there is no {role} to take off")
        if self._stage is Stage.OBSERVE:
            raise ValueError(
                "the policy only observes; to end that, take `start: observe` out of serve_config.yaml"
            )
        if self._stage in (Stage.ONE, Stage.TEN):
            self._return_to_rule(reason, by)
            return
        self._end_role(role, reason, by)

    def _end_role(self, role: str, reason: str, by: str) -> None:
        self.roles.remove_role(role)
        self._add_to_history("retired", role, reason, by)
        del self._assignments[role]
        if role == CHALLENGER:
            self._share = 0.0
            self.watch = None
            self._restored_row = 0
        if self._stage is Stage.ALL and self.first_day is not None:
            self.first_day.enter(Stage.DONE, time.time())
            self.roles.compared = None

    def promote(self, reason: str, by: str = AUTOMATIC) -> None:
        """Swap champion and challenger, and start the regression test.

        Raises:
            ValueError: there is no challenger, or the first day is not over.
        """
        self._require_no_first_day()
        if CHALLENGER not in self._assignments:
            raise ValueError("there is no challenger to promote")
        self._swap(self._settings.rollout.watch_share)
        self._start_watch()
        self._add_to_history("promoted", CHAMPION, reason, by)

    def _start_watch(self) -> None:
        rollout = self._settings.rollout
        self._seen_rewards.clear()
        self._promoted_s = time.time()
        self._promoted_labels = [self.label(CHAMPION)]
        self.watch = RegressionTest(
            margin=rollout.watch_margin,
            alpha=rollout.watch_alpha,
            bounds=UTILITY_BOUNDS,
        )

    def roll_back(self, reason: str, by: str = AUTOMATIC) -> None:
        """Make the predecessor the champion again, and remove the promoted version.

        On the first day, and after its last stage, the rule decides again and the policy observes.

        Raises:
            ValueError: no promotion is being watched, or the rule decides already.
        """
        if self.first_day is not None:
            self._return_to_rule(reason, by)
            return
        if self.watch is None:
            raise ValueError(
                "no promotion is being watched, so no predecessor is alive; promote the version you want"
            )
        loser = self.version
        self._swap(0.0)
        self._seen_rewards.clear()
        self._add_to_history("rolled back", CHAMPION, reason, by, loser)
        self.undo_row = self._restored_row
        self._end_role(CHALLENGER, reason, by)

    # --- the first day ------------------------------------------------------------------------------------------

    def advance(self, reason: str, override: bool = False, by: str = AUTOMATIC) -> None:
        """Begin the next stage of the first day.

        Args:
            reason: stored in the history.
            override: whether to begin it although the gate refuses.
            by: stored in the history.

        Raises:
            GateRefusedError: the gate refuses; the message says what it waits for.
            ValueError: there is no next stage.
        """
        day = self.first_day
        if day is None or day.stage is Stage.DONE:
            raise ValueError(
                "no stage is left: the policy has all traffic; a first day begins with `rollout: {start: observe}`"
            )
        verdict = day.verdict()
        after = day.stage.next
        if day.stage is Stage.ALL:
            raise ValueError(
                "the policy has all traffic but the rule's share for the regression watch, which ends by itself"
            )
        if not (verdict.passed or override):
            raise GateRefusedError(
                f"refused: the stage of {after} waits for {verdict.reason}. To begin it all the same, say why: "
                "override_gate"
            )
        said = f"{reason}; {verdict.reason}" if reason else verdict.reason
        self._enter(after, said, by)

    def advance_if_due(self) -> None:
        """Begin the next stage of the first day, if the settings say so, the gate agrees and nothing holds it."""
        day = self.first_day
        if day is None or self._settings.rollout.advance != "auto" or day.held:
            return
        verdict = day.verdict()
        if verdict.passed:
            reason = f"by the gate: {verdict.reason}"
            self._enter(day.stage.next, reason, AUTOMATIC)

    def _enter(self, stage: Stage, reason: str, by: str) -> None:
        assert self.first_day is not None
        self._seat(stage)
        self._clear_shadow()
        self.first_day.enter(stage, time.time())
        if stage is Stage.ALL:
            self._start_watch()
        role = tried_role(stage)
        self._add_to_history("advanced", role, f"to {stage}: {reason}", by)

    def _return_to_rule(self, reason: str, by: str) -> None:
        day = self.first_day
        if day is None or day.stage is Stage.OBSERVE:
            raise ValueError("the rule decides already, and the policy only observes")
        stage = day.stage
        loser = self._assignments[tried_role(stage)].version
        self._seat(Stage.OBSERVE)
        self._clear_shadow()
        self.watch = None
        held = f"rolled back from {stage}: {account(reason, by)}"
        day.enter(Stage.OBSERVE, time.time(), held)
        self._add_to_history("rolled back", CHAMPION, reason, by, loser)

    # --- what the roles do --------------------------------------------------------------------------------------

    def record(self, event: Event, record: Record) -> None:
        """Count the shadow's choices and the coverage of feedback, and test the rewards of a watched promotion."""
        made = isinstance(event, Decision)
        if isinstance(event, Decision):
            self._count_shadow(event)
        request = self.rewards.record(event, record)
        if request is not None and self.watch is not None and not made:
            self._test_reward(self.watch, request)
        if request is not None and self.first_day is not None:
            self._record_first_day(self.first_day, event, request)

    def _record_first_day(self, day: FirstDay, event: Event, record: Record) -> None:
        flaw_sampled = not record.flaw or sampled(
            record.decision.id, self.rewards.probability(record)
        )
        reason = day.record(event, record, flaw_sampled)
        if reason:
            self._return_to_rule(reason, AUTOMATIC)

    def _count_shadow(self, decision: Decision) -> None:
        randomised = decision.fallback in RANDOMISED
        if decision.shadow and SHADOW in self._assignments and randomised:
            self._shadow_choices[decision.shadow] += 1
            self._shadow_agreed += decision.shadow == decision.arm

    def _test_reward(self, watch: RegressionTest, record: Record) -> None:
        decision = record.decision
        if decision.time_s < self._promoted_s or decision.fallback not in RANDOMISED:
            return
        predecessor = decision.policy_version == self.label(CHALLENGER)
        if not predecessor and decision.policy_version not in self._promoted_labels:
            return
        reward = utility(record)
        # a corrected score is not a second reward
        if isnan(reward) or decision.id in self._seen_rewards:
            return
        self._seen_rewards.append(decision.id)
        # the judge's sample is a hash of the id itself, so this one needs another hash
        if not sampled(f"{decision.id} reward", self.rewards.probability(record)):
            return
        if watch.observe(reward, predecessor=predecessor):
            self.roll_back(str(watch.report()["reason"]))
        elif watch.observations >= self._settings.rollout.watch_rewards:
            reason = f"the watch is over: {watch.report()['reason']}"
            self._end_role(CHALLENGER, reason, AUTOMATIC)

    def summary(self) -> RolloutSummary:
        """Each role's version and share, the regression test, and the last changes."""
        shares = {CHAMPION: 1 - self._share, CHALLENGER: self._share, SHADOW: 0.0}
        roles = {
            role: RoleSummary(given.version, given.policy, given.options, shares[role])
            for role, given in self._assignments.items()
        }
        return RolloutSummary(
            roles=roles,
            watch=self.watch.report() if self.watch is not None else None,
            shadow=ShadowSummary(dict(self._shadow_choices), self._shadow_agreed),
            history=tuple(self._history),
            first_day=self._summarise_first_day(),
        )

    def _summarise_first_day(self) -> FirstDaySummary | None:
        if self.first_day is None:
            return None
        rule = rule_of(self._configured)["policy"]
        policy = self._assignments[tried_role(self._stage)].policy
        return self.first_day.summary(rule, policy)

    def forget_decisions(self, gone: Container[str]) -> None:
        """Remove these decisions; their rewards and scores stay counted."""
        seen = [name for name in self._seen_rewards if name not in gone]
        self._seen_rewards = deque(seen, maxlen=MAX_SEEN_REWARDS)
        self.rewards.forget_decisions(gone)
        if self.first_day is not None:
            self.first_day.forget_decisions(gone)

    # --- snapshots ----------------------------------------------------------------------------------------------

    def add_to(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the rollout's state, and with the champion's version and options."""
        options = dict(self._assignments[CHAMPION].options)
        return replace(
            snapshot, version=self.version, options=options, rollout=self.state()
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the version number of a published version, or of a snapshot of an earlier release.

        The state of a snapshot of this release is restored by the constructor.
        """
        if not snapshot.rollout:
            self.version = snapshot.version

    def state(self) -> dict[str, object]:
        """The rollout as plain data, for a snapshot."""
        watch = None
        if self.watch is not None:
            watch = WatchState(self.watch.margin, self.watch.alpha, self.watch.state())
        state = RolloutState(
            configured=self._configured,
            seats=self._assignments,
            share=self._share,
            since=self._promoted_s,
            borne=self._promoted_labels,
            watch=watch,
            history=list(self._history),
            rewarded=list(self._seen_rewards),
            shadowed=dict(self._shadow_choices),
            agreed=self._shadow_agreed,
            rewards=self.rewards.state(),
            first_day=self.first_day.state() if self.first_day else None,
            restored=self._restored_row,
            undone=self.undo_row,
        )
        return state.plain()

    def _restore_state(self, stored: Mapping[str, object]) -> None:
        state = msgspec.convert(dict(stored), RolloutState)
        self._configured = state.configured
        self._assignments = {
            role: state.seats[role] for role in ROLES if role in state.seats
        }
        self._share = state.share
        self._promoted_s = state.since
        self._promoted_labels = state.borne
        if state.watch is not None:
            self.watch = RegressionTest(
                margin=state.watch.margin,
                alpha=state.watch.alpha,
                bounds=UTILITY_BOUNDS,
            )
            self.watch.restore(state.watch.state)
        self._history.extend(state.history)
        self._seen_rewards.extend(state.rewarded)
        self._shadow_choices.update(state.shadowed)
        self._shadow_agreed = state.agreed
        self.rewards.restore(state.rewards)
        self._restored_row = state.restored
        self.undo_row = state.undone
        self.first_day = None
        if state.first_day is not None:
            self.first_day = FirstDay(gate_settings(self._settings), 0.0)
            self.first_day.restore(state.first_day)
