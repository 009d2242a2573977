"""Roles of policies that learn from the same events: champion, challenger with a share of the traffic, and shadow.

The champion decides. With a share s, a coin decides for each request whether the challenger decides instead. So an arm
is chosen with the probability of the mixture,

    p(a|x) = (1 - s) p_champion(a|x) + s p_challenger(a|x),

and that is the propensity of the decision of either policy (multiple importance sampling with the balance heuristic:
Veach and Guibas, SIGGRAPH 1995; for logs of several policies Agarwal et al., KDD 2017). The shadow decides every
request, but its decisions are only recorded.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import structs

from policies.base import LearningBuffer, Policy, State
from policies.events import Decision, Expectation, Outcome
from policies.types import Arm, ModelState, Request

CHAMPION, CHALLENGER, SHADOW = ROLES = ("champion", "challenger", "shadow")


class Roles:
    """A policy (base.Policy) that consists of one to three policies.

    Attributes:
        members: the policies by their roles; there is always a champion.
        share: the challenger's share of the traffic, in [0, 1].
        buffers: record every event that the members learn from.
        compared: the roles of a rule and of the policy that is tried beside it; each decision then records what both
            chose. None if no policy is tried in this way.

    Raises:
        ValueError: a member has other arms than the champion, or the share is not in [0, 1].
    """

    def __init__(self, members: Mapping[str, Policy], share: float = 0.0):
        self.members: dict[str, Policy] = {}
        self.share = 0.0
        self.buffers = list[LearningBuffer]()
        self.compared: tuple[str, str] | None = None
        self.reassign(members, share)

    @property
    def name(self) -> str:
        """The champion's name."""
        return self.members[CHAMPION].name

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms, which are the same for all members."""
        return self.members[CHAMPION].arms

    def assign_role(self, role: str, policy: Policy, share: float = 0.0) -> None:
        """Give a role to a policy; `share` is the challenger's."""
        if role not in ROLES:
            raise ValueError(
                f"unknown role '{role}'; choose one of: {', '.join(ROLES)}"
            )
        if policy.arms != self.arms:
            raise ValueError(
                f"the {role} has the arms {_names(policy)}, the champion {_names(self)}"
            )
        if not 0 <= share <= 1:
            raise ValueError(
                f"a share of {share:g} is no probability; choose one in [0, 1]"
            )
        self.members[role] = policy
        if role == CHALLENGER:
            self.share = share

    def remove_role(self, role: str) -> None:
        """Remove the challenger or the shadow."""
        self.members.pop(role, None)
        if role == CHALLENGER:
            self.share = 0.0

    def swap(self, share: float) -> None:
        """Exchange champion and challenger; `share` becomes the share of the former champion."""
        members = self.members
        members[CHAMPION], members[CHALLENGER] = members[CHALLENGER], members[CHAMPION]
        self.share = share

    def reassign(self, members: Mapping[str, Policy], share: float = 0.0) -> None:
        """Replace all roles at once. The policies must have the same arms; each keeps what it has learned."""
        self.members = {CHAMPION: members[CHAMPION]}
        self.share = 0.0
        for role, policy in members.items():
            self.assign_role(role, policy, share)

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """See base.Policy. The `policy_version` of what the challenger decided is CHALLENGER."""
        by = {
            role: policy.decide(requests, states, rng, sequence)
            for role, policy in self.members.items()
        }
        decided = by[CHAMPION]
        if len(by) == 1:
            return decided
        if self.share and CHALLENGER in by:
            coins = rng.random(len(decided)) < self.share
            decided = [
                self._mix(a, b, bool(coin))
                for a, b, coin in zip(decided, by[CHALLENGER], coins)
            ]
        if SHADOW in by:
            decided = [
                structs.replace(d, shadow=other.arm)
                for d, other in zip(decided, by[SHADOW])
            ]
        if self.compared is not None:
            rule, tried = (by[role] for role in self.compared)
            decided = [
                self._with_both(d, one, other)
                for d, one, other in zip(decided, rule, tried)
            ]
        return [
            structs.replace(
                decision,
                expectations=_expectations(
                    decision.arm, {role: made[i] for role, made in by.items()}
                ),
            )
            for i, decision in enumerate(decided)
        ]

    def _with_both(
        self, decision: Decision, rule: Decision, tried: Decision
    ) -> Decision:
        """The decision with the choices of the rule and of the policy that is tried beside it."""
        challenged = decision.policy_version == CHALLENGER
        acted = CHALLENGER if challenged else CHAMPION
        own = self.compared is not None and self.compared[1] == acted
        return structs.replace(
            decision,
            rule=rule.arm,
            shadow=tried.arm,
            shadow_estimates=() if own else tried.estimates,
        )

    def _mix(
        self, champion: Decision, challenger: Decision, challenged: bool
    ) -> Decision:
        """The decision of the policy that the coin selects, with the propensities of the mixture."""
        if not champion.arm or not challenger.arm:
            # The limits exclude every arm for one of them, so there is nothing to randomise.
            return champion
        acting = challenger if challenged else champion
        s = self.share
        both = zip(
            acting.estimates, champion.estimates, challenger.estimates, strict=True
        )
        mixed = tuple(
            [
                e._replace(propensity=(1 - s) * a.propensity + s * b.propensity)
                for e, a, b in both
            ]
        )
        version = CHALLENGER if challenged else acting.policy_version
        return structs.replace(acting, estimates=mixed, policy_version=version)

    def advance(self, sequence: int, scored: int = -1) -> None:
        """See base.Policy."""
        for policy in self.members.values():
            policy.advance(sequence, scored)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy."""
        for learner in self._learners():
            learner.learn(decision, outcome)

    def score(
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """See base.Policy."""
        by_role = {e.role: e for e in decision.expectations}
        for role, policy in self.members.items():
            own = by_role.get(role)
            if own is not None:
                own_view = structs.replace(decision, known=own.known)
                policy.score(own_view, score, weight, again, own.quality)
            else:
                # A policy that expected something else, or nothing, has no evidence of drift.
                alone = role == CHAMPION and not by_role
                policy.score(decision, score, weight, again or not alone)
        for buffer in self.buffers:
            buffer.score(decision, score, weight, again)

    def discount(self, arm: str, events: float) -> None:
        """See base.EventLearner."""
        for policy in self.members.values():
            policy.discount(arm, events)

    def _learners(self) -> list[Policy | LearningBuffer]:
        return [*self.members.values(), *self.buffers]

    def state(self) -> State:
        """See base.Policy: the champion's arrays under their own names, those of the others as `role.name`."""
        arrays = dict(self.members[CHAMPION].state())
        for role in self.members.keys() - {CHAMPION}:
            arrays |= {
                f"{role}.{name}": value
                for name, value in self.members[role].state().items()
            }
        return arrays

    def restore(self, state: State) -> None:
        """See base.Policy."""
        for role, policy in self.members.items():
            try:
                policy.restore(state_of(state, role))
            except ValueError as error:
                raise ValueError(f"{role}: {error}") from error


def _expectations(arm: str, by: Mapping[str, Decision]) -> tuple[Expectation, ...]:
    """The expectations of the policies that would have chosen this arm and that learn."""
    return tuple(
        Expectation(role, made.estimate().unflawed_quality, made.known)
        for role, made in by.items()
        if made.arm == arm and made.known >= 0
    )


def state_of(state: State, role: str) -> State:
    """The arrays of one role in the state of all."""
    if role == CHAMPION:
        return {
            name: value
            for name, value in state.items()
            if name.partition(".")[0] not in ROLES
        }
    return {
        name.removeprefix(f"{role}."): v
        for name, v in state.items()
        if name.startswith(f"{role}.")
    }


def _names(policy: "Policy | Roles") -> str:
    return ", ".join(arm.name for arm in policy.arms)
