"""Which policy version has which role in the router, how that changes, and how it survives a restart.

A promotion swaps two policies that are both alive and both learn from every event, so nothing is loaded, lost or
learned twice. The former champion stays as the challenger with a small share; beside it gate.Watch tests what the new
one earns, and swaps back by itself. No Ray in here, and the log of what happened is in the snapshots of the journal.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from math import isnan
from typing import Any

from deployments.settings import GatewaySettings
from deployments.snapshot import Snapshot
from policies.base import Policy
from policies.gate import Watch
from policies.ledger import Event, Record
from policies.registry import make_policy
from policies.replay import utility
from policies.roles import CHALLENGER, CHAMPION, ROLES, SHADOW, Roles, state_of
from policies.succession import take_over
from policies.types import Decision

WITH_A_COIN = ("", "profiler")  # Decision.fallback of those for which a coin was thrown between the two
BOUNDS = (-1.0, 1.0)  # of replay.utility
REMEMBERED = 20  # changes of roles
log = logging.getLogger(__name__)

Seat = dict[str, Any]  # version, policy, options: who has a role; plain data, because it goes into snapshots


def champion_of(snapshot: Snapshot) -> Snapshot:
    """Only what concerns the champion: enough to decide like it, and to publish it."""
    return (
        replace(snapshot, state=state_of(snapshot.state, CHAMPION), rollout={}, pacer={}, trust={})
        if snapshot.rollout
        else snapshot
    )


class Rollout:
    """The roles of one router.

    Args:
        settings: of the gateway; its policy is the champion until a version is promoted.
        snapshot: the last one of the journal.
    """

    def __init__(self, settings: GatewaySettings, snapshot: Snapshot | None = None):
        self.changed = False  # and not in a snapshot yet
        self._settings = settings
        self._reset()
        if snapshot is not None and snapshot.rollout:
            self._restore(snapshot.rollout)
        elif snapshot is not None:
            self.version = snapshot.version

    def _reset(self) -> None:
        policy = self._settings.policy
        self._configured = policy.model_dump()
        self._seats: dict[str, Seat] = {CHAMPION: {"version": 0, "policy": policy.name, "options": policy.options}}
        self._share, self._since = 0.0, 0.0
        self._borne: list[str] = []  # labels of the promoted policy since then: each version published of it is one
        self.watch: Watch | None = None
        self._history: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self._rewarded: deque[str] = deque(maxlen=1000)  # decisions whose first reward the watch has seen
        self._shadowed: Counter[str] = Counter()  # the shadow's choices
        self._agreed = 0  # of them, with those that were made

    # --- who is who ---------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Of the champion: the last one published of it; 0 for none yet."""
        return int(self._seats[CHAMPION]["version"])

    @version.setter
    def version(self, version: int) -> None:
        self._seats[CHAMPION]["version"] = version

    def label(self, role: str) -> str:
        """What decisions of a role bear as their policy_version."""
        seat = self._seats[role]
        return f"{seat['policy']}-v{seat['version']}"

    def label_of(self, decision: Decision) -> str:
        """The same for a decision as Roles made it."""
        return self.label(CHALLENGER if decision.policy_version == CHALLENGER else CHAMPION)

    def make(self) -> Roles:
        """The policies with their roles, knowing nothing yet."""
        members = {role: self._member(seat) for role, seat in self._seats.items()}
        self.roles = Roles(members, self._share)
        return self.roles

    def _member(self, seat: Seat) -> Policy:
        return make_policy(seat["policy"], self._settings.arms(), seat["options"])

    def knows(self, settings: GatewaySettings) -> bool:
        """Whether these settings name the policy that was the champion before any promotion."""
        return settings.policy.model_dump() == self._configured

    def is_champions(self, snapshot: Snapshot) -> bool:
        """Whether a version is of the same policy as the champion, with the same options."""
        seat = self._seats[CHAMPION]
        return (snapshot.policy, snapshot.options) == (seat["policy"], seat["options"])

    def configure(self, settings: GatewaySettings) -> None:
        """Take over changed settings; another policy in them ends every trial and promotion."""
        self._settings = settings
        if not self.knows(settings):
            self._reset()  # to a policy of which no version is published yet
            self._remember("configured", CHAMPION, "serve_config.yaml names another policy")

    def published(self, version: int, of: int) -> None:
        """The champion, whose last version was `of`, is now this version; unless another is champion by now."""
        if self.version == of:
            self.version = version
            if self.watch is not None:
                self._borne.append(self.label(CHAMPION))

    # --- how that changes ---------------------------------------------------------------------------------------

    def candidate(self, snapshot: Snapshot) -> Policy:
        """The policy of a version, over the arms of today.

        Raises:
            ValueError: it is no such policy, or is the champion's own version.
        """
        if snapshot.version == self.version:
            raise ValueError(f"version {snapshot.version} is the champion")
        policy = make_policy(snapshot.policy, self._settings.arms(), snapshot.options)
        take_over(policy, state_of(snapshot.state, CHAMPION), snapshot.arms)
        return policy

    def seat(self, role: str, policy: Policy, snapshot: Snapshot, share: float, reason: str) -> None:
        """Give a policy, made from a version's snapshot, the role of challenger or shadow.

        Raises:
            ValueError: a promotion is being watched, and the predecessor is the challenger.
        """
        if role == CHALLENGER and self.watch is not None:
            raise ValueError("the predecessor is the challenger while the promotion is watched; roll back or retire it")
        share = share if role == CHALLENGER else 0.0
        self.roles.seat(role, policy, share)
        self._seats[role] = {"version": snapshot.version, "policy": snapshot.policy, "options": snapshot.options}
        if role == CHALLENGER:
            self._share = share
        else:
            self._shadowed, self._agreed = Counter(), 0
        self._remember("seated", role, reason)

    def vacate(self, role: str, reason: str) -> bool:
        """Take the challenger or the shadow off; False if there is none."""
        if role == CHAMPION or role not in self._seats:
            return False
        self.roles.vacate(role)
        self._remember("retired", role, reason)
        del self._seats[role]
        if role == CHALLENGER:
            self._share, self.watch = 0.0, None
        return True

    def promote(self, reason: str) -> None:
        """Champion and challenger change places, and the watch begins.

        Raises:
            ValueError: there is no challenger.
        """
        if CHALLENGER not in self._seats:
            raise ValueError("there is no challenger to promote")
        rollout = self._settings.rollout
        self._swap(rollout.watch_share)
        self._since, self._borne = time.time(), [self.label(CHAMPION)]
        self.watch = Watch(margin=rollout.watch_margin, alpha=rollout.watch_alpha, bounds=BOUNDS)
        self._remember("promoted", CHAMPION, reason)

    def rollback(self, reason: str) -> bool:
        """The predecessor becomes the champion again, and nobody is on trial; False if there is no predecessor."""
        if self.watch is None:
            return False
        loser = self.version
        self._swap(0.0)
        self._remember("rolled back", CHAMPION, reason, loser=loser)
        self.vacate(CHALLENGER, reason)
        return True

    def _swap(self, share: float) -> None:
        seats = self._seats
        seats[CHAMPION], seats[CHALLENGER] = seats[CHALLENGER], seats[CHAMPION]
        self.roles.swap(share)
        self._share = share
        self._rewarded.clear()

    def _remember(self, what: str, role: str, reason: str, **more: Any) -> None:
        version = self._seats[role]["version"]
        self._history.append({"what": what, "role": role, "version": version, "reason": reason, **more})
        self.changed = True
        log.info("%s as %s: policy version %d (%s)", what, role, version, reason)

    # --- what is seen of them -----------------------------------------------------------------------------------

    def note(self, event: Event, record: Record) -> None:
        """Watch the promoted policy, and count what the shadow would have done."""
        decision = record.decision
        if isinstance(event, Decision):
            if decision.shadow and SHADOW in self._seats and decision.fallback in WITH_A_COIN:
                self._shadowed[decision.shadow] += 1
                self._agreed += decision.shadow == decision.arm
            return
        if self.watch is None or decision.time_s < self._since or decision.fallback not in WITH_A_COIN:
            return
        if decision.policy_version not in (*self._borne, self.label(CHALLENGER)):  # somebody else's
            return
        predecessor = decision.policy_version == self.label(CHALLENGER)
        reward = utility(record)
        if isnan(reward) or decision.id in self._rewarded:  # a correction is no second reward
            return
        self._rewarded.append(decision.id)
        if self.watch.observe(reward, predecessor=predecessor):
            self.rollback(str(self.watch.report()["reason"]))
        elif self.watch.observations >= self._settings.rollout.watch_rewards:
            self.vacate(CHALLENGER, f"the watch is over: {self.watch.report()['reason']}")

    def summary(self) -> dict[str, Any]:
        """Plain data: each role's version, the challenger's share, the watch, and the last changes."""
        return {
            "roles": {role: {**seat, "share": self._share_of(role)} for role, seat in self._seats.items()},
            "watch": self.watch.report() if self.watch is not None else None,
            "shadow": {"choices": dict(self._shadowed), "agreed": self._agreed},
            "history": list(self._history),
        }

    def _share_of(self, role: str) -> float:
        return {CHAMPION: 1 - self._share, CHALLENGER: self._share, SHADOW: 0.0}[role]

    # --- how it survives ----------------------------------------------------------------------------------------

    def complete(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot with all of this in it."""
        options = dict(self._seats[CHAMPION]["options"])
        return replace(snapshot, version=self.version, options=options, rollout=self.state())

    def take(self, snapshot: Snapshot) -> None:
        """The champion goes on from this snapshot, of a published version or of an earlier release."""
        if not snapshot.rollout:
            self.version = snapshot.version

    def state(self) -> dict[str, Any]:
        """For a snapshot, as plain data."""
        return {
            "configured": self._configured,
            "seats": self._seats,
            "share": self._share,
            "since": self._since,
            "borne": self._borne,
            "watch": None
            if self.watch is None
            else {"margin": self.watch.margin, "alpha": self.watch.alpha} | {"state": self.watch.state()},
            "history": list(self._history),
            "rewarded": list(self._rewarded),
            "shadowed": dict(self._shadowed),
            "agreed": self._agreed,
        }

    def _restore(self, kept: Mapping[str, Any]) -> None:
        self._configured = kept["configured"]
        self._seats = {role: kept["seats"][role] for role in ROLES if role in kept["seats"]}
        self._share, self._since = kept["share"], kept["since"]
        self._borne = list(kept.get("borne", ()))
        if kept["watch"] is not None:
            self.watch = Watch(margin=kept["watch"]["margin"], alpha=kept["watch"]["alpha"], bounds=BOUNDS)
            self.watch.restore(kept["watch"]["state"])
        self._history.extend(kept["history"])
        self._rewarded.extend(kept["rewarded"])
        self._shadowed.update(kept["shadowed"])
        self._agreed = kept["agreed"]
