"""The first day in a running router: stages, restarts, rollbacks and changed settings."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.router.learner import Learner
from deployments.router.replay import JournalView
from deployments.router.rollout import Rollout
from deployments.settings import GatewaySettings
from policies.base import Policy
from policies.events import Decision
from policies.rollout.first_day import FirstDay, Stage
from policies.rollout.roles import CHALLENGER, CHAMPION, SHADOW, Roles
from policies.thompson.policy import Thompson
from policies.types import Vector
from tests.deployments.router.test_rollout import System, make_settings

SMALL = {"policy": "always", "options": {"arm": "small"}}
LARGE = {"policy": "always", "options": {"arm": "large"}}


def observing(folder: Path, rule: dict[str, Any] = SMALL, **options: Any) -> System:
    """A router that begins with this rule, whose gate needs few scores and rewards."""
    return System(make_settings(folder, **settings_of(rule, **options)))


def settings_of(rule: dict[str, Any] = SMALL, **options: Any) -> dict[str, Any]:
    given = {"first_scores": 40, "first_rewards": 3, "first_margin": 0.1}
    return {"start": "observe", "rule": rule, **given, **options}


def day_of(system: System) -> FirstDay:
    day = system.rollout.first_day
    assert day is not None
    return day


def policy_of(system: System) -> Thompson:
    """The policy that is tried, whatever its role."""
    members = system.rollout.roles.members.values()
    (policy,) = [member for member in members if isinstance(member, Thompson)]
    return policy


def sums(policy: Policy) -> dict[str, Vector]:
    """What a policy has learned, discounted to sequence number 0 whatever clock its sums refer to."""
    state = policy.state()
    found = {}
    for part in ("quality", "tokens", "ttft"):
        grown = 0.9995 ** -state[f"{part}.reference"][0]
        for name in ("count", "moment", "precision"):
            found[f"{part}.{name}"] = state[f"{part}.{name}"] * grown
    return found


def learned_alike(policy: Policy, other: Policy) -> bool:
    """Whether two policies have learned from the same events, each of them once."""
    theirs = sums(other)
    return all(np.allclose(v, theirs[k], rtol=1e-9) for k, v in sums(policy).items())


def same(one: System, other: System | Learner) -> bool:
    """Whether the policy of a system has learned what the policy of another one has."""
    learner = other.learner if isinstance(other, System) else other
    mine = one.learner.sequence, one.learner.records.scored
    assert mine == (learner.sequence, learner.records.scored)
    roles = learner.policy
    assert isinstance(roles, Roles)
    (policy,) = [m for m in roles.members.values() if isinstance(m, Thompson)]
    return learned_alike(policy_of(one), policy)


async def until_passed(system: System, most: int = 4000) -> int:
    """Serve requests until the gate lets the next stage begin; the number of requests."""
    served = 0
    while not day_of(system).verdict().passed:
        assert served < most, day_of(system).verdict().reason
        served += len(await system.serve(50))
    return served


async def begin(system: System, stage: Stage) -> None:
    """Begin the stages up to this one, without the gate."""
    while day_of(system).stage is not stage:
        if day_of(system).stage is Stage.ALL:
            await system.router.remove_role(CHALLENGER, "enough")
        else:
            await system.router.advance("because", True)


async def test_the_rule_decides_and_the_policy_learns(tmp_path: Path) -> None:
    """From the first request on, without a published version; decisions record what the policy would have done."""

    system = observing(tmp_path)
    made = await system.serve(60)
    assert {d.arm for d in made} == {"small"}
    assert {d.policy_version for d in made} == {"always-v0"}
    assert {d.shadow for d in made} == {"small", "large"}
    assert all(d.estimate().propensity == 1.0 for d in made)
    fresh = Learner(
        JournalView(system.learner.journal, 0, None),
        Rollout(make_settings(tmp_path)).make,
    )
    assert same(system, fresh)
    stored = await system.router.record(made[0].id)
    assert stored is not None
    assert stored.decision.shadow_estimates[1].latency_s > 0


async def test_the_policy_takes_over_stage_by_stage(tmp_path: Path) -> None:
    """Each stage begins only after its gate lets it, and gives the policy its share of the traffic."""

    system = observing(tmp_path, watch_rewards=200)
    with pytest.raises(ValueError, match="1 % waits for 40 more answers"):
        await system.router.advance("because")
    await until_passed(system)
    for stage, share in ((Stage.ONE, 0.01), (Stage.TEN, 0.1), (Stage.ALL, 0.8)):
        summary = await system.router.advance("because")
        day = summary.first_day
        assert day is not None and day.stage == stage.value and not day.passed
        role = CHAMPION if stage is Stage.ALL else CHALLENGER
        assert summary.roles[role].policy == "thompson"
        assert summary.roles[role].share == pytest.approx(share)
        with pytest.raises(ValueError, match=r"waits for|ends by itself"):
            await system.router.advance("because")
        if stage is not Stage.ALL:
            made = []
            while not day_of(system).verdict().passed:
                made += await system.serve(50)
            by_policy = [d.policy_version == "thompson-v0" for d in made]
            print(f"{stage}: {len(made)} requests")
            slack = 4 * (share * (1 - share) / len(made)) ** 0.5
            assert np.mean(by_policy) == pytest.approx(share, abs=slack)
    assert system.rollout.watch is not None
    await system.serve(220)
    assert day_of(system).stage is Stage.DONE and system.rollout.watch is None
    made = await system.serve(50)
    assert {d.policy_version for d in made} == {"thompson-v0"}
    assert not any(d.rule or d.shadow for d in made)
    assert np.mean([d.arm == "large" for d in made]) > 0.8
    changes = [
        change.reason.partition(":")[0]
        for change in system.rollout.summary().history
        if change.what == "advanced"
    ]
    assert changes == ["to 1 %", "to 10 %", "to 100 %"]
    with pytest.raises(ValueError, match="no stage is left"):
        await system.router.advance("because")


async def test_stages_begin_by_themselves_if_the_settings_say_so(
    tmp_path: Path,
) -> None:
    """The router's maintenance begins them; after a rollback it waits for an operator."""

    system = observing(tmp_path, advance="auto", watch_rewards=100)
    stages = []
    for _ in range(120):
        await system.serve(50)
        await system.router._maintain()
        stages.append(day_of(system).stage)
        if day_of(system).stage is Stage.DONE:
            break
    assert list(dict.fromkeys(stages))[-3:] == [Stage.TEN, Stage.ALL, Stage.DONE]
    await system.router.roll_back("it is Friday")
    await system.serve(50)
    await system.router._maintain()
    summary = system.rollout.summary().first_day
    assert summary is not None and summary.stage == "observe" and summary.passed
    assert summary.held == "rolled back from done: it is Friday"
    await system.router.advance("because")
    assert day_of(system).stage is Stage.ONE and not day_of(system).held


async def test_no_stage_begins_by_itself_by_default(tmp_path: Path) -> None:
    """An operator begins it; the summary says that the gate would let it begin."""

    system = observing(tmp_path)
    await until_passed(system)
    await system.router._maintain()
    assert day_of(system).stage is Stage.OBSERVE


STAGES = list(Stage)


@pytest.mark.parametrize("stage", STAGES)
async def test_each_stage_survives_a_restart(tmp_path: Path, stage: Stage) -> None:
    """A restart restores stage, roles, share, counts, regression test and policy, and replays later events."""

    system = observing(tmp_path)
    await system.serve(60)
    await begin(system, stage)
    await system.serve(70)
    await system.learner.save()
    await system.serve(30)
    again = System(system.settings)
    assert again.rollout.state() == system.rollout.state()
    assert again.rollout.summary() == system.rollout.summary()
    assert day_of(again).stage is stage
    assert again.rollout.roles.compared == system.rollout.roles.compared
    assert same(again, system)
    made = await again.serve(40)
    assert all(bool(d.rule) == (stage is not Stage.DONE) for d in made)
    assert day_of(System(system.settings)).stage is stage


@pytest.mark.parametrize("stage", STAGES)
async def test_a_rollback_returns_to_the_rule_from_each_stage(
    tmp_path: Path, stage: Stage
) -> None:
    """The rule has all traffic at once; the policy observes, keeps what it has learned, and may begin again."""

    async def scenario() -> None:
        system = observing(tmp_path)
        await system.serve(60)
        await begin(system, stage)
        await system.serve(50)
        policy = policy_of(system)
        scores = day_of(system).observation.scores
        if stage is Stage.OBSERVE:
            with pytest.raises(ValueError, match="the rule decides already"):
                await system.router.roll_back("because")
            return
        summary = await system.router.roll_back("because")
        assert {r: held.policy for r, held in summary.roles.items()} == {
            CHAMPION: "always",
            SHADOW: "thompson",
        }
        assert summary.roles[CHAMPION].share == 1.0 and system.rollout.watch is None
        assert policy_of(system) is policy
        assert day_of(system).observation.scores == scores
        for _ in range(2):
            made = await system.serve(30)
            assert {d.policy_version for d in made} == {"always-v0"}
            assert {d.arm for d in made} == {"small"}
            assert all(d.shadow_estimates for d in made)
            again = System(system.settings)
            assert same(again, system)
            system = again
        await system.router.advance("because", True)
        assert day_of(system).stage is Stage.ONE

    await scenario()


@pytest.mark.parametrize("stage", [Stage.TEN, Stage.ALL])
async def test_a_policy_that_earns_less_is_rolled_back_by_itself(
    tmp_path: Path, stage: Stage
) -> None:
    """The regression test returns to the rule, across restarts; the policy observes again and no stage begins."""

    # a policy cannot learn what a rule that draws by lot chooses next, so the two keep choosing differently
    system = observing(tmp_path, {"policy": "uniform"}, watch_share=0.3)
    await system.serve(100)
    await begin(system, stage)
    served = 0
    while day_of(system).stage is not Stage.OBSERVE and served < 3000:
        served += len(await system.serve(50, by_rule))
        if served % 250 == 0:
            system = System(system.settings, seed=served)
    print(f"{stage}: returned to the rule after {served} requests")
    assert day_of(system).stage is Stage.OBSERVE and served < 3000
    assert "to 1 rolls back" in day_of(system).held
    assert system.rollout.label(CHAMPION) == "uniform-v0"
    assert {d.policy_version for d in await system.serve(20)} == {"uniform-v0"}


def by_rule(decision: Decision) -> float:
    """1 for an answer of the rule, 0 for one of the policy."""
    return float(decision.policy_version == "uniform-v0")


async def test_operations_on_versions_wait_for_the_end_of_the_first_day(
    tmp_path: Path,
) -> None:
    """Roles cannot be given away before; after the last stage they can, and a rollback is then an ordinary one."""

    system = observing(tmp_path)
    await system.serve(60)
    version = await system.version(5)
    over = "the first day is not over"
    refused: list[tuple[Callable[[], Awaitable[Any]], str]] = [
        (lambda: system.assign(SHADOW, version), over),
        (lambda: system.assign(CHALLENGER, version, 0.1), over),
        (lambda: system.router.promote("because"), over),
        (lambda: system.router.remove_role(SHADOW, ""), "the policy only observes"),
    ]
    for change, why in refused:
        with pytest.raises(ValueError, match=why):
            await change()
    await begin(system, Stage.TEN)
    await system.router.remove_role(CHALLENGER, "because")
    assert day_of(system).stage is Stage.OBSERVE
    await begin(system, Stage.DONE)
    version = await system.version(6)
    await system.assign(CHALLENGER, version, 0.2)
    assert system.rollout.first_day is None
    assert "first_day" not in system.rollout.summary().plain()
    await system.router.promote("because")
    await system.router.roll_back("because")
    assert system.rollout.label(CHAMPION) == "thompson-v0"
    await system.router.configure(system.settings)
    assert System(system.settings).rollout.first_day is None


async def test_the_policy_that_is_tried_is_published_and_not_the_rule(
    tmp_path: Path,
) -> None:
    """A version of the rule would hold nothing; the tried policy gets the number, in whatever role."""

    system = observing(tmp_path)
    await system.serve(40)
    for number, stage in enumerate((Stage.OBSERVE, Stage.TEN, Stage.ALL), 1):
        await begin(system, stage)
        published = await system.router.checkpoint()
        assert (published.policy, published.version) == ("thompson", number - 1)
        assert set(published.state) >= set(policy_of(system).state())
        summary = await system.router.record_published(number, number - 1)
        held = {role.policy: role.version for role in summary.roles.values()}
        assert held == {"thompson": number, "always": 0}
    fresh = System(make_settings(tmp_path / "other"))
    assert await fresh.router.adopt(replace(published, version=3))
    assert same(fresh, system)
    observer = observing(tmp_path / "third")
    assert not await observer.router.adopt(replace(published, version=3))


async def test_an_ingress_leaves_the_decisions_to_the_router_until_the_end(
    tmp_path: Path,
) -> None:
    """Its snapshot has the rule and no pacer, since the policy must decide beside it; at the end it has the policy."""

    system = observing(tmp_path)
    await system.serve(40)
    for stage, policy in (
        (Stage.OBSERVE, "always"),
        (Stage.TEN, "always"),
        (Stage.ALL, "thompson"),
        (Stage.DONE, "thompson"),
    ):
        await begin(system, stage)
        view = await system.router.snapshot("ingress", {})
        assert view.snapshot.policy == policy
        assert view.policy_version == f"{policy}-v0"
        assert bool(view.snapshot.pacer) is (stage is Stage.DONE)
    assert system.router._maintenance is not None
    system.router._maintenance.cancel()


async def test_observing_begins_in_a_system_that_has_learned(tmp_path: Path) -> None:
    """The rule gets the traffic, and the policy keeps what it has learned, here and when the setting is removed."""

    system = System(make_settings(tmp_path))
    await system.serve(80)
    before = system.rollout.roles.members[CHAMPION]
    routed = system.router._arm_stats.totals.routed.decisions
    await system.router.configure(make_settings(tmp_path, **settings_of()))
    assert day_of(system).stage is Stage.OBSERVE
    assert {d.arm for d in await system.serve(20)} == {"small"}
    assert system.router._arm_stats.totals.routed.decisions == routed + 20
    rebuilt = Learner(
        JournalView(system.learner.journal, 0, None),
        Rollout(make_settings(tmp_path)).make,
    )
    assert same(system, rebuilt) and policy_of(system) is not before

    await system.router.configure(make_settings(tmp_path, **settings_of(LARGE)))
    assert {d.arm for d in await system.serve(20)} == {"large"}
    await begin(system, Stage.TEN)
    await system.serve(50)
    await system.router.configure(make_settings(tmp_path, **settings_of()))
    assert day_of(system).stage is Stage.OBSERVE
    learned = policy_of(system)
    await system.router.configure(make_settings(tmp_path))
    assert system.rollout.first_day is None
    assert list(system.rollout.roles.members) == [CHAMPION]
    assert learned_alike(learned, policy_of(system))
    last = [change.reason for change in system.rollout.summary().history]
    assert last[-1] == "serve_config.yaml no longer has `start: observe`"
    again = System(system.settings)
    await again.router.configure(make_settings(tmp_path))
    assert same(again, system)


async def test_the_setting_may_be_removed_after_the_last_stage(tmp_path: Path) -> None:
    """Nothing changes then: the policy stays the champion with its version and all that it has learned."""

    system = observing(tmp_path)
    await system.serve(40)
    await begin(system, Stage.DONE)
    await system.router.record_published(4, 0)
    policy = policy_of(system)
    await system.router.configure(make_settings(tmp_path))
    assert system.rollout.first_day is None
    assert system.rollout.label(CHAMPION) == "thompson-v4"
    assert policy_of(system) is not policy
    assert learned_alike(policy_of(system), policy)


async def test_changed_limits_of_the_gate_count_at_once(tmp_path: Path) -> None:
    """They end neither the stage nor what was counted in it."""

    system = observing(tmp_path, first_scores=1000)
    await system.serve(60)
    assert "940 more answers" in day_of(system).verdict().reason
    changed = make_settings(tmp_path, **settings_of(first_scores=50))
    await system.router.configure(changed)
    assert day_of(system).verdict().passed
    assert day_of(system).observation.requests == 60


async def test_an_added_model_ends_no_stage(tmp_path: Path) -> None:
    """The policy keeps what it has learned of the other models, and chooses among all of them."""

    system = observing(tmp_path)
    await system.serve(60)
    await begin(system, Stage.TEN)
    await system.serve(60)
    before = policy_of(system).state()["quality.count"]
    measured = day_of(system).measured()
    plain = system.settings.model_dump()
    plain["models"]["huge"] = {}
    await system.router.configure(GatewaySettings.model_validate(plain))
    assert day_of(system).stage is Stage.TEN
    assert day_of(system).measured() == measured
    state = policy_of(system).state()
    assert np.allclose(state["quality.count"][:2], before)
    made = await system.serve(200)
    assert "huge" in {d.shadow for d in made}
    assert {d.rule for d in made} == {"small"}
    assert day_of(System(system.settings)).stage is Stage.TEN


async def test_other_options_of_the_policy_begin_the_first_day_anew(
    tmp_path: Path,
) -> None:
    """What the gate has measured belongs to the former options; what was learned is kept."""

    system = observing(tmp_path)
    await system.serve(60)
    await begin(system, Stage.TEN)
    await system.serve(40)
    learned = policy_of(system)
    plain = system.settings.model_dump()
    plain["policy"]["options"] = {"exploration": 2.0}
    await system.router.configure(GatewaySettings.model_validate(plain))
    assert day_of(system).stage is Stage.OBSERVE
    assert policy_of(system).settings.exploration == 2.0
    assert learned_alike(policy_of(system), learned)
    assert {d.arm for d in await system.serve(20)} == {"small"}


def test_without_a_first_day_nothing_is_stored_of_one(tmp_path: Path) -> None:
    """The rollout's state has no such field, so snapshots of systems without it stay the same."""
    rollout = Rollout(make_settings(tmp_path))
    assert "first_day" not in rollout.state()
    assert rollout.first_day is None and rollout.make().compared is None
