"""The benchmark of decisions, on the recorded streams."""

import pytest

from benchmarks.portfolios import data_folder, load
from benchmarks.quality import OURS, Job, run
from benchmarks.references import by_shuffle, order_of

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
        for name in (OURS, "random", "LinUCB")
    }
    shuffles = by_shuffle(PORTFOLIO, 0.0, 2, REQUESTS, ("train",), None)
    known = {key: values.mean() for key, values in shuffles.items()}
    assert min(found[OURS], found["LinUCB"]) > found["random"] + 0.02
    assert max(found.values()) < known["oracle"]
    assert known["best single"] == pytest.approx(max(v for k, v in known.items() if k.startswith("always")), abs=0.02)


def test_a_cost_is_a_share_of_the_dearest_arms() -> None:
    """Cheapest first, the dearest costs 1, and a request costs its arm's price whatever its length."""
    portfolio = load(PORTFOLIO, ("train",))
    assert list(portfolio.cost) == sorted(portfolio.cost) and portfolio.cost[-1] == 1
    stream = portfolio.stream(order_of(portfolio, 0, 20))
    assert [arm.output_price_usd for arm in stream.arms_at(3)] == pytest.approx(list(portfolio.cost))
