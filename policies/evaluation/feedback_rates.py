"""Feedback rates: the share of the answers that get a score, estimated from a log in cells of one arm and one kind.

Within a cell the scored answers stand for all others: a weight of 1 / rate is post-stratification (Holt and Smith,
JRSS A 1979). A cell with few scores is merged with such cells of its kind, and these with such cells of all kinds, as
surveys collapse small weighting classes (Little, International Statistical Review 1986). A cell without a score,
although EXPECTED or more are due at the rate of its kind, tells nothing: its rate may be 0, so it is unsupported.

Which answers of one cell are scored must not depend on their quality. If users score bad answers more often than good
ones, all estimates here are too low, and no log of these scores can show it. A judge's sample is free of this.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.types import Vector

LEAST_SCORES = 5  # of a cell that is not merged
LEAST_RATE = 1e-6
EXPECTED = 3.0  # by a Poisson law, a cell with so many expected scores has none in 5 % of all cases

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FeedbackRates:
    """The feedback rates of N decisions among K arms.

    rate: [N] of each decision's answer; 1 where a reward is always seen.
    cell: [N] number of the cell whose rate was estimated; -1 where none was.
    table: [N, K] the rate that an answer of each arm to this request would have.
    unsupported: [N, K] whether no score tells about this arm's answers to this kind of request.
    hidden: [N] whether that is so of the answer that was given.
    """

    rate: Vector
    cell: Labels
    table: Vector
    unsupported: NDArray[np.bool_]
    hidden: NDArray[np.bool_]


def known_rates(rate: Vector, arms: int) -> FeedbackRates:
    """The rates, if they are known [N]; an arm that was not chosen gets the smallest."""
    n = len(rate)
    return FeedbackRates(
        rate,
        np.full(n, -1),
        np.full((n, arms), rate.min(initial=1.0)),
        np.zeros((n, arms), dtype=bool),
        np.zeros(n, dtype=bool),
    )


def estimated_rates(
    answered_by: Labels,
    kinds: Labels,
    scored: NDArray[np.bool_],
    sampled: NDArray[np.bool_],
    arms: int,
) -> FeedbackRates:
    """The rates by arm and kind, estimated from a log.

    Args:
        answered_by: [N] column of the arm whose answer was, or was not, scored.
        kinds: [N] number of the request's kind, from 0.
        scored: [N] whether a reward arrived.
        sampled: [N] whether it could be missing; the others are always seen, and do not count.
        arms: K.
    """
    count = int(kinds.max(initial=0)) + 1
    own = kinds * arms + answered_by
    size = count * arms
    answers = np.bincount(own[sampled], minlength=size).reshape(count, arms)
    scores = np.bincount(own[sampled & scored], minlength=size).reshape(count, arms)
    merged, unsupported = _merge(answers, scores)
    cells = merged.ravel()
    total = np.bincount(cells, answers.ravel(), minlength=size + count + 1)
    found = np.bincount(cells, scores.ravel(), minlength=size + count + 1)
    overall = max(found.sum() / max(1.0, total.sum()), LEAST_RATE)
    rates = np.divide(found, total, out=np.full(len(total), overall), where=found > 0)
    table = rates[merged]
    empty = answers == 0
    table[empty] = np.broadcast_to(_pooled(answers, scores)[:, None], table.shape)[
        empty
    ]
    hidden = sampled & unsupported[kinds, answered_by]
    estimated = sampled & ~hidden
    return FeedbackRates(
        rate=np.where(estimated, table[kinds, answered_by], 1.0),
        cell=np.where(estimated, merged[kinds, answered_by], -1),
        table=np.asarray(table[kinds]),
        unsupported=np.asarray(unsupported[kinds]),
        hidden=hidden,
    )


def _merge(answers: Labels, scores: Labels) -> tuple[Labels, NDArray[np.bool_]]:
    """[M, K] the number of each cell after merging, and whether it is unsupported, for M kinds and K arms."""
    kinds, arms = answers.shape
    cells = np.arange(kinds * arms).reshape(kinds, arms)
    missing = (scores == 0) & (answers * _pooled(answers, scores)[:, None] >= EXPECTED)
    small = (scores < LEAST_SCORES) & (answers > 0) & ~missing
    of_kind = np.broadcast_to(kinds * arms + np.arange(kinds)[:, None], cells.shape)
    merged = np.where(small, of_kind, cells)
    few = np.where(small, scores, 0).sum(axis=1) < LEAST_SCORES
    rest = small & few[:, None]
    merged = np.where(rest, kinds * (arms + 1), merged)
    if not scores[rest].any():
        due = (answers * _pooled(answers, scores)[:, None])[rest].sum()
        missing = missing | (rest & (due >= EXPECTED))
    return np.asarray(merged), missing


def _pooled(answers: Labels, scores: Labels) -> Vector:
    """[M] the rate of each kind, or of all kinds for a kind without scores."""
    overall = scores.sum() / max(1, answers.sum())
    by_kind = scores.sum(axis=1) / np.maximum(answers.sum(axis=1), 1)
    return np.asarray(np.where(by_kind > 0, by_kind, max(overall, LEAST_RATE)))
