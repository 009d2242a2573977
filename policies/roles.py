"""Several policies that learn from the same events: the champion decides, a challenger gets a share, a shadow none.

With a share s, request by request a coin decides who acts, so an arm is chosen with the probability of the mixture,

    p(a|x) = (1 - s) p_champion(a|x) + s p_challenger(a|x),

and that is the propensity of the decision, whoever made it (multiple importance sampling with the balance heuristic:
Veach and Guibas, SIGGRAPH 1995; for logs of several policies Agarwal et al., KDD 2017).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import structs

from policies.base import Policy, State
from policies.types import Arm, Decision, ModelState, Outcome, Request

CHAMPION, CHALLENGER, SHADOW = ROLES = ("champion", "challenger", "shadow")


class Recorder:
    """Notes what the others learn, for one that comes later."""

    def __init__(self) -> None:
        self._learned: list[tuple[Decision, Outcome] | tuple[Decision, float, float, bool]] = []

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy."""
        self._learned.append((decision, outcome))

    def score(self, decision: Decision, score: float, weight: float = 1.0, again: bool = False) -> None:
        """See base.Policy."""
        self._learned.append((decision, score, weight, again))

    def play(self, policy: Policy) -> None:
        """Teach a policy all that was noted."""
        for item in self._learned:
            if len(item) == 2:
                policy.learn(*item)
            else:
                policy.score(*item)


class Roles:
    """A policy (base.Policy) made of one to three.

    Attributes:
        members: the policies by their roles; there is always a champion.
        share: of the traffic that the challenger gets, in [0, 1].
        recorders: are told all that the members learn.

    Raises:
        ValueError: a member has other arms than the champion, or the share is no probability.
    """

    def __init__(self, members: Mapping[str, Policy], share: float = 0.0):
        self.members: dict[str, Policy] = {CHAMPION: members[CHAMPION]}
        self.share, self.recorders = 0.0, list[Recorder]()
        for role, policy in members.items():
            self.seat(role, policy, share)

    @property
    def name(self) -> str:
        """The champion's."""
        return self.members[CHAMPION].name

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The same for all members."""
        return self.members[CHAMPION].arms

    def seat(self, role: str, policy: Policy, share: float = 0.0) -> None:
        """Give a role to a policy; `share` is the challenger's."""
        if role not in ROLES:
            raise ValueError(f"unknown role '{role}'; choose one of: {', '.join(ROLES)}")
        if policy.arms != self.arms:
            raise ValueError(f"the {role} has the arms {_names(policy)}, the champion {_names(self)}")
        if not 0 <= share <= 1:
            raise ValueError(f"a share of {share:g} is no probability; choose one in [0, 1]")
        self.members[role] = policy
        if role == CHALLENGER:
            self.share = share

    def vacate(self, role: str) -> None:
        """Take the challenger or the shadow off."""
        self.members.pop(role, None)
        if role == CHALLENGER:
            self.share = 0.0

    def swap(self, share: float) -> None:
        """Champion and challenger change places; from now on `share` is that of the former champion."""
        members = self.members
        members[CHAMPION], members[CHALLENGER] = members[CHALLENGER], members[CHAMPION]
        self.share = share

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """See base.Policy. The `policy_version` of what the challenger decided is CHALLENGER."""
        by = {role: policy.decide(requests, states, rng, sequence) for role, policy in self.members.items()}
        decided = by[CHAMPION]
        if self.share and CHALLENGER in by:
            coins = rng.random(len(decided)) < self.share
            decided = [self._mix(a, b, bool(coin)) for a, b, coin in zip(decided, by[CHALLENGER], coins)]
        if SHADOW in by:
            decided = [structs.replace(d, shadow=other.arm) for d, other in zip(decided, by[SHADOW])]
        return decided

    def _mix(self, champion: Decision, challenger: Decision, challenged: bool) -> Decision:
        """The decision of the one on whom the coin fell, with the propensities of both."""
        if not champion.arm or not challenger.arm:  # one of them finds no arm within the limits: no coin is thrown
            return champion
        acting, s = challenger if challenged else champion, self.share
        both = zip(acting.estimates, champion.estimates, challenger.estimates, strict=True)
        mixed = tuple([e._replace(propensity=(1 - s) * a.propensity + s * b.propensity) for e, a, b in both])
        version = CHALLENGER if challenged else acting.policy_version
        return structs.replace(acting, estimates=mixed, policy_version=version)

    def advance(self, sequence: int) -> None:
        """See base.Policy."""
        for policy in self.members.values():
            policy.advance(sequence)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy."""
        for learner in self._learners():
            learner.learn(decision, outcome)

    def score(self, decision: Decision, score: float, weight: float = 1.0, again: bool = False) -> None:
        """See base.Policy."""
        for learner in self._learners():
            learner.score(decision, score, weight, again)

    def _learners(self) -> list[Policy | Recorder]:
        return [*self.members.values(), *self.recorders]

    def state(self) -> State:
        """See base.Policy: the champion's arrays under their own names, those of the others as `role.name`."""
        arrays = dict(self.members[CHAMPION].state())
        for role in self.members.keys() - {CHAMPION}:
            arrays |= {f"{role}.{name}": value for name, value in self.members[role].state().items()}
        return arrays

    def restore(self, state: State) -> None:
        """See base.Policy."""
        for role, policy in self.members.items():
            try:
                policy.restore(state_of(state, role))
            except ValueError as error:
                raise ValueError(f"{role}: {error}") from error


def state_of(state: State, role: str) -> State:
    """The arrays of one role in the state of all."""
    if role == CHAMPION:
        return {name: value for name, value in state.items() if name.partition(".")[0] not in ROLES}
    return {name.removeprefix(f"{role}."): v for name, v in state.items() if name.startswith(f"{role}.")}


def _names(policy: "Policy | Roles") -> str:
    return ", ".join(arm.name for arm in policy.arms)
