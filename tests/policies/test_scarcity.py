"""Tests of the price of a scarce arm."""

import numpy as np
import pytest

from policies.scarcity import ScarcityPrices, ScarcitySettings
from policies.types import ModelState

SECONDS = np.array([2.0, 8.0])


def states(*in_flight: float, replicas: int = 1) -> list[ModelState]:
    return [ModelState(in_flight=number, replicas=replicas) for number in in_flight]


def test_arms_with_room_cost_nothing() -> None:
    """An arm at or below its target has no price."""
    prices = ScarcityPrices([10.0, 10.0])
    for _ in range(100):
        prices.observe(states(10.0, 3.0))
    assert (prices.prices == 0.0).all()
    assert (prices.charges(SECONDS) == 0.0).all()


def test_the_price_of_a_scarce_arm_rises_and_falls_again() -> None:
    """It rises at once by the gain, and further by steps; once there is room, it falls back to 0."""
    given = ScarcitySettings(step=0.01, gain=0.1)
    prices = ScarcityPrices([10.0, 10.0], given)
    prices.observe(states(5.0, 20.0))
    assert prices.prices.tolist() == pytest.approx([0.0, 0.11])
    for _ in range(9):
        prices.observe(states(5.0, 20.0))
    assert prices.prices.tolist() == pytest.approx([0.0, 0.2])
    for _ in range(20):
        prices.observe(states(5.0, 5.0))
    assert (prices.prices == 0.0).all()


def test_the_price_is_that_of_the_load_per_replica() -> None:
    """Twice the requests on twice the replicas have the same price."""
    one, two = (ScarcityPrices([10.0, 10.0]) for _ in range(2))
    one.observe(states(5.0, 30.0))
    two.observe(states(10.0, 60.0, replicas=2))
    assert one.prices.tolist() == two.prices.tolist()


def test_prices_stay_apart_when_every_arm_has_too_many_requests() -> None:
    """Only what an arm has more than the others counts, and no price exceeds its bound."""
    prices = ScarcityPrices([10.0, 10.0])
    for _ in range(5000):
        prices.observe(states(40.0, 50.0))
    assert prices.prices[0] == 0.0
    assert 0.0 < prices.prices[1] <= ScarcitySettings().most


def test_a_request_pays_for_the_time_it_holds_its_place() -> None:
    """A request of twice the usual duration pays twice the price."""
    prices = ScarcityPrices([10.0, 10.0])
    prices.observe(states(5.0, 20.0))
    usual = prices.charges(SECONDS)
    assert usual[1] == pytest.approx(prices.prices[1])
    assert prices.charges(2 * SECONDS)[1] == pytest.approx(2 * usual[1], rel=0.01)
