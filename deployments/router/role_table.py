"""Table of roles: which policy version has which role in the router, and what each of them has learned.

This module changes roles and asks for no reason; rollout.py decides when a role may change.
"""

import logging
import time
from collections import deque
from dataclasses import replace

import msgspec
from msgspec import structs

from deployments.journal.rollout_state import (
    AUTOMATIC,
    RoleAssignment,
    RoleChange,
    RolloutState,
)
from deployments.journal.snapshot import PREFIX, Plain, Snapshot
from deployments.settings import GatewaySettings
from policies.base import Policy, restore_for_arms
from policies.events import Decision
from policies.registry import make_policy
from policies.rollout.first_day import FirstDay, GateSettings, Stage
from policies.rollout.roles import CHALLENGER, CHAMPION, ROLES, SHADOW, Roles, state_of

MAX_HISTORY = 50  # changes of roles
REGISTERED = "registered"  # RoleChange.what
log = logging.getLogger(__name__)


def champion_of(snapshot: Snapshot) -> Snapshot:
    """The part of a snapshot that concerns the champion: enough to decide like it, and to publish it."""
    if not snapshot.rollout:
        return snapshot
    state = state_of(snapshot.state, CHAMPION)
    return replace(
        snapshot,
        state=state,
        rollout={},
        pacer={},
        trust={},
        scoring={},
        totals=None,
    )


class RoleTable:
    """The roles of one router.

    Attributes:
        roles: the policies with their roles, from the last call of `make`.
        first_day: the stages in which the policy takes over from the team's rule; None if it had all traffic at once,
            or once another version has got a role after the last stage.
        changed: whether a role has changed since the last snapshot; the caller resets it.

    Args:
        settings: of the gateway; its policy is the champion until a version is promoted, unless a rule comes first.
    """

    def __init__(self, settings: GatewaySettings):
        self.changed = False
        self._settings = settings
        self._reset()

    def _reset(self) -> None:
        """Give the policy and the rule of the settings their first roles."""
        policy = self._settings.policy
        rule = self._settings.rollout.observed_rule
        # the policy and the rule of the settings, which had their roles before any promotion
        self._configured = configured_by(self._settings)
        self._assignments = {CHAMPION: RoleAssignment(0, policy.name, policy.options)}
        self.first_day: FirstDay | None = None
        if rule is not None:
            self._assignments[SHADOW] = self._assignments[CHAMPION]
            self._assignments[CHAMPION] = RoleAssignment(0, rule.policy, rule.options)
            self.first_day = FirstDay(gate_settings(self._settings), time.time())
        self._share = 0.0  # of the challenger
        self._history: deque[RoleChange] = deque(maxlen=MAX_HISTORY)

    @property
    def version(self) -> int:
        """The last published version of the champion; 0 if none was published."""
        return self._assignments[CHAMPION].version

    @version.setter
    def version(self, version: int) -> None:
        champion = self._assignments[CHAMPION]
        self._assignments[CHAMPION] = structs.replace(champion, version=version)

    @property
    def champion_policy(self) -> str:
        """Name of the champion's policy."""
        return self._assignments[CHAMPION].policy

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
        self.roles.compared = self._stage.roles
        return self.roles

    @property
    def _stage(self) -> Stage:
        """The stage of the first day; the last one if there is none."""
        return Stage.DONE if self.first_day is None else self.first_day.stage

    def knows(self, settings: GatewaySettings) -> bool:
        """Whether these settings name the policy, and the rule, that had their roles before any promotion."""
        return configured_by(settings) == self._configured

    def is_champions(self, snapshot: Snapshot) -> bool:
        """Whether a version has the policy and the options of the champion."""
        champion = self._assignments[CHAMPION]
        same_policy = snapshot.policy == champion.policy
        return same_policy and snapshot.options == champion.options

    def configure(self, settings: GatewaySettings) -> None:
        """Take over changed settings; another policy or another rule in them ends every trial and promotion."""
        self._settings = settings
        if self.first_day is not None:
            self.first_day.settings = gate_settings(settings)
        if self.knows(settings):
            return
        same_policy = self._configured | configured_by(settings) == self._configured
        if same_policy and self._stage is Stage.DONE:
            # The first day is over, and the settings no longer mention it.
            self._configured = configured_by(settings)
            self.first_day = None
            return
        self._reset()
        reason = "serve_config.yaml names another policy"
        if same_policy:
            reason = "serve_config.yaml no longer has `start: observe`"
        elif self.first_day is not None:
            reason = (
                "serve_config.yaml has `start: observe` with another policy or rule"
            )
        self._add_to_history("configured", CHAMPION, reason, AUTOMATIC)

    def carried(self, before: Snapshot) -> Snapshot:
        """A snapshot from before the last change of the settings, that fits the roles after it.

        Where a first day begins or ends, the policy of the settings has another role than before. Its learned state is
        moved to that role, so that nothing has to be learned again from the journal.
        """
        old = msgspec.convert(before.rollout, RolloutState)
        if old.first_day is None and self.first_day is None:
            return before
        stage = Stage.DONE if old.first_day is None else old.first_day.stage
        source = tried_role(stage)
        if old.seats[source].policy != self._settings.policy.name:
            return before
        target = tried_role(self._stage)
        state = {}
        for name, array in before.state.items():
            if name.startswith(PREFIX):
                state[name] = array
        for name, array in state_of(before.state, source).items():
            state[name if target == CHAMPION else f"{target}.{name}"] = array
        policy = self._assignments[CHAMPION].policy
        return replace(before, policy=policy, state=state)

    def to_publish(self, snapshot: Snapshot) -> Snapshot:
        """The part of a snapshot to publish: the champion, or the policy that is tried on the first day.

        The rule has learned nothing, so there is nothing of it to publish.
        """
        champion = champion_of(snapshot)
        role = tried_role(self._stage)
        if role == CHAMPION:
            return champion
        given = self._assignments[role]
        state = state_of(snapshot.state, role)
        for name, array in snapshot.state.items():
            if name.startswith(PREFIX):
                state[name] = array
        return replace(
            champion,
            policy=given.policy,
            version=given.version,
            options=dict(given.options),
            state=state,
        )

    def build_policy(self, snapshot: Snapshot, champion: bool = False) -> Policy:
        """The policy of a version, over the current arms.

        Args:
            snapshot: the version.
            champion: whether the version may be the champion's last one.

        Raises:
            ValueError: the version's policy does not exist or does not fit, the version is the champion, or the first
                day is not over.
        """
        self._require_no_first_day()
        if snapshot.version == self.version and not champion:
            raise ValueError(f"version {snapshot.version} is the champion")
        policy = make_policy(snapshot.policy, self._settings.arms(), snapshot.options)
        restore_for_arms(policy, state_of(snapshot.state, CHAMPION), snapshot.arms)
        return policy

    def _swap(self, share: float) -> None:
        given = self._assignments
        given[CHAMPION], given[CHALLENGER] = given[CHALLENGER], given[CHAMPION]
        self.roles.swap(share)
        self._share = share

    def _seat(self, stage: Stage) -> None:
        """Give rule and policy the roles of a stage; the policy keeps what it has learned."""
        source = tried_role(self._stage)
        tried = self._assignments[source], self.roles.members[source]
        present = self._stage.roles
        if present is None:  # the rule has no role any more
            given = RoleAssignment(0, **rule_of(self._configured))
            policy = make_policy(given.policy, self._settings.arms(), given.options)
            rule = given, policy
        else:
            rule = self._assignments[present[0]], self.roles.members[present[0]]
        roles = stage.roles
        assert roles is not None
        seats = dict(zip(roles, (rule, tried)))
        self._assignments = {r: seats[r][0] for r in ROLES if r in seats}
        self._share = stage.share if stage in (Stage.ONE, Stage.TEN) else 0.0
        if stage is Stage.ALL:
            self._share = self._settings.rollout.watch_share  # of the rule
        members = {role: policy for role, (_, policy) in seats.items()}
        self.roles.reassign(members, self._share)
        self.roles.compared = roles

    def _require_no_first_day(self) -> None:
        """Raise a ValueError while rule and policy share the roles among them."""
        if self._stage is not Stage.DONE:
            raise ValueError(
                f"the first day is not over (stage: {self._stage}): begin its next stage or roll back first"
            )

    def _add_to_history(
        self, what: str, role: str, reason: str, by: str, loser: int | None = None
    ) -> None:
        version = self._assignments[role].version
        change = RoleChange(what, role, version, reason, loser, time.time(), by)
        self._append(change)

    def _append(self, change: RoleChange) -> None:
        """Add a change to the history.

        A version is registered every few minutes. So that they do not push the changes of roles out, the registrations
        of one role that follow one another without an operator are one entry.
        """
        last = self._history[-1] if self._history else None
        if last is not None and _continues(last, change):
            self._history.pop()
            first = last.version if last.first is None else last.first
            change = structs.replace(change, first=first)
        self._history.append(change)
        self.changed = True
        log.info(
            "%s as %s: policy version %d (%s)",
            change.what,
            change.role or "no role",
            change.version,
            change.account,
        )


def _continues(last: RoleChange, change: RoleChange) -> bool:
    """Whether a change is one more registration by the router itself, like the last one."""
    kinds = [(each.what, each.role, each.by) for each in (last, change)]
    return kinds[0] == kinds[1] and change.what == REGISTERED and change.by == AUTOMATIC


def configured_by(settings: GatewaySettings) -> Plain:
    """The policy of the settings, and the rule that comes before it, if there is one."""
    configured: Plain = settings.policy.model_dump()
    rule = settings.rollout.observed_rule
    return configured if rule is None else configured | {"rule": rule.model_dump()}


def rule_of(configured: Plain) -> Plain:
    """Name and options of the rule in what `_configured_by` returned."""
    rule: Plain = configured["rule"]
    return rule


def gate_settings(settings: GatewaySettings) -> GateSettings:
    """What the gate of the first day asks for, by the settings."""
    rollout = settings.rollout
    return GateSettings(
        scores=rollout.first_scores,
        margin=rollout.first_margin,
        rewards=rollout.first_rewards,
        level=rollout.confidence_level,
        repeated=rollout.anytime_valid or rollout.advance == "auto",
        watch_margin=rollout.watch_margin,
        watch_alpha=rollout.watch_alpha,
    )


def tried_role(stage: Stage) -> str:
    """The role of the policy that takes over from the rule; without a first day it is the champion."""
    return CHAMPION if stage.roles is None else stage.roles[1]
