"""Rollout: which policy version has which role in the router, and how that changes.

A promotion swaps champion and challenger. Both are in memory and learn from every event, so a promotion loads nothing
and loses nothing. The former champion stays as the challenger with a small share of the traffic. A regression test
(policies/rollout/regression_watch.py) compares the rewards of both and rolls the promotion back if the new champion
earns less. Roles and history survive a restart, because the journal's snapshots contain them.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from math import isnan

import msgspec
from msgspec import structs

from deployments.journal.snapshot import Plain, Snapshot
from deployments.router.interface import (
    RoleChange,
    RoleSummary,
    RolloutSummary,
    ShadowSummary,
)
from deployments.router.learner import Projection
from deployments.settings import GatewaySettings
from policies.base import Policy, restore_for_arms
from policies.evaluation.replay import utility
from policies.events import Decision, Event, Record
from policies.registry import make_policy
from policies.rollout.regression_watch import RegressionTest
from policies.rollout.roles import CHALLENGER, CHAMPION, ROLES, SHADOW, Roles, state_of

# values of Decision.fallback for decisions randomised between champion and challenger
RANDOMISED = ("", "profiler")
UTILITY_BOUNDS = (-1.0, 1.0)  # of policies.evaluation.replay.utility
MAX_HISTORY = 20  # changes of roles
MAX_SEEN_REWARDS = 1000  # decisions
log = logging.getLogger(__name__)


class RoleAssignment(msgspec.Struct, frozen=True):
    """The policy version that has a role.

    version: number in the registry; 0 if the policy was never published.
    policy, options: as make_policy takes them.
    """

    version: int
    policy: str
    options: Plain


class WatchState(msgspec.Struct):
    """The regression test of a promotion, as a snapshot stores it."""

    margin: float
    alpha: float
    state: Plain


class RolloutState(msgspec.Struct, kw_only=True):
    """A rollout as a snapshot stores it; see the attributes of Rollout for the meaning.

    The names and the order of the fields are part of the stored format.
    """

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


def champion_of(snapshot: Snapshot) -> Snapshot:
    """The part of a snapshot that concerns the champion: enough to decide like it, and to publish it."""
    if not snapshot.rollout:
        return snapshot
    state = state_of(snapshot.state, CHAMPION)
    return replace(snapshot, state=state, rollout={}, pacer={}, trust={})


class Rollout(Projection):
    """The roles of one router.

    Attributes:
        roles: the policies with their roles, from the last call of `make`.
        watch: the regression test of the last promotion; None if no promotion is watched.
        changed: whether a role has changed since the last snapshot; the caller resets it.

    Args:
        settings: of the gateway; its policy is the champion until a version is promoted.
        snapshot: the last snapshot of the journal.
    """

    def __init__(self, settings: GatewaySettings, snapshot: Snapshot | None = None):
        self.changed = False
        self._settings = settings
        self._reset()
        if snapshot is not None and snapshot.rollout:
            self._restore_state(snapshot.rollout)
        elif snapshot is not None:
            self.version = snapshot.version

    def _reset(self) -> None:
        policy = self._settings.policy
        # the policy of the settings, which was the champion before any promotion
        self._configured = policy.model_dump()
        self._assignments = {CHAMPION: RoleAssignment(0, policy.name, policy.options)}
        self._share = 0.0  # of the challenger
        self._promoted_s = 0.0  # time of the last promotion
        # labels of the champion since its promotion; each publication adds one
        self._promoted_labels: list[str] = []
        self.watch: RegressionTest | None = None
        self._history: deque[RoleChange] = deque(maxlen=MAX_HISTORY)
        # decisions whose reward the regression test has seen
        self._seen_rewards: deque[str] = deque(maxlen=MAX_SEEN_REWARDS)
        self._shadow_choices: Counter[str] = Counter()  # by arm
        self._shadow_agreed = 0  # shadow choices that equal the actual choice

    # --- roles --------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The last published version of the champion; 0 if none was published."""
        return self._assignments[CHAMPION].version

    @version.setter
    def version(self, version: int) -> None:
        champion = self._assignments[CHAMPION]
        self._assignments[CHAMPION] = structs.replace(champion, version=version)

    def label(self, role: str) -> str:
        """The `policy_version` of decisions that a role makes."""
        assignment = self._assignments[role]
        return f"{assignment.policy}-v{assignment.version}"

    def label_of(self, decision: Decision) -> str:
        """The `policy_version` of a decision that `roles` has just made."""
        challenged = decision.policy_version == CHALLENGER
        return self.label(CHALLENGER if challenged else CHAMPION)

    def make(self) -> Roles:
        """Make the policies with their roles; they have learned nothing yet."""
        members = {
            role: make_policy(given.policy, self._settings.arms(), given.options)
            for role, given in self._assignments.items()
        }
        self.roles = Roles(members, self._share)
        return self.roles

    def knows(self, settings: GatewaySettings) -> bool:
        """Whether these settings name the policy that was the champion before any promotion."""
        return settings.policy.model_dump() == self._configured

    def is_champions(self, snapshot: Snapshot) -> bool:
        """Whether a version has the policy and the options of the champion."""
        champion = self._assignments[CHAMPION]
        same_policy = snapshot.policy == champion.policy
        return same_policy and snapshot.options == champion.options

    def configure(self, settings: GatewaySettings) -> None:
        """Take over changed settings; another policy in them ends every trial and promotion."""
        self._settings = settings
        if not self.knows(settings):
            self._reset()
            reason = "serve_config.yaml names another policy"
            self._add_to_history("configured", CHAMPION, reason)

    def record_published(self, version: int, of: int) -> None:
        """Give the champion a new version number after it was published.

        Args:
            version: the new number.
            of: the champion's number before; nothing changes if another version has become champion meanwhile.
        """
        if self.version != of:
            return
        self.version = version
        if self.watch is not None:
            self._promoted_labels.append(self.label(CHAMPION))

    # --- changes of roles ---------------------------------------------------------------------------------------

    def build_policy(self, snapshot: Snapshot) -> Policy:
        """The policy of a version, over the current arms.

        Raises:
            ValueError: the version's policy does not exist or does not fit, or the version is the champion.
        """
        if snapshot.version == self.version:
            raise ValueError(f"version {snapshot.version} is the champion")
        policy = make_policy(snapshot.policy, self._settings.arms(), snapshot.options)
        restore_for_arms(policy, state_of(snapshot.state, CHAMPION), snapshot.arms)
        return policy

    def assign_role(
        self, role: str, policy: Policy, snapshot: Snapshot, share: float, reason: str
    ) -> None:
        """Make a policy the challenger or the shadow.

        Args:
            role: challenger or shadow.
            policy: was built from `snapshot`.
            snapshot: the version.
            share: share of the traffic for a challenger, in [0, 1].
            reason: stored in the history.

        Raises:
            ValueError: a promotion is being watched, so the predecessor is the challenger.
        """
        if role == CHALLENGER and self.watch is not None:
            raise ValueError(
                "the predecessor is the challenger while the promotion is watched; roll back or retire it"
            )
        share = share if role == CHALLENGER else 0.0
        self.roles.assign_role(role, policy, share)
        self._assignments[role] = RoleAssignment(
            snapshot.version, snapshot.policy, snapshot.options
        )
        if role == CHALLENGER:
            self._share = share
        else:
            self._shadow_choices = Counter()
            self._shadow_agreed = 0
        self._add_to_history("seated", role, reason)

    def remove_role(self, role: str, reason: str) -> None:
        """Remove the challenger or the shadow.

        Raises:
            ValueError: no version has this role, or it is the champion's.
        """
        if role == CHAMPION or role not in self._assignments:
            raise ValueError(f"there is no {role} to take off")
        self.roles.remove_role(role)
        self._add_to_history("retired", role, reason)
        del self._assignments[role]
        if role == CHALLENGER:
            self._share = 0.0
            self.watch = None

    def promote(self, reason: str) -> None:
        """Swap champion and challenger, and start the regression test.

        Raises:
            ValueError: there is no challenger.
        """
        if CHALLENGER not in self._assignments:
            raise ValueError("there is no challenger to promote")
        rollout = self._settings.rollout
        self._swap(rollout.watch_share)
        self._promoted_s = time.time()
        self._promoted_labels = [self.label(CHAMPION)]
        self.watch = RegressionTest(
            margin=rollout.watch_margin,
            alpha=rollout.watch_alpha,
            bounds=UTILITY_BOUNDS,
        )
        self._add_to_history("promoted", CHAMPION, reason)

    def roll_back(self, reason: str) -> None:
        """Make the predecessor the champion again, and remove the promoted version.

        Raises:
            ValueError: no promotion is being watched.
        """
        if self.watch is None:
            raise ValueError(
                "no promotion is being watched, so no predecessor is alive; promote the version you want"
            )
        loser = self.version
        self._swap(0.0)
        self._add_to_history("rolled back", CHAMPION, reason, loser=loser)
        self.remove_role(CHALLENGER, reason)

    def _swap(self, share: float) -> None:
        given = self._assignments
        given[CHAMPION], given[CHALLENGER] = given[CHALLENGER], given[CHAMPION]
        self.roles.swap(share)
        self._share = share
        self._seen_rewards.clear()

    def _add_to_history(
        self, what: str, role: str, reason: str, loser: int | None = None
    ) -> None:
        version = self._assignments[role].version
        self._history.append(RoleChange(what, role, version, reason, loser))
        self.changed = True
        log.info("%s as %s: policy version %d (%s)", what, role, version, reason)

    # --- what the roles do --------------------------------------------------------------------------------------

    def record(self, event: Event, record: Record) -> None:
        """Count the shadow's choices, and give the rewards of a watched promotion to the regression test."""
        if isinstance(event, Decision):
            self._count_shadow(event)
        elif self.watch is not None:
            self._test_reward(self.watch, record)

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
        if watch.observe(reward, predecessor=predecessor):
            self.roll_back(str(watch.report()["reason"]))
        elif watch.observations >= self._settings.rollout.watch_rewards:
            reason = f"the watch is over: {watch.report()['reason']}"
            self.remove_role(CHALLENGER, reason)

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
        )

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
        )
        plain: dict[str, object] = msgspec.to_builtins(state)
        return plain

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
