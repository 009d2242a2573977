"""The benchmark of decisions, on the recorded streams."""

import numpy as np
import pytest

from benchmarks.portfolios import data_folder, load
from benchmarks.quality import OURS, Job, run
from benchmarks.references import order_of, references
from benchmarks.scenarios import until_moved, world
from policies.evaluate import Trace

PORTFOLIO, REQUESTS = "routellm_gsm8k", 400


@pytest.fixture(autouse=True)
def _recorded() -> None:
    try:
        data_folder()
    except SystemExit as error:
        pytest.skip(str(error))


def test_ours_learns_what_chance_does_not() -> None:
    """On identical streams, better than random and than the static rules, and below the oracle."""
    found = {
        name: run(Job(PORTFOLIO, 0.0, 1, name, 0, REQUESTS, ("train",), None))["utility"]
        for name in (OURS, "hierarchical", "random", "LinUCB")
    }
    known = references(PORTFOLIO, 0.0, 2, REQUESTS, ("train",), None)
    assert min(found[OURS], found["hierarchical"], found["LinUCB"]) > found["random"] + 0.02
    assert max(found.values()) < known["oracle"]
    assert known["best single"] == pytest.approx(max(v for k, v in known.items() if k.startswith("always")), abs=0.02)


def test_a_cost_is_a_share_of_the_dearest_arms() -> None:
    """Cheapest first, the dearest costs 1, and a request costs its arm's price whatever its length."""
    portfolio = load(PORTFOLIO, ("train",))
    assert list(portfolio.cost) == sorted(portfolio.cost) and portfolio.cost[-1] == 1
    stream = portfolio.stream(order_of(portfolio, 0, 20))
    assert [arm.output_price_usd for arm in stream.arms_at(3)] == pytest.approx(list(portfolio.cost))


def test_the_drifting_favourite_answers_half_as_well() -> None:
    """From the middle on, and no other arm does."""
    portfolio = load(PORTFOLIO, ("train",))
    stream, change, favourite = world("drift", portfolio, 0, REQUESTS)
    true = portfolio.scores[np.random.default_rng(1000).permutation(len(portfolio.profiles))[:REQUESTS]]
    assert (stream.scores[:change] == true[:change]).all()
    ratio = stream.scores[change:, favourite].mean() / true[change:, favourite].mean()
    assert 0.35 < ratio < 0.65
    assert (np.delete(stream.scores, favourite, 1) == np.delete(true, favourite, 1)).all()


def test_requests_until_a_share_has_moved() -> None:
    """A share that falls from all to nothing at once has moved as soon as a window can show it."""
    chosen = np.array([1] * 600 + [0] * 600)
    zeros = np.zeros(1200)
    assert until_moved(Trace(chosen, zeros, zeros, zeros, zeros), 1, 600) == 50
    assert np.isnan(until_moved(Trace(np.ones(1200, int), zeros, zeros, zeros, zeros), 1, 600))
