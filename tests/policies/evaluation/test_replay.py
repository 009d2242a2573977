"""Decision records as the arrays of off-policy evaluation, and other policies on these records."""

import numpy as np
import pytest
from msgspec import structs

from policies.base import Policy
from policies.constraints import Exclusion, total_load
from policies.evaluation import replay
from policies.events import CALIBRATION, FORCED, ArmEstimate, Decision, Outcome, Record
from policies.registry import make_policy
from policies.thompson.policy import Thompson
from policies.types import Arm, ModelState, Objective, Request
from tests.support.requests import make_profile, make_request


def decide(policy: Policy, n: int, objective: Objective | None = None) -> list[Record]:
    texts = (
        "What is 3 plus 5?",
        "Prove step by step that the sum of two odd numbers is even.",
        "Quick: hi!",
    )
    rng = np.random.default_rng(1)
    records = []
    for i in range(n):
        request = Request(
            str(i),
            make_profile(texts[i % 3]),
            objective or Objective(latency_weight=0.1),
        )
        records.append(Record(policy.decide([request], {}, rng, i)[0]))
    return records


def test_only_randomised_decisions_are_evaluable(arms: tuple[Arm, ...]) -> None:
    """Forced decisions, calibrations, second attempts and decisions without an arm are left out; local ones stay."""
    records = decide(make_policy("uniform", arms), 8)

    def put(i: int, **change: str) -> None:
        records[i].decision = structs.replace(records[i].decision, **change)  # type: ignore[arg-type]

    (
        put(1, fallback=FORCED),
        put(2, fallback="model"),
        put(3, fallback="router"),
        put(4, arm=""),
    )
    put(6, fallback="hedge")
    put(7, fallback=CALIBRATION)
    assert [record.decision.id for record in replay.evaluable(records[::-1])] == [
        "0",
        "3",
        "5",
    ]
    assert [record.decision.id for record in replay.evaluable(records, after=3)] == [
        "5"
    ]


def test_a_decision_without_a_choice_is_left_out(arms: tuple[Arm, ...]) -> None:
    """The reason of each decision that is left out is counted."""
    free = decide(make_policy("uniform", arms), 4)
    bound = decide(make_policy("uniform", arms), 3, Objective(models=("small",)))
    forced = decide(make_policy("uniform", arms), 1)
    forced[0].decision = structs.replace(forced[0].decision, fallback=FORCED)
    found = replay.select([*free, *bound, *forced])
    assert len(found.records) == 4
    assert found.left_out == {
        "no other arm was eligible": 3,
        "the client chose the model": 1,
    }


def test_a_judge_s_sample_is_selected_alone(arms: tuple[Arm, ...]) -> None:
    """Outside of it the best estimate is served, and scores depend on the users. Without a sample all are selected."""
    records = decide(make_policy("uniform", arms), 400)
    for i, record in enumerate(records):
        judged = i % 10 == 0
        chance = 1.0 if judged else 0.02
        record.decision = structs.replace(record.decision, score_chance=chance)
        record.outcome = Outcome(record.decision.id)
        if judged or i % 50 == 1:
            record.scores["judge" if judged else "user"] = 1.0
    found = replay.select(records)
    assert [int(r.decision.id) % 10 for r in found.records] == [0] * 40
    assert found.left_out == {replay.OUTSIDE: 360}
    for record in records:
        record.scores.pop("judge", None)
    found = replay.select(records)
    assert len(found.records) == 400 and not found.left_out


def test_records_become_arrays(arms: tuple[Arm, ...]) -> None:
    """Rewards use the request's own objective; a failed arm has reward 0; a decision without a score has no reward."""
    records = decide(make_policy("thompson", arms), 90)
    for i, record in enumerate(records):
        record.outcome = Outcome(
            record.decision.id, "error" if i == 1 else "ok", latency_s=2.0
        )
        if i % 4 == 0:
            record.scores.update(user=1.0, judge=0.5)
    names = replay.arms_of(records)
    data = replay.to_log(records, names)
    assert names == ("small", "large", "embedder")
    assert data.rewards[0] == pytest.approx(0.75 - 0.1 * 2.0) and data.rewards[
        1
    ] == pytest.approx(-0.2)
    rate = data.rates(len(names)).rate
    assert np.isnan(data.rewards[2])
    assert rate[1] == 1.0 and 0.1 < rate[0] < 0.6
    np.testing.assert_allclose(data.propensities.sum(axis=1), 1.0)
    assert [names[k] for k in data.chosen] == [
        record.decision.arm for record in records
    ]
    assert (
        data.predictions is not None
        and data.predictions[0, 0] == records[0].decision.estimates[0].utility
    )
    assert replay.to_log(records, names, replay.score).rewards[0] == 0.75


def test_a_target_decides_on_what_was_logged(arms: tuple[Arm, ...]) -> None:
    """A policy that has learned nothing since gives its logged propensities again; the evaluation does not teach it."""
    policy = make_policy("thompson", arms)
    records = decide(policy, 12)
    names = replay.arms_of(records)
    before = policy.state()
    logged = replay.to_log(records, names).propensities
    np.testing.assert_allclose(
        replay.target_probabilities(records, policy, names), logged, atol=1e-6
    )
    assert all(
        np.array_equal(before[key], value) for key, value in policy.state().items()
    )
    always = replay.target_probabilities(
        records, make_policy("always", arms, {"arm": "large"}), names
    )
    assert (always == [0.0, 1.0, 0.0]).all()


def test_a_target_gets_the_logged_queue_wait(
    arms: tuple[Arm, ...],
) -> None:
    """Without a logged wait, as of a rule or of an arm without a queue, the target gets none."""
    policy = make_policy("thompson", arms)
    rng = np.random.default_rng(1)
    line = {
        "small": ModelState(in_flight=2, wait_s=4.0),
        "large": ModelState(in_flight=1),
    }
    requests = [make_request(objective=Objective(latency_weight=0.3)) for _ in range(4)]
    records = [
        Record(policy.decide([request], line, rng, i)[0])
        for i, request in enumerate(requests)
    ]
    names = replay.arms_of(records)
    logged = replay.to_log(records, names).propensities
    found = replay.target_probabilities(records, policy, names)
    assert (logged[:, 0] < 0.1).all()
    np.testing.assert_allclose(found, logged, atol=1e-6)
    waits = [replay._state(e).wait_s for r in records for e in r.decision.estimates]
    assert waits == pytest.approx([4.0, 0.0, 0.0] * 4)
    ruled = decide(make_policy("static", arms), 3) + decide(policy, 3)
    assert not any(replay._state(e).wait_s for r in ruled for e in r.decision.estimates)


def test_a_target_pays_the_logged_price_of_a_scarce_arm(arms: tuple[Arm, ...]) -> None:
    """A replay of the same policy has the same propensities; the reward does not contain the price."""
    policy = make_policy("thompson", arms)
    rng = np.random.default_rng(1)
    busy = {
        "small": ModelState(in_flight=2),
        "large": ModelState(in_flight=9, price=0.5),
    }
    free = policy.decide([make_request()], {**busy, "large": ModelState(9)}, rng, 0)
    records = [
        Record(policy.decide([make_request()], busy, rng, i)[0]) for i in range(3)
    ]
    decision = records[0].decision
    paid = decision.estimate("large")
    assert decision.scarcity(paid) > 0.0
    assert paid.propensity < free[0].estimate("large").propensity
    names = replay.arms_of(records)
    logged = replay.to_log(records, names).propensities
    found = replay.target_probabilities(records, policy, names)
    np.testing.assert_allclose(found, logged, atol=1e-6)
    prices = [state.price for name, state in replay._states(decision, []) if name]
    assert prices == pytest.approx([0.0, 0.5, 0.0])
    assert decision.expected_reward(paid) == pytest.approx(
        free[0].estimate("large").utility
    )


def test_a_target_keeps_the_logged_limits_and_health(
    arms: tuple[Arm, ...],
) -> None:
    """A target never chooses an arm that had no healthy replica, or that the request did not allow."""
    records = decide(
        make_policy("uniform", arms), 3, Objective(models=("small", "large"))
    )
    sick: Decision = records[1].decision
    estimates = tuple(
        ArmEstimate(
            e.arm,
            propensity=e.propensity,
            removed_by=Exclusion.NO_REPLICA.sentence()
            if e.arm == "large"
            else e.removed_by,
        )
        for e in sick.estimates
    )
    records[1].decision = structs.replace(sick, estimates=estimates)
    always = make_policy("always", arms, {"arm": "embedder"})
    found = replay.target_probabilities(
        records, always, ("small", "large", "embedder", "new")
    )
    assert (
        found.tolist() == [[1, 0, 0, 0]] * 3
    )  # its favourite, the embedder, is not allowed: the first that is left
    uniform = replay.target_probabilities(
        records, make_policy("uniform", arms), ("small", "large", "embedder")
    )
    assert uniform.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0.5, 0.5, 0]]


def test_the_load_of_variants_counts_once_in_a_replay() -> None:
    """The states of a decision add up to its logged load over all arms, also if two arms have the same requests."""
    arms = (Arm("small"), Arm("large"), Arm("direct", variant_of="large"))
    policy = Thompson(arms)
    busy = ModelState(in_flight=5)
    states = {"small": ModelState(in_flight=2), "large": busy, "direct": busy}
    (decision,) = policy.decide([make_request()], states, np.random.default_rng(0), 0)
    assert {e.total_load for e in decision.estimates} == {7.0}
    again = dict(replay._states(decision, arms))
    assert total_load(arms, again) == pytest.approx(7.0)
    assert again["direct"].in_flight == again["large"].in_flight == 5.0
