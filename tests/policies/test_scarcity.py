"""Tests of the price of a scarce arm."""

from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs

from policies.events import ArmEstimate, Decision
from policies.scarcity import ScarcityPrices, ScarcitySettings, work
from policies.thompson.policy import Thompson
from policies.types import Arm, ModelState, Objective
from tests.support.requests import make_profile, make_request

ARMS = (Arm("small"), Arm("large"), Arm("embedder", ("embed",)))
SECONDS = {"small": 2.0, "large": 8.0}
TOKENS = {"small": 100.0, "large": 50.0}
PROFILE = replace(make_profile(), prompt_tokens=200)
WORK = {"small": 0.6, "large": 0.4}  # thousands of tokens
WEIGHT = 0.05  # score points a second
DEFAULT = ScarcitySettings()
SLOTS = 80.0  # an eighth of them is the target


def usual(propensity: dict[str, float] | None = None) -> Decision:
    """A decision that expects of each arm its usual answer."""
    estimates = tuple(
        ArmEstimate(
            arm,
            ttft_s=seconds,
            output_tokens=TOKENS[arm],
            propensity=(propensity or {}).get(arm, 0.0),
        )
        for arm, seconds in SECONDS.items()
    )
    objective = Objective(latency_weight=WEIGHT)
    return Decision("d", "small", 0, "v1", PROFILE, objective, estimates)


def known(settings: ScarcitySettings = DEFAULT) -> ScarcityPrices:
    """Prices that know the usual answers of two arms."""
    prices = ScarcityPrices(ARMS, settings)
    prices.decided(usual())
    return prices


def states(
    small: float, large: float, replicas: int = 1, healthy: bool = True
) -> dict[str, ModelState]:
    return {
        "small": ModelState(small, replicas, healthy=healthy),
        "large": ModelState(large, replicas),
        "embedder": ModelState(),
    }


def price(prices: ScarcityPrices, now_s: float, *load: float) -> tuple[float, float]:
    """The price of a request of usual work on each arm at a load, in units of what its duration costs."""
    found = prices.priced(states(*load), now_s, SLOTS)
    small, large = (
        found[arm].price * WORK[arm] / (WEIGHT * SECONDS[arm])
        for arm in ("small", "large")
    )
    return small, large


def test_arms_with_room_cost_nothing() -> None:
    """An arm at or below its target has no price, however long that lasts."""
    prices = known()
    for second in range(1000):
        assert price(prices, float(second), 10.0, 3.0) == (0.0, 0.0)


def test_the_price_rises_at_once_and_with_time_and_falls_again() -> None:
    """It has the gain at once, and one step more after a usual duration; once there is room, it falls back to 0."""
    prices = known(ScarcitySettings(step=0.01, gain=0.1))
    assert price(prices, 0.0, 5.0, 20.0) == pytest.approx((0.0, 0.1))
    for second in range(1, 81):
        found = price(prices, float(second), 5.0, 20.0)
    assert found == pytest.approx((0.0, 0.2))
    assert price(prices, 81.0, 5.0, 10.0) == pytest.approx((0.0, 0.1))
    assert price(prices, 240.0, 5.0, 0.0) == (0.0, 0.0)
    assert price(prices, 240.0, 5.0, 10.0)[1] == pytest.approx(0.0, abs=1e-6)


def test_several_observers_find_the_same_price() -> None:
    """The price depends on the time that passed, not on the number of decisions in it."""
    often, rarely = known(), known()
    for tick in range(801):
        seen = price(often, tick / 10.0, 5.0, 30.0)
    for tick in range(41):
        other = price(rarely, tick * 2.0, 5.0, 30.0)
    assert seen == pytest.approx(other, rel=1e-6) and seen[1] > 4.0


def test_a_pause_does_not_raise_a_price() -> None:
    """What happened while none was decided is unknown: a rise counts for one usual duration at most."""
    prices = known(ScarcitySettings(step=0.01, gain=0.0))
    price(prices, 0.0, 5.0, 20.0)
    assert price(prices, 3600.0, 5.0, 20.0) == pytest.approx((0.0, 0.01))


def test_the_price_is_that_of_the_load_per_replica() -> None:
    """Twice the requests on twice the replicas have the same price."""
    one = known().priced(states(5.0, 30.0), 0.0, SLOTS)
    two = known().priced(states(10.0, 60.0, replicas=2), 0.0, SLOTS)
    assert one["large"].price == two["large"].price > 0.0


def test_only_the_difference_counts_when_all_arms_for_a_task_are_full() -> None:
    """An idle arm for another task changes nothing, and no price exceeds its bound."""
    prices = known()
    for second in range(5000):
        small, large = price(prices, float(second), 40.0, 50.0)
    assert small == 0.0
    assert DEFAULT.gain < large <= DEFAULT.most


def test_an_arm_without_replicas_is_no_alternative() -> None:
    """If the other arm is down, the arm that is left has no price, because there is no choice."""
    down = known().priced(states(0.0, 50.0, healthy=False), 0.0, SLOTS)
    assert down["large"].price == 0.0
    up = known().priced(states(0.0, 50.0), 0.0, SLOTS)
    assert up["large"].price > 0.0


def test_no_slots_mean_no_prices() -> None:
    """The setting that switches the prices off also forgets what they were."""
    prices = known(ScarcitySettings(gain=0.0))
    for second in range(100):
        before = price(prices, float(second), 5.0, 50.0)
    off = prices.priced(states(5.0, 50.0), 100.0, 0.0)
    assert before[1] > 0.0 and off["large"].price == 0.0
    assert price(prices, 100.0, 5.0, 50.0)[1] == 0.0


def test_a_request_pays_for_its_work() -> None:
    """The utility falls by the price of its prompt tokens and of four times its output tokens, whatever they take."""
    policy = Thompson(ARMS)
    request = make_request(objective=Objective(latency_weight=0.01, cost_weight=3.0))
    request = replace(request, profile=replace(request.profile, prompt_tokens=700))
    rng = np.random.default_rng(0)
    loaded = {"large": ModelState(in_flight=9, wait_s=2.0)}
    priced = {"large": ModelState(in_flight=9, wait_s=2.0, price=0.2)}
    (free,) = policy.decide([request], loaded, rng, 0)
    (charged,) = policy.decide([request], priced, rng, 0)
    one, other = free.estimate("large"), charged.estimate("large")
    taken = 0.7 + 4 * other.output_tokens / 1000
    assert charged.scarcity(other) == pytest.approx(0.2 * taken)
    assert other.utility == pytest.approx(one.utility - charged.scarcity(other))
    assert charged.expected_reward(other) == pytest.approx(one.utility)
    assert other.propensity < one.propensity
    assert charged.estimate("small").utility == free.estimate("small").utility


def test_a_request_of_high_priority_pays_nothing() -> None:
    """It decides as if no arm were scarce."""
    policy = Thompson(ARMS)
    states = {"large": ModelState(in_flight=9, price=0.5)}
    request = replace(make_request(), pays_price=False)
    (decision,) = policy.decide([request], states, np.random.default_rng(0), 0)
    assert decision.scarcity(decision.estimate("large")) == 0.0


def test_requests_that_gain_little_leave_a_scarce_arm_first() -> None:
    """At a price between the two gains, one of the requests stays and the other leaves; hard limits hold."""
    policy = Thompson(ARMS)
    rng = np.random.default_rng(0)
    hard, easy = "Prove that the square root of 2 is irrational.", "hi"

    def decided(
        text: str, states: dict[str, ModelState], arms: tuple[str, ...] = ()
    ) -> Decision:
        request = make_request(text, objective=Objective(models=arms))
        return policy.decide([request], states, rng, 600)[0]

    for _ in range(300):
        for text, gain in ((hard, 0.3), (easy, 0.0)):
            for arm in ("small", "large"):
                decision = decided(text, {}, (arm,))
                policy.score(decision, 0.6 + gain * (arm == "large"))
    taken = {
        text: work(
            decided(text, {}).profile.prompt_tokens,
            decided(text, {}).estimate("large").output_tokens,
        )
        for text in (hard, easy)
    }
    scarce = {"large": ModelState(price=0.15 / taken[hard])}
    assert taken[easy] > 0.5 * taken[hard]
    assert decided(hard, scarce).estimate("large").propensity > 0.9
    assert decided(easy, scarce).estimate("large").propensity < 0.1
    assert decided(easy, scarce, ("large",)).arm == "large"


def test_variants_of_a_model_have_one_price() -> None:
    """A token costs them the same, so the one that answers with fewer tokens pays less."""
    arms = (*ARMS, Arm("large-direct", parent="large", variant_of="large"))
    prices = ScarcityPrices(arms)
    decision = usual({"small": 0.2, "large": 0.2})
    direct = ArmEstimate("large-direct", ttft_s=1.0, output_tokens=10.0, propensity=0.6)
    prices.decided(structs.replace(decision, estimates=(*decision.estimates, direct)))
    live = states(3.0, 20.0)
    live["large-direct"] = live["large"]
    found = prices.priced(live, 0.0, SLOTS)
    assert found["small"].price == 0.0
    assert found["large"].price == found["large-direct"].price > 0.0
    # a request of usual work takes 0.25 * 0.4 + 0.75 * 0.24 thousand tokens, and 0.25 * 8 + 0.75 * 1 seconds
    usual_delay = WEIGHT * 2.75
    assert found["large"].price * 0.28 == pytest.approx(DEFAULT.gain * usual_delay)


def test_the_usual_request_follows_the_latest_ones() -> None:
    """The first decisions count equally, so a wrong first expectation does not stay; later ones replace the oldest."""
    prices = ScarcityPrices(ARMS)
    first = structs.replace(usual(), profile=replace(PROFILE, prompt_tokens=20_000))
    prices.decided(first)
    for _ in range(8 * 19):
        prices.decided(usual())
    found = prices.priced(states(5.0, 20.0), 0.0, SLOTS)
    # one of twenty was seen with 20.2 thousand tokens, the others with 0.4
    assert found["large"].price * 1.39 == pytest.approx(DEFAULT.gain * WEIGHT * 8)


def test_a_long_prompt_leaves_a_scarce_arm_before_a_short_one() -> None:
    """Of two requests that gain as much, the one with more work goes elsewhere."""
    policy = Thompson((Arm("small"), Arm("large", prior_quality=0.9)))
    rng = np.random.default_rng(0)
    scarce = {"large": ModelState(price=0.2)}
    shares = []
    for tokens in (100, 5000):
        request = make_request()
        request = replace(
            request, profile=replace(request.profile, prompt_tokens=tokens)
        )
        (decision,) = policy.decide([request], scarce, rng, 0)
        shares.append(decision.estimate("large").propensity)
    assert shares[0] > 0.5 > 0.1 > shares[1]


def test_a_place_is_worth_what_time_is_worth() -> None:
    """Ten times the weight on latency means ten times the price; without a weight no place has one."""
    found = []
    for weight in (0.0, 0.01, 0.1):
        prices = ScarcityPrices(ARMS)
        objective = Objective(latency_weight=weight)
        prices.decided(structs.replace(usual(), objective=objective))
        found.append(prices.priced(states(5.0, 20.0), 0.0, SLOTS)["large"].price)
    assert found[0] == 0.0
    assert found[2] == pytest.approx(10 * found[1]) and found[1] > 0.0


def test_a_request_without_tokens_makes_no_price() -> None:
    """An estimate that has a duration and no tokens says nothing of the usual work."""
    prices = ScarcityPrices(ARMS)
    empty = (ArmEstimate("small", ttft_s=1.0), ArmEstimate("large", ttft_s=1.0))
    profile = replace(PROFILE, prompt_tokens=0)
    prices.decided(structs.replace(usual(), estimates=empty, profile=profile))
    assert prices.priced(states(5.0, 20.0), 0.0, SLOTS)["large"].price == 0.0


def test_a_higher_price_that_an_arm_already_has_stays() -> None:
    """The router sets one where a last replica will stop."""
    live = states(5.0, 20.0)
    live["large"] = structs.replace(live["large"], price=1000.0)
    assert known().priced(live, 0.0, SLOTS)["large"].price == 1000.0
