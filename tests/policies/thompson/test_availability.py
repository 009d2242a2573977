"""Availability: the probability of an answer without a visible flaw follows the latest outcomes of an arm."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.base import realign, shift_sequence
from policies.thompson.availability import DECAY, WINDOW, Availability


def observed(flaws: list[tuple[int, bool]], arms: int = 1) -> Availability:
    """Outcomes of arm 0 with these sequence numbers."""
    availability = Availability(arms)
    for sequence, flawed in flaws:
        availability.observe(0, sequence, flawed)
        availability.advance(sequence)
    return availability


def mean(availability: Availability) -> float:
    return float(availability.predict()[0][0])


def test_a_rate_of_failures_is_found_and_followed() -> None:
    """Within a hundred answers of the arm, whatever it did before."""
    rng = np.random.default_rng(0)
    flaws = [(n, bool(rng.random() < 0.03)) for n in range(3000)]
    assert mean(observed(flaws)) == pytest.approx(0.97, abs=0.025)
    flaws += [(n, bool(rng.random() < 0.3)) for n in range(3000, 3100)]
    assert mean(observed(flaws)) < 0.88
    flaws += [(n, False) for n in range(3100, 3400)]
    assert mean(observed(flaws)) > 0.99


def test_an_arm_that_is_not_asked_returns_to_the_prior() -> None:
    """Otherwise an arm that failed would never be tried again."""
    availability = observed([(n, True) for n in range(50)])
    assert mean(availability) < 0.2
    availability.advance(50 + 5 * round(1 / (1 - DECAY)))
    assert mean(availability) > 0.95


def test_an_outage_is_noticed_at_once_and_says_nothing_of_the_time_after_it() -> None:
    """Four failures in a row suffice; after four answers the arm is as good as before."""
    steady = [(n, n % 40 == 0) for n in range(1, 400)]
    before = mean(observed(steady))
    fails = [(n, True) for n in range(400, 404)]
    assert mean(observed(steady + fails)) < 0.3
    fails += [(n, True) for n in range(404, 420)]
    back = [(n, False) for n in range(420, 424)]
    assert mean(observed(steady + fails + back)) == pytest.approx(before, abs=0.02)


def test_one_failure_among_good_answers_is_no_outage() -> None:
    """The estimate falls by a few hundredths only."""
    steady = [(n, False) for n in range(300)]
    before = mean(observed(steady))
    assert mean(observed([*steady, (300, True)])) > before - 0.04


@given(st.lists(st.integers(0, 3 * WINDOW), unique=True, max_size=40), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_arrival_does_not_matter(sequences: list[int], order) -> None:  # type: ignore[no-untyped-def]
    """The window holds the latest decisions, also beyond its capacity."""
    flaws = [(n, n % 3 == 0) for n in range(1000, 1000 + WINDOW)]
    flaws += [(900 + n, n % 2 == 0) for n in sequences if not 100 <= n < 100 + WINDOW]
    shuffled = list(flaws)
    order.shuffle(shuffled)
    one = observed(flaws).state()["window"]
    other = observed(shuffled).state()["window"]
    assert np.array_equal(one, other)


def test_a_state_can_be_restored_shifted_and_laid_out_for_other_arms() -> None:
    """The estimates stay the same; a new arm starts from the prior."""
    availability = observed([(n, n % 4 == 0) for n in range(100, 180)], arms=2)
    prefix = "availability."
    state = {prefix + name: array for name, array in availability.state().items()}
    moved = shift_sequence(state, 100, 0)
    assert moved["availability.window"][0, -1, 0] == 79
    fresh = {prefix + name: array for name, array in Availability(3).state().items()}
    wide = realign(state, ["a", "b"], ["b", "c", "a"], fresh)
    other = Availability(3)
    other.restore({"window": wide["availability.window"]})
    other.advance(179)
    assert other.predict()[0][2] == pytest.approx(mean(availability))
    assert other.predict()[0][1] == Availability(1).predict()[0][0]
    with pytest.raises(ValueError, match="'window' must be finite"):
        other.restore({"window": np.zeros((1, 2, 3))})
    other.restore({})
    assert other.predict()[0][2] == Availability(1).predict()[0][0]


def test_a_discount_leaves_the_rate_and_reduces_its_weight() -> None:
    """New weights behind an arm: its past counts for a few outcomes, and it is not down."""
    availability = observed([(n, n % 5 == 0) for n in range(150)])
    before = mean(availability)
    availability.discount(0, 10.0)
    after = mean(availability)
    assert before < 0.85 and before + 0.04 < after < 0.96
