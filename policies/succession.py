"""A model takes another's place: it inherits what was learned of its predecessor, with more doubt.

The predecessor's events weigh less by a common factor, so that together they count for as many as the operator trusts
them to: a power prior (Ibrahim and Chen, Statistical Science 2000) with means kept and variances inflated.
"""

from collections.abc import Sequence

from policies.base import Policy, State, realign
from policies.prequential import Prequential
from policies.roles import Roles
from policies.thompson import Thompson


def inherit(policy: Policy, arm: str, keep: float) -> None:
    """Let what is known of an arm so far count for no more than `keep` events of each kind.

    Args:
        policy: those that learn nothing stay as they are; of several (roles.py) it concerns each.
        arm: its name; unknown ones are none of the policy's business.
        keep: events, above 0.
    """
    if isinstance(policy, Roles | Prequential):
        for member in policy.members.values():
            inherit(member, arm, keep)
    elif isinstance(policy, Thompson):
        for k, known in enumerate(policy.arms):
            if known.name == arm:
                for part in (policy.quality, policy.latency.tokens, policy.latency.ttft, policy.latency.tpot):
                    part.cut(k, keep)


def take_over(policy: Policy, state: State, before: Sequence[str]) -> None:
    """Restore a policy from what was learned of other arms; a new arm with a parent among these inherits from it.

    Args:
        policy: that knows nothing yet.
        state: of a policy of the same name.
        before: names of its arms.

    Raises:
        ValueError: see Policy.restore.
    """
    parents = {arm.name: arm.parent for arm in policy.arms}
    policy.restore(realign(state, before, list(parents), policy.state(), parents))
    for arm in policy.arms:
        if arm.name not in before and arm.parent in before:
            inherit(policy, arm.name, arm.inherit)
