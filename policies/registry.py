"""The policies, by their names in serve_config.yaml."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from policies.base import Policy, realign
from policies.baselines import Always, Static, Uniform
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.types import Arm


def _thompson(arms: Sequence[Arm], **options: Any) -> Policy:
    return Thompson(arms, ThompsonSettings(**options))


POLICIES: Mapping[str, Callable[..., Policy]] = {
    "thompson": _thompson,
    "static": Static,
    "always": Always,
    "uniform": Uniform,
}
RULES = ("static", "always", "uniform")  # the policies that learn nothing


def make_policy(
    name: str, arms: Sequence[Arm], options: Mapping[str, Any] | None = None
) -> Policy:
    """Build a policy by its name.

    Raises:
        ValueError: the name is unknown, or the policy has no such option.
    """
    if name not in POLICIES:
        raise ValueError(
            f"unknown policy '{name}'; choose one of: {', '.join(POLICIES)}"
        )
    if not arms:
        raise ValueError(
            "a policy needs at least one arm; declare a model in serve_config.yaml"
        )
    try:
        return POLICIES[name](arms, **(options or {}))
    except TypeError as error:
        raise ValueError(
            f"policy '{name}' does not take these options: {dict(options or {})}"
        ) from error


def rearm(
    policy: Policy, arms: Sequence[Arm], options: Mapping[str, Any] | None = None
) -> Policy:
    """The policy rebuilt for other arms or prices; arms that stay keep what was learned of them."""
    after = make_policy(policy.name, arms, options)
    names = ([arm.name for arm in policy.arms], [arm.name for arm in arms])
    after.restore(realign(policy.state(), *names, after.state()))
    return after
