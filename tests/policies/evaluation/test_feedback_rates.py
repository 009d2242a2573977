"""Feedback rates by arm and kind, estimated from a log."""

import numpy as np
import pytest

from policies.evaluation.feedback_rates import FeedbackRates, estimated_rates
from policies.evaluation.overlap import LoggedDecisions

Cells = dict[tuple[int, int], tuple[int, int]]


def rates_of(cells: Cells, flaws: int = 0) -> tuple[FeedbackRates, list[int]]:
    """The rates of a log with so many answers and scores by kind and arm, and the first row of each cell.

    Args:
        cells: answers and scores.
        flaws: answers of each cell whose reward is always seen, before the others.
    """
    kinds: list[int] = []
    arms: list[int] = []
    scored: list[bool] = []
    sampled: list[bool] = []
    firsts = []
    for (kind, arm), (answers, scores) in cells.items():
        firsts.append(len(kinds))
        kinds += [kind] * (answers + flaws)
        arms += [arm] * (answers + flaws)
        scored += [True] * flaws + [True] * scores + [False] * (answers - scores)
        sampled += [False] * flaws + [True] * answers
    found = estimated_rates(
        np.array(arms), np.array(kinds), np.array(scored), np.array(sampled), 3
    )
    return found, [first + flaws for first in firsts]


def test_each_arm_and_kind_has_its_own_rate() -> None:
    """Rewards that are always seen do not count, and have the rate 1."""
    cells = {(0, 0): (100, 20), (0, 1): (50, 25), (1, 0): (300, 6), (1, 1): (100, 10)}
    found, firsts = rates_of(cells, flaws=40)
    assert found.rate[firsts] == pytest.approx([0.2, 0.5, 0.02, 0.1])
    assert (found.rate[:40] == 1.0).all() and (found.cell[:40] == -1).all()
    assert found.table[firsts[0], :2] == pytest.approx([0.2, 0.5])
    assert found.table[firsts[2], :2] == pytest.approx([0.02, 0.1])
    assert not found.unsupported.any()


def test_the_inverse_rates_of_the_scored_answers_add_up_to_all_answers() -> None:
    """Also where cells are merged: each scored answer stands for as many as it must."""
    rng = np.random.default_rng(3)
    n = 3000
    kinds = rng.integers(6, size=n)
    arms = rng.integers(3, size=n)
    scored = rng.random(n) < 0.02 * (1 + kinds)
    found = estimated_rates(arms, kinds, scored, np.ones(n, bool), 3)
    known = found.cell >= 0
    total = (scored / found.rate)[known].sum()
    assert total == pytest.approx(known.sum()) and known.mean() > 0.95


def test_small_cells_of_a_kind_are_merged() -> None:
    """Two cells with two and three scores share a rate; a large one of the kind keeps its own."""
    found, firsts = rates_of({(0, 0): (100, 30), (0, 1): (20, 2), (0, 2): (30, 3)})
    assert found.rate[firsts] == pytest.approx([0.3, 0.1, 0.1])
    assert found.cell[firsts[1]] == found.cell[firsts[2]] != found.cell[firsts[0]]


def test_an_arm_without_scores_where_many_are_due_is_unsupported() -> None:
    """No score in 100 answers where the kind's rate is above 10 % is no accident; none in five is one."""
    found, firsts = rates_of({(0, 0): (100, 30), (0, 1): (100, 0), (0, 2): (5, 0)})
    assert found.unsupported[0].tolist() == [False, True, False]
    assert found.rate[firsts[1]] == 1.0 and found.cell[firsts[1]] == -1
    whole = {(0, 0): (100, 30), (0, 1): (100, 30), (1, 0): (90, 0), (1, 1): (80, 0)}
    found, firsts = rates_of(whole)
    assert found.unsupported[firsts[2], :2].all()
    assert not found.unsupported[firsts[0]].any()


def test_an_arm_that_was_never_chosen_for_a_kind_has_the_rate_of_the_kind() -> None:
    """It is the propensities that say whether its value can be estimated."""
    found, firsts = rates_of({(0, 0): (100, 20), (1, 1): (100, 50)})
    assert found.table[firsts[0]] == pytest.approx([0.2, 0.2, 0.2])
    assert found.table[firsts[1]] == pytest.approx([0.5, 0.5, 0.5])
    assert not found.unsupported.any()


def test_a_known_rate_is_taken_as_it_is() -> None:
    """A flaw has the rate 1 all the same."""
    data = LoggedDecisions(
        np.array([0, 1, 0]),
        np.full((3, 2), 0.5),
        np.array([0.0, np.nan, 1.0]),
        feedback_rate=np.full(3, 0.05),
        always_seen=np.array([True, False, False]),
    )
    assert data.rates(2).rate.tolist() == [1.0, 0.05, 0.05]
    assert data.scores == 1 and data.head(2).scores == 0
