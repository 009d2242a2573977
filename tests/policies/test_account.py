"""Tests of the account that says whether a model should have a replica."""

import numpy as np
import pytest

from policies.account import Account

PRICE = 0.5  # score points a minute
MOST = 6.0


def book(account: Account, paid: float, minutes: float = 1.0) -> bool:
    account.book(paid, PRICE, MOST, minutes, memory=1.0)
    return account.wanted


def test_a_replica_is_wanted_once_the_account_is_full_until_it_is_empty() -> None:
    """Between the two nothing changes."""
    account = Account()
    assert not book(account, 5.0)
    assert book(account, 2.0)
    assert [book(account, 0.0) for _ in range(12)] == [True] * 11 + [False]
    assert not book(account, 5.0)


def test_a_loss_below_the_price_starts_nothing_however_long_it_lasts() -> None:
    """What is paid out in the same time is more."""
    account = Account()
    assert not any(book(account, 0.9 * PRICE) for _ in range(1000))
    assert account.balance == 0.0
    account.fill(MOST)
    assert not [book(account, 0.9 * PRICE) for _ in range(1000)][-1]


def test_changes_are_apart_whatever_is_paid() -> None:
    """From a start to a stop it takes the whole balance, at the price; noise does not change that."""
    rng = np.random.default_rng(0)
    account = Account()
    wanted = [book(account, paid, 0.1) for paid in rng.binomial(1, 0.05, 20_000)]
    changes = np.flatnonzero(np.diff(wanted))
    assert len(changes) > 10
    stops = np.diff(changes)[:: 1 if wanted[0] else 2]
    assert min(stops) >= MOST / PRICE / 0.1 - 1


def test_the_rate_is_that_of_the_latest_requests() -> None:
    """At a steady rate it is that rate, and it fades without requests."""
    account = Account()
    for _ in range(1000):
        book(account, 0.02, 0.01)
    assert account.rate == pytest.approx(2.0, rel=0.05)
    book(account, 0.0, 5.0)
    assert account.rate < 0.02


def test_a_full_account_wants_a_replica() -> None:
    """As that of a model of which nothing is known but that it has one."""
    assert Account.of(True, MOST).wanted and not Account.of(False, MOST).wanted
    account = Account()
    account.fill(MOST)
    assert account.wanted and account.balance == MOST
