"""The baselines that do not learn."""

from dataclasses import replace

import numpy as np
import pytest

from policies.baselines import Static
from policies.registry import make_policy
from policies.types import Arm, ModelState, Objective, Request
from tests.support.requests import make_profile

ARMS = tuple(Arm(name) for name in ("nano", "talker", "large"))
EASY = "What is 3 plus 5?"
HARD = "Tom has 347 coins. Tom buys 6 bags with 586 coins in each, and then 12 more. How many coins are there?"


def chosen(policy: Static, text: str, **states: ModelState) -> str:
    """The arm for a text."""
    request = Request("", make_profile(text), Objective())
    (decision,) = policy.decide([request], states, np.random.default_rng(0), 0)
    return decision.arm


def test_a_kind_with_an_arm_of_its_own_goes_there() -> None:
    """The other kinds are divided by complexity among the other arms."""
    policy = make_policy("static", ARMS, {"by_kind": {"question": "talker"}})
    assert isinstance(policy, Static)
    assert chosen(policy, "Who are you?") == "talker"
    assert chosen(policy, EASY) == "nano"
    assert chosen(policy, HARD) == "large"


def test_if_that_arm_is_not_eligible_the_complexity_decides() -> None:
    """And an arm of a kind gets another kind only if it is the last one."""
    policy = Static(ARMS, by_kind={"question": "talker"})
    down = ModelState(healthy=False)
    assert chosen(policy, "Who are you?", talker=down) == "nano"
    assert chosen(policy, HARD, nano=down, large=down) == "talker"


@pytest.mark.parametrize(
    ("by_kind", "why"),
    [
        ({"poems": "talker"}, "unknown kind 'poems'; choose one of: code"),
        ({"code": "huge"}, "unknown arm 'huge'; choose one of: nano"),
        ({"code": "nano", "other": "talker", "writing": "large"}, "names all arms"),
    ],
)
def test_a_wrong_kind_or_arm_is_an_error(by_kind: dict[str, str], why: str) -> None:
    """At the start, and with the names that exist."""
    with pytest.raises(ValueError, match=why):
        Static(ARMS, by_kind=by_kind)


@pytest.mark.parametrize("rule", ["static", "always"])
def test_a_rule_gives_variants_nothing_unless_they_are_named(rule: str) -> None:
    """A variant after the largest model is not the largest one; where no other arm is eligible, it answers."""
    arms = (Arm("small"), Arm("large"), Arm("direct", variant_of="large"))
    policy = make_policy(rule, arms)
    rng = np.random.default_rng(0)
    for complexity in (0.0, 1.0):
        profile = replace(make_profile(), complexity=complexity)
        asked = Request("r", profile, Objective())
        (decision,) = policy.decide([asked], {}, rng, 0)
        assert decision.arm in ("small", "large")
    alone = replace(asked, objective=Objective(models=("direct",)))
    assert policy.decide([alone], {}, rng, 0)[0].arm == "direct"
    named = make_policy("always", arms, {"arm": "direct"})
    assert named.decide([asked], {}, rng, 0)[0].arm == "direct"
