"""Champion, challenger and shadow: which policy decides, with which propensities, and that all learn the same."""

from collections.abc import Mapping

import numpy as np
import pytest

from policies.base import LearningBuffer, Policy
from policies.baselines import Always, Uniform
from policies.evaluation.offpolicy import estimate
from policies.evaluation.overlap import LoggedDecisions
from policies.events import Decision, Outcome
from policies.registry import make_policy
from policies.rollout.promotion_gate import may_promote
from policies.rollout.roles import CHALLENGER, CHAMPION, SHADOW, Roles, state_of
from policies.thompson.policy import Thompson, ThompsonSettings
from policies.types import Arm, Objective
from tests.support.requests import make_request

ARMS = tuple(Arm(name, prior_quality=0.5) for name in ("small", "large"))


def learned(seed: int, **settings: float) -> Thompson:
    """A Thompson sampler with some experience of its own."""
    policy = Thompson(ARMS, ThompsonSettings(**settings))
    rng = np.random.default_rng(seed)
    teach({"": policy}, decide(policy, 30, rng), rng)
    return policy


def decide(policy: Policy, count: int, rng: np.random.Generator) -> list[Decision]:
    return policy.decide(
        [make_request(f"What is {i}?") for i in range(count)], {}, rng, 0
    )


def teach(
    policies: Mapping[str, Policy | LearningBuffer],
    decisions: list[Decision],
    rng: np.random.Generator,
) -> None:
    for decision in decisions:
        latency_s = rng.random()
        score = float(rng.random() < 0.7)
        for policy in policies.values():
            policy.learn(decision, Outcome("r", "ok", 0.1, latency_s, 20, 9))
            policy.score(decision, score)


def test_the_logged_propensities_are_those_of_the_mixture_that_acted() -> None:
    """A coin decides which policy decides; the propensity is the arm's probability before the coin is thrown."""
    champion = learned(1)
    challenger = learned(2, exploration=3.0)
    roles = Roles({CHAMPION: champion, CHALLENGER: challenger}, share=0.3)
    made = decide(roles, 4000, np.random.default_rng(3))
    alone = [
        decide(policy, 1, np.random.default_rng(0))[0]
        for policy in (champion, challenger)
    ]
    wanted = [
        0.7 * a.propensity + 0.3 * b.propensity
        for a, b in zip(*(d.estimates for d in alone))
    ]
    first = [e.propensity for e in made[0].estimates]
    assert first == pytest.approx(wanted) and sum(first) == pytest.approx(1)
    challenged = np.mean([d.policy_version == CHALLENGER for d in made])
    assert challenged == pytest.approx(0.3, abs=0.03)
    expected = np.mean([d.estimate("large").propensity for d in made])
    assert np.mean([d.arm == "large" for d in made]) == pytest.approx(
        expected, abs=0.03
    )


def test_the_log_of_a_mixture_tells_what_each_of_them_would_earn() -> None:
    """With the propensities of the deciding policy alone it would not."""
    always = Always(ARMS, "small")
    uniform = Uniform(ARMS)
    roles = Roles({CHAMPION: always, CHALLENGER: uniform}, share=0.4)
    rng = np.random.default_rng(5)
    values = {}
    made = decide(roles, 4000, rng)
    chosen = np.array([int(d.arm == "large") for d in made])
    rewards = (rng.random(4000) < np.where(chosen == 1, 0.9, 0.4)).astype(float)
    log = LoggedDecisions(
        chosen, np.array([[e.propensity for e in d.estimates] for d in made]), rewards
    )
    for name, target in (
        ("small", [1.0, 0.0]),
        ("uniform", [0.5, 0.5]),
        ("large", [0.0, 1.0]),
    ):
        values[name] = estimate(log, np.tile(target, (4000, 1)), "ips").value
    assert values == pytest.approx(
        {"small": 0.4, "uniform": 0.65, "large": 0.9}, abs=0.05
    )


def test_a_challenger_s_share_lets_the_gate_judge_a_champion_that_never_explores() -> (
    None
):
    """Without the seat the log cannot tell; with it, no policy needs a least propensity to be judged."""
    champion = Always(ARMS, "small")
    challenger = Always(ARMS, "large")
    small, large = (np.tile(row, (1000, 1)) for row in ([1.0, 0.0], [0.0, 1.0]))
    for share, verdict in ((0.0, "refused: "), (0.1, "promoted: ")):
        rng = np.random.default_rng(7)
        seated = {CHAMPION: champion, CHALLENGER: challenger}
        made = decide(
            Roles(seated if share else {CHAMPION: champion}, share), 1000, rng
        )
        chosen = np.array([int(d.arm == "large") for d in made])
        rewards = (rng.random(1000) < np.where(chosen == 1, 0.9, 0.4)).astype(float)
        log = LoggedDecisions(
            chosen,
            np.array([[e.propensity for e in d.estimates] for d in made]),
            rewards,
        )
        report = may_promote(log, small, large)
        assert str(report["reason"]).startswith(verdict) and report["promote"] is bool(
            share
        )


def test_a_shadow_is_recorded_and_does_not_decide() -> None:
    """Arms and propensities are the same as without it; its choice is recorded."""
    champion = learned(1)
    shadow = Always(ARMS, "large")
    plain = decide(champion, 50, np.random.default_rng(8))
    made = decide(
        Roles({CHAMPION: champion, SHADOW: shadow}), 50, np.random.default_rng(8)
    )
    assert [(d.arm, d.estimates) for d in made] == [(d.arm, d.estimates) for d in plain]
    assert {d.shadow for d in made} == {"large"} and {d.shadow for d in plain} == {""}


def test_all_learn_what_any_of_them_decided() -> None:
    """Each policy ends in the state of learning alone; so does a policy that learns from the buffer later."""
    roles = Roles(
        {role: learned(i) for i, role in enumerate((CHAMPION, CHALLENGER, SHADOW))}, 0.5
    )
    rng = 4
    alone = {str(i): learned(i) for i in range(3)}
    late = learned(9)
    recorder = LearningBuffer()
    roles.buffers.append(recorder)
    made = decide(roles, 40, np.random.default_rng(6))
    teach({"": roles}, made, np.random.default_rng(rng))
    teach(alone | {"9": (told := learned(9))}, made, np.random.default_rng(rng))
    recorder.play(late)
    for one, other in zip(
        (*roles.members.values(), late), (*alone.values(), told), strict=True
    ):
        assert all(
            np.allclose(one.state()[key], value, rtol=1e-9)
            for key, value in other.state().items()
            # Only the scores of a policy's own decisions are evidence of drift.
            if not key.startswith("drift.")
        )


def test_what_the_challenger_expected_is_no_evidence_of_drift_for_the_champion() -> (
    None
):
    """The challenger forgets so fast that its expectations are wrong; nothing changes, and the champion sees that."""
    champion = Thompson(ARMS)
    challenger = Thompson(ARMS, ThompsonSettings(forgetting=0.95))
    roles = Roles({CHAMPION: champion, CHALLENGER: challenger}, 0.5)
    rng = np.random.default_rng(2)
    for n in range(3000):
        (decision,) = roles.decide([make_request()], {}, rng, n)
        roles.score(decision, float(rng.random() < 0.8))
    assert champion.state()["quality.cuts"][:, :, 1].min() == 1.0
    by_itself = champion.drift.known
    assert sum(by_itself) == 3000


def test_the_state_comes_back_role_by_role() -> None:
    """And the champion's part is that of a champion alone, as journals of earlier releases have it."""
    members = {
        CHAMPION: learned(1),
        CHALLENGER: learned(2),
        SHADOW: make_policy("static", ARMS),
    }
    state = Roles(members, 0.1).state()
    again = Roles(
        {
            CHAMPION: Thompson(ARMS),
            CHALLENGER: Thompson(ARMS),
            SHADOW: make_policy("static", ARMS),
        }
    )
    again.restore(state)
    assert all(
        np.array_equal(again.state()[key], value) for key, value in state.items()
    )
    lone = Roles({CHAMPION: Thompson(ARMS)})
    lone.restore(members[CHAMPION].state())
    assert all(
        np.array_equal(lone.state()[key], value)
        for key, value in state_of(state, CHAMPION).items()
    )
    with pytest.raises(ValueError, match=r"^challenger: .*quality"):
        again.restore(members[CHAMPION].state())


def test_a_swap_moves_everything_but_what_was_learned() -> None:
    """Two policies change places, and nothing else happens."""
    champion = learned(1)
    challenger = learned(2)
    roles = Roles({CHAMPION: champion, CHALLENGER: challenger}, 0.3)
    roles.swap(0.1)
    assert (
        roles.members == {CHAMPION: challenger, CHALLENGER: champion}
        and roles.share == 0.1
    )
    roles.remove_role(CHALLENGER)
    assert roles.members == {CHAMPION: challenger} and roles.share == 0.0


def test_limits_that_leave_one_of_them_no_arm_throw_no_coin() -> None:
    """A rule cannot keep a latency limit, so the champion's own verdict counts."""
    roles = Roles({CHAMPION: learned(1), CHALLENGER: Uniform(ARMS)}, share=0.9)
    request = make_request(objective=Objective(max_latency_s=1e-9))
    assert roles.decide([request], {}, np.random.default_rng(0), 0)[0].arm == ""


def test_what_does_not_fit_gets_no_role() -> None:
    """Other arms, an unknown role, or a share outside [0, 1] are errors."""
    roles = Roles({CHAMPION: learned(1)})
    for role, policy, share, why in (
        (
            SHADOW,
            Uniform(ARMS[:1]),
            0.0,
            "the shadow has the arms small, the champion small, large",
        ),
        (
            "chief",
            Uniform(ARMS),
            0.0,
            "unknown role 'chief'; choose one of: champion, challenger, shadow",
        ),
        (CHALLENGER, Uniform(ARMS), 1.5, "a share of 1.5 is no probability"),
    ):
        with pytest.raises(ValueError, match=why):
            roles.assign_role(role, policy, share)
