"""Tests of the demand that the autoscaler does not see."""

import numpy as np
import pytest
from msgspec import structs

from policies.constraints import Exclusion
from policies.demand import Demand, DemandMeter, DemandSettings
from policies.events import CALIBRATION, FORCED, PAIR, Decision, Outcome
from policies.registry import make_policy
from policies.thompson.policy import Thompson
from policies.types import Arm, ModelState, Objective, Request
from tests.support.requests import make_profile

WARM_COUNT = {"small": 1, "large": 1, "embedder": 1}
COLD_COUNT = {**WARM_COUNT, "large": 0}
ARMS = (Arm("small"), Arm("large"), Arm("embedder", ("embed",)))
WARM = {arm.name: ModelState() for arm in ARMS}
COLD = {**WARM, "large": ModelState(replicas=0, healthy=False)}
GAIN = 0.3  # of large over small


def taught(gain: float = GAIN) -> Thompson:
    """A policy that knows what large gains, and that its answers take about two seconds."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    for i in range(200):
        for arm in ("small", "large"):
            (decision,) = policy.decide([request((arm,))], WARM, rng, i)
            score = 0.5 + gain * (arm == "large")
            policy.score(decision, score)
            policy.learn(
                decision, Outcome("", ttft_s=0.5, latency_s=2.0, output_tokens=31)
            )
    return policy


def request(arms: tuple[str, ...] = (), task: str = "chat") -> Request:
    return Request("r", make_profile(task=task), Objective(models=arms))


def run(
    meter: DemandMeter,
    policy: Thompson,
    states: dict[str, ModelState],
    rate: float,
    since_s: float,
    seconds: float,
    arms: tuple[str, ...] = (),
) -> dict[str, Demand]:
    """Requests at a rate, decided in these states; the demand at the end."""
    rng = np.random.default_rng(1)
    for i in range(int(rate * seconds)):
        (decision,) = policy.decide([request(arms)], states, rng, 1000)
        meter.decided(decision, since_s + i / rate)
    return meter.measure(policy, states, since_s + seconds)


def test_a_cold_arm_has_the_demand_that_it_would_get() -> None:
    """Little's law: rate times duration, whether the requests have come for a long or for a short time."""
    policy = taught()
    duration_s = (
        policy.decide([request()], WARM, np.random.default_rng(0), 0)[0]
        .estimate("large")
        .answer_s
    )
    assert 1.0 < duration_s < 4.0
    for seconds in (10.0, 100.0):
        found = run(DemandMeter(), policy, COLD, 4.0, 0.0, seconds)
        assert found["large"].requests == pytest.approx(4.0 * duration_s, rel=0.15)
        for name in ("small", "embedder"):
            assert found[name].requests == found[name].loss == 0.0
    assert found["large"].loss == pytest.approx(60.0 * 4.0 * GAIN, rel=0.4)


def test_two_replicas_are_wanted_at_once() -> None:
    """A surge of many requests is not a demand of one."""
    found = run(DemandMeter(), taught(), COLD, 40.0, 0.0, 5.0)
    assert found["large"].requests > 48.0


def test_an_idle_arm_has_no_demand() -> None:
    """What it gets is in flight already, and the autoscaler sees that."""
    found = run(DemandMeter(), taught(), WARM, 4.0, 0.0, 60.0)["large"]
    assert found.requests == found.loss == 0.0


def test_a_full_arm_has_the_demand_that_goes_elsewhere() -> None:
    """Requests that a price or a full queue sends to another arm would come back to an idle one."""
    policy = taught()
    loaded = {**WARM, "large": ModelState(in_flight=20.0, price=50.0)}
    priced = run(DemandMeter(), policy, loaded, 4.0, 0.0, 60.0)["large"]
    assert priced.requests > 2.0 and priced.loss > 0.0
    busy = {**WARM, "large": ModelState(in_flight=20.0)}
    sentence = Exclusion.QUEUE_FULL.sentence()
    meter = DemandMeter()
    full = Request("r", make_profile(), Objective(unavailable=(("large", sentence),)))
    for i in range(60):
        (decision,) = policy.decide([full], busy, np.random.default_rng(i), 1000)
        assert decision.arm == "small"
        meter.decided(decision, float(i))
    assert meter.measure(policy, busy, 60.0)["large"].requests > 1.0


def test_crumbs_start_no_replica() -> None:
    """A gain of almost nothing counts for almost nothing, however many the requests."""
    policy = taught(gain=0.004)
    found = run(DemandMeter(), policy, COLD, 0.5, 0.0, 100.0)["large"]
    much = run(DemandMeter(), taught(), COLD, 0.5, 0.0, 100.0)["large"]
    assert found.requests == 0.0 < found.loss < 0.5
    assert much.requests > 0.5


def test_one_request_starts_no_replica_and_some_do() -> None:
    """The loss must pay for what a replica costs."""
    policy = taught()
    assert run(DemandMeter(), policy, COLD, 1.0, 0.0, 1.0)["large"].requests == 0.0
    assert run(DemandMeter(), policy, COLD, 1.0, 0.0, 30.0)["large"].requests > 0.0


def test_the_demand_fades_without_traffic() -> None:
    """So a size can return to zero."""
    meter, policy = DemandMeter(), taught()
    before = run(meter, policy, COLD, 4.0, 0.0, 60.0)["large"]
    later = meter.measure(policy, COLD, 60.0 + 60.0)["large"]
    assert 0.0 < later.loss < 0.4 * before.loss
    assert later.requests < 0.6 * before.requests
    gone = meter.measure(policy, COLD, 60.0 + 800.0)["large"]
    assert gone.requests == gone.loss == 0.0


def test_what_went_to_a_model_does_not_start_it_again() -> None:
    """A model that was stopped rests until new requests come; one that was never seen ready may start."""
    policy = taught()
    meter = DemandMeter()
    busy = {**WARM, "large": ModelState(in_flight=1.0)}
    meter.counted(WARM_COUNT, 0.0)
    run(meter, policy, busy, 5.0, 0.0, 60.0)
    for second in (80.0, 85.0):
        meter.counted(COLD_COUNT, second)
        assert meter.measure(policy, COLD, second)["large"] == Demand(balance=0.0)
    again = run(meter, policy, COLD, 5.0, 85.0, 20.0)["large"]
    assert again.requests > 1.0 and again.loss > 1.0
    # as a router does that has just started
    fresh = DemandMeter()
    fresh.counted(COLD_COUNT, 0.0)
    assert run(fresh, policy, COLD, 5.0, 0.0, 60.0)["large"].requests > 1.0


def test_requests_after_the_count_are_demand_however_late_it_is_measured() -> None:
    """The replicas are counted before the demand is measured; requests come in between."""
    policy = taught()
    meter = DemandMeter()
    meter.counted(WARM_COUNT, 0.0)
    meter.counted(COLD_COUNT, 60.0)
    found = run(meter, policy, COLD, 5.0, 60.0, 20.0)["large"]
    assert found.requests > 1.0 and found.loss > 1.0


def test_a_request_that_was_refused_is_demand_before_the_count_too() -> None:
    """The last replica is lost up to one count before the router knows."""
    policy = taught()
    meter = DemandMeter()
    cold = {name: ModelState(replicas=0, healthy=False) for name in WARM}
    meter.counted(WARM_COUNT, 0.0)
    (refused,) = policy.decide([request()], cold, np.random.default_rng(0), 1000)
    assert not refused.arm
    meter.decided(refused, 1.0)
    meter.counted(dict.fromkeys(WARM, 0), 2.0)
    found = meter.measure(policy, cold, 2.0)
    assert found["large"].requests > 0.0 and found["small"].requests > 0.0


def test_a_slow_start_needs_more_demand() -> None:
    """The time from the wish to the first token is learned, and a start that takes longer must pay for it."""
    policy = taught()
    meter = DemandMeter()
    run(meter, policy, COLD, 1.0, 0.0, 30.0)
    assert meter.measure(policy, WARM, 930.0)["large"].start_s == 0.0
    meter.answered("large", Outcome("", latency_s=30.0, ttft_s=20.0, waited_s=2.0))
    learned = meter.measure(policy, WARM, 931.0)["large"].start_s
    assert learned == pytest.approx(918.0)  # seen at 30 s and at 930 s
    quick = DemandMeter()
    for one, wanted in ((meter, False), (quick, True)):
        one.counted(WARM_COUNT, 1990.0)
        one.counted(COLD_COUNT, 2000.0)
        one.measure(policy, COLD, 2000.0)
        found = run(one, policy, COLD, 0.5, 2000.0, 60.0)["large"]
        assert (found.requests > 0.0) == wanted


def test_a_request_that_no_arm_could_answer_is_demand() -> None:
    """With all sizes at zero, one refused request starts those that could answer it, and no other one."""
    policy = taught()
    cold = {name: ModelState(replicas=0, healthy=False) for name in WARM}
    found = run(DemandMeter(), policy, cold, 1.0, 0.0, 1.0)
    assert found["large"].requests > 0.0
    assert found["small"].requests > 0.0
    assert found["embedder"].requests == 0.0
    named = run(DemandMeter(), policy, cold, 1.0, 0.0, 1.0, ("small",))
    assert named["small"].requests > 0.0 == named["large"].requests


def test_answers_that_no_client_asked_for_and_named_models_are_no_demand() -> None:
    """They would not have gone elsewhere."""
    policy = taught()
    meter = DemandMeter()
    made = Decision("d", "small", 0, "v1", make_profile(), Objective())
    for fallback in (CALIBRATION, PAIR, FORCED, "model", "hedge"):
        meter.decided(structs.replace(made, fallback=fallback), 0.0)
    meter.decided(structs.replace(made, arm="", fallback=PAIR), 0.0)
    found = meter.measure(policy, COLD, 1.0)["large"]
    assert found.requests == found.loss == found.balance == 0.0


def test_the_demand_of_a_rule_counts_in_full() -> None:
    """A rule says which arm it wants, and not what it gains."""
    rule = make_policy("always", ARMS, {"arm": "large"})
    meter = DemandMeter()
    cold = {**COLD, "small": ModelState(replicas=0, healthy=False)}
    (decision,) = rule.decide([request()], cold, np.random.default_rng(0), 0)
    assert decision.arm == ""
    meter.decided(decision, 0.0)
    assert meter.measure(rule, cold, 1.0)["large"].requests > 0.0


def test_measuring_changes_nothing_that_was_learned() -> None:
    """The policy decides once more, and forgets and learns nothing by that."""
    policy = taught()
    meter = DemandMeter()
    run(meter, policy, COLD, 4.0, 0.0, 20.0)
    before = policy.state()
    assert meter.measure(policy, COLD, 21.0)["large"].requests > 0.0
    after = policy.state()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_long_list_is_a_sample() -> None:
    """More requests than are decided again, or kept, give the same rate, as if it had lasted for ever."""
    few = DemandSettings(sample=4, kept=40)
    policy = taught()
    all_of_them = run(DemandMeter(), policy, COLD, 4.0, 0.0, 60.0)["large"]
    some = run(DemandMeter(few), policy, COLD, 4.0, 0.0, 60.0)["large"]
    assert some.requests == pytest.approx(all_of_them.requests, rel=0.3)
    lasting = all_of_them.loss / (1.0 - np.exp(-1.0))
    assert some.loss == pytest.approx(lasting, rel=0.2)


def test_variants_of_a_model_have_its_demand_together() -> None:
    """A cold model is wanted for all of its arms, and an answer of any of them ends its start."""
    variant = Arm("large-direct", parent="large", variant_of="large")
    policy = Thompson((*ARMS, variant))
    rng = np.random.default_rng(0)
    arms = ("small", "large", "large-direct")
    warm = {name: ModelState() for name in (*arms, "embedder")}
    for i in range(200):
        for arm in arms:
            (decision,) = policy.decide([request((arm,))], warm, rng, i)
            policy.score(decision, 0.5 + GAIN * (arm != "small"))
            outcome = Outcome(decision.id, ttft_s=0.1, latency_s=2.0, output_tokens=48)
            policy.learn(decision, outcome)
    cold = {
        **warm,
        "large": ModelState(replicas=0, healthy=False),
        "large-direct": ModelState(replicas=0, healthy=False),
    }
    meter = DemandMeter()
    for second in range(60):
        decisions = policy.decide([request(arms)], cold, rng, 200 + second)
        assert decisions[0].arm == "small"
        meter.decided(decisions[0], float(second))
    found = meter.measure(policy, cold, 60.0)
    assert found.keys() == {"small", "large", "embedder"}
    # about one request a second, of about two seconds, goes to one of the two
    assert 0.5 < found["large"].requests < 4.0 and found["large"].loss > 5.0
    meter.measure(policy, warm, 70.0)
    meter.answered("large-direct", Outcome("d", ttft_s=1.0, latency_s=2.0))
    assert meter.start_s == {"large": pytest.approx(11.0)}


def pass_time(
    meter: DemandMeter,
    policy: Thompson,
    states: dict[str, ModelState],
    rate: float,
    since_s: float,
    seconds: float,
) -> Demand:
    """Requests at a rate, with a look every ten seconds; the demand of large at the end."""
    for n in range(int(seconds / 10.0)):
        found = run(meter, policy, states, rate, since_s + 10.0 * n, 10.0)
    return found["large"]


def test_a_last_replica_that_saves_less_than_its_price_is_spare() -> None:
    """However many requests it has, if another model answers them as well; one that saves more is kept."""
    little = pass_time(DemandMeter(), taught(gain=0.004), WARM, 0.5, 0.0, 900.0)
    assert little.saved is not None and 0.0 < little.saved < 0.5
    assert little.spare and little.wish < 0.0 and little.balance == 0.0
    much = pass_time(DemandMeter(), taught(), WARM, 0.5, 0.0, 900.0)
    assert much.saved == pytest.approx(60.0 * 0.5 * GAIN, rel=0.4)
    assert not much.spare and 0.0 < much.wish <= 0.01


def test_a_last_replica_is_kept_through_a_pause_but_not_for_ever() -> None:
    """What it has saved pays for some minutes without a request."""
    policy, meter = taught(), DemandMeter()
    assert not pass_time(meter, policy, WARM, 1.0, 0.0, 60.0).spare
    assert not meter.measure(policy, WARM, 360.0)["large"].spare
    gone = meter.measure(policy, WARM, 1000.0)["large"]
    assert gone.spare and gone.requests == 0.0


def test_a_spare_replica_is_wanted_again_once_it_has_paid_for_itself() -> None:
    """A single request does not undo the wish to stop it."""
    policy, meter = taught(), DemandMeter()
    assert pass_time(meter, policy, WARM, 0.0, 0.0, 1000.0).spare
    assert pass_time(meter, policy, WARM, 0.1, 1000.0, 20.0).spare
    assert not pass_time(meter, policy, WARM, 4.0, 1020.0, 20.0).spare


@pytest.mark.parametrize("fallback", ["", FORCED, CALIBRATION])
def test_requests_that_only_one_model_can_answer_keep_it(fallback: str) -> None:
    """Those that name it, those that another one may not answer, and the prompts of a calibration."""
    policy, meter = taught(gain=0.0), DemandMeter()
    assert pass_time(meter, policy, WARM, 0.5, 0.0, 900.0).spare
    (made,) = policy.decide([request(("large",))], WARM, np.random.default_rng(0), 0)
    meter.decided(structs.replace(made, fallback=fallback), 900.0)
    assert not meter.measure(policy, WARM, 901.0)["large"].spare


def test_the_last_warm_model_is_kept_for_its_requests() -> None:
    """Without it they would be refused."""
    policy, meter = taught(gain=0.0), DemandMeter()
    alone = {**WARM, "small": ModelState(replicas=0, healthy=False)}
    assert not pass_time(meter, policy, alone, 0.1, 0.0, 1200.0).spare


def test_the_only_arm_of_a_rule_is_kept() -> None:
    """A rule does not say what it gains, so its requests count in full."""
    rule = make_policy("always", ARMS, {"arm": "large"})
    meter = DemandMeter()
    for second in range(0, 1200, 60):
        (decision,) = rule.decide([request()], WARM, np.random.default_rng(0), 0)
        meter.decided(decision, float(second))
        found = meter.measure(rule, WARM, float(second))["large"]
    assert not found.spare


def test_several_replicas_are_the_autoscalers_own_matter() -> None:
    """The account is of the last replica alone."""
    two = {**WARM, "large": ModelState(replicas=2)}
    found = pass_time(DemandMeter(), taught(gain=0.0), two, 0.5, 0.0, 900.0)
    assert not found.spare and found.saved is None and found.balance is None


def test_an_account_begins_anew_with_a_replica() -> None:
    """A model that has just started is not stopped at once, and one that was stopped is not started at once."""
    policy, meter = taught(gain=0.0), DemandMeter()
    meter.counted(WARM_COUNT, 0.0)
    assert pass_time(meter, policy, WARM, 0.5, 0.0, 900.0).spare
    meter.counted(COLD_COUNT, 900.0)
    assert meter.measure(policy, COLD, 900.0)["large"] == Demand(balance=0.0)
    meter.counted(WARM_COUNT, 1000.0)
    fresh = meter.measure(policy, WARM, 1000.0)["large"]
    assert not fresh.spare and fresh.balance == pytest.approx(5.5)
