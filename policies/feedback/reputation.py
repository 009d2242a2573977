"""Rater reputation: quarantines keys whose scores are the opposite of what all other keys give.

A cell is an arm, a kind of work and a grade of complexity. In each cell, y is the mean of a key's latest n scores and
e is the expected score. The log likelihood ratio of a hostile key to an honest key is

    S = n (y log(q / p) + (1 - y) log((1 - q) / (1 - p))).

A hostile key has the mean q = 1 - e. p is the mean of an honest key that is nearest to q: an honest key gives at least
the share c of e, and at least the share c of the misses 1 - e. A key may be hostile in some cells only, in each with
probability 1/2, so all its scores together have the log likelihood ratio Σ log((1 + exp S) / 2) (a mixture: Robbins,
Annals of Mathematical Statistics 1970). At h the key is quarantined until an operator vouches for it. At a much lower
value it is suspended: its votes do not count until its further scores clear it. False scores do harm until they are
found, whereas the late votes of an honest key cost little.

In cells where low scores are expected, a key that gives high scores may just be lenient. So these cells together count
at most as much as the cells where the key gave low scores for good answers. A strict key is not suspected while it
gives the share c of what others give. Around e = 1/2 a hostile and an honest key look alike, and S is near zero.
S forgets, so h does not bound the false alarms for all times; they are measured (tests/support/poisoning.py).

The expected score is estimated in two ways, and the one more favourable to the key is used; a false quarantine needs
both to be wrong. The first estimate is the one that the decisions logged. It depends on the request and has learned
from this key too, so it explains a key whose requests are harder than they look. The second estimate is what the other
keys gave in the same cell. Each key has the weight of a group in a random-effects model (n / (n + m) for n scores;
Gelman et al., Bayesian Data Analysis, 3rd ed., 2013, ch. 5), so many scores of one key are no majority. This estimate
follows an arm that changes for all keys.

The test needs at least three other keys in a cell, and fewer hostile keys than honest ones. It does not detect a key
that gives few false scores, or that soon corrects them. Everything is a function of the journal in its order, so a
replay comes to the same result.
"""

from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Any, NamedTuple, TypeVar

from policies.events import Decision, Feedback

TOLERANCE = 0.75  # c
THRESHOLD = 3.0  # h
# Log likelihood ratios above which a key is suspended, and at which a suspended key is cleared.
DOUBT = 0.5
CLEARED = 0.0
OTHERS = 3  # smallest number of other keys that must have scores in the cell
RECENT = 20.0  # scores over which a key's mean in a cell goes
# Decisions over which the mean of their expected scores goes. It is short, because the policy soon finds that an arm
# changed.
RECENT_EXPECTED = 5.0
BETWEEN = (
    2.0  # m: number of scores at which a key's own mean is as uncertain as keys differ
)
ERRORS = (
    0.25  # standard errors by which the others' mean is moved towards the key's own
)
GRADES = 5  # of complexity
CELLS = 64  # latest cells of a key
MAX_REVERTED = 200  # latest decisions of a key whose votes are withdrawn
# Latest decisions of a silenced key, the withdrawn ones included, whose votes are restored when it is trusted again.
MAX_RESTORED = 2000
# Owners without a reputation: no key, or an operator. They are never suspected, and no witnesses.
UNJUDGED = ("", "*")

TRUSTED, SUSPENDED, QUARANTINED = range(3)  # standings of a key

K = TypeVar("K")
V = TypeVar("V")
Cell = tuple[str, str, int]  # arm, kind and grade of complexity


class _Mean(NamedTuple):
    """A key's latest scores in a cell: their number, their mean, and the mean of the decisions' expected scores."""

    n: float
    score: float
    expected: float


@dataclass
class _Key:
    cells: OrderedDict[Cell, _Mean] = field(default_factory=OrderedDict)
    # The latest decisions that the key scored.
    decisions: OrderedDict[str, None] = field(default_factory=OrderedDict)


def likelihood_ratio(score: float, expected: float) -> float:
    """Log likelihood ratio of a hostile key to an honest one, for a mean score and its expected value in [0, 1]."""
    e = min(max(expected, 0.02), 0.98)
    hostile = min(max(1.0 - e, 0.05), 0.95)
    honest = min(max(hostile, TOLERANCE * e), 1.0 - TOLERANCE * (1.0 - e))
    return score * log(hostile / honest) + (1.0 - score) * log(
        (1.0 - hostile) / (1.0 - honest)
    )


def with_decisions(
    state: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, Any]:
    """Add the decisions of each key, which a compact state leaves out, as far as another state has them.

    Args:
        state: of `KeyReputation.state(compact=True)`.
        current: a newer state, which is not compact.
    """
    current_keys = current.get("keys", {})
    keys = {}
    for name, key in state["keys"].items():
        decisions = key["decisions"] or current_keys.get(name, key)["decisions"]
        keys[name] = key | {"decisions": decisions}
    return {**state, "keys": keys}


def with_latest(state: Mapping[str, Any], scores: Iterable[Feedback]) -> dict[str, Any]:
    """Add the latest decisions of each key, which a compact state leaves out.

    Args:
        state: of `KeyReputation.state(compact=True)`.
        scores: the scores that the state has learned from, in their order.
    """
    lacking = {name for name, key in state["keys"].items() if not key["decisions"]}
    latest: dict[str, OrderedDict[str, None]] = {
        name: OrderedDict() for name in lacking
    }
    for score in scores if lacking else ():
        if score.owner in lacking:
            _newest(latest[score.owner], score.decision_id, None, MAX_REVERTED)
    keys = {
        name: key | {"decisions": list(latest.get(name, key["decisions"]))}
        for name, key in state["keys"].items()
    }
    return {**state, "keys": keys}


def without_decisions(state: Mapping[str, Any], gone: Container[str]) -> dict[str, Any]:
    """A state without these decisions; what was learned from their scores stays."""
    keys = {
        name: key | {"decisions": [d for d in key["decisions"] if d not in gone]}
        for name, key in state.get("keys", {}).items()
    }
    found = {
        name: evidence
        | ({"decision_id": ""} if evidence.get("decision_id") in gone else {})
        for name, evidence in state.get("quarantined", {}).items()
    }
    return {**state, "keys": keys, "quarantined": found} if state else {}


class KeyReputation:
    """The standing of each key, derived from the scores of all keys.

    Attributes:
        quarantined: by name, the quarantined keys with the evidence.
        silenced: names of the keys whose votes do not count: the quarantined and the suspended ones.
    """

    def __init__(self) -> None:
        self.quarantined: dict[str, dict[str, Any]] = {}
        self.silenced: set[str] = set()
        self._keys: dict[str, _Key] = {}
        # Of all keys together: weight, weighted sum of means, number of keys.
        self._all: dict[Cell, tuple[float, float, int]] = {}

    def observe(
        self, event: Feedback, decision: Decision, corrected: float | None = None
    ) -> bool:
        """Record a score. Returns whether its key's standing changes; the caller then calls `update`.

        Only a key's own scores change its standing. An operator's voucher makes the key trusted. `corrected` is the
        earlier score that the key replaces by this one: only its last score counts, as in the policy.
        """
        name = event.owner
        if name in UNJUDGED:
            return False
        key = self._keys.setdefault(name, _Key())
        capacity = MAX_RESTORED if name in self.silenced else MAX_REVERTED
        _newest(key.decisions, event.decision_id, None, capacity)
        if name in self.quarantined:
            return event.trusted
        profile = decision.profile
        cell = (
            decision.arm,
            profile.kind,
            min(GRADES - 1, int(GRADES * profile.complexity)),
        )
        expected = decision.estimate().unflawed_quality
        self._learn(key, cell, event.score, expected, corrected)
        return self._standing(event) != (
            SUSPENDED if name in self.silenced else TRUSTED
        )

    def recent(self, name: str) -> list[str]:
        """The decisions whose votes are withdrawn or restored when a key's standing changes; oldest first."""
        return list(self._keys[name].decisions)

    def update(self, event: Feedback) -> None:
        """Set the standing of the key that gave this score."""
        name = event.owner
        key = self._keys[event.owner]
        released = self.quarantined.pop(name, None) is not None
        standing = TRUSTED if released else self._standing(event)
        if standing == TRUSTED:
            self.silenced.discard(name)
            while len(key.decisions) > MAX_REVERTED:
                key.decisions.popitem(last=False)
            return
        self.silenced.add(name)
        if standing == QUARANTINED:
            self._quarantine(event, key)

    def _standing(self, event: Feedback) -> int:
        """The standing that follows from all scores of this score's key, which is not quarantined."""
        if event.trusted:
            return TRUSTED
        suspicion = self._suspicion(self._keys[event.owner])
        if suspicion > THRESHOLD:
            return QUARANTINED
        limit = CLEARED if event.owner in self.silenced else DOUBT
        return SUSPENDED if suspicion > limit else TRUSTED

    def _quarantine(self, event: Feedback, key: _Key) -> None:
        cells = {
            cell: (mean, self._others(mean, cell)) for cell, mean in key.cells.items()
        }
        known = {
            cell: (mean, others[0])
            for cell, (mean, others) in cells.items()
            if others is not None
        }
        count = sum(mean.n for mean, _ in known.values())
        self.quarantined[event.owner] = {
            "since_s": event.time_s,
            "decision_id": event.decision_id,
            "scores": int(count),
            "mean_score": sum(mean.n * mean.score for mean, _ in known.values())
            / count,
            "mean_of_others": sum(mean.n * others for mean, others in known.values())
            / count,
            "log_likelihood_ratio": self._suspicion(key),
        }
        for cell, mean in key.cells.items():
            self._count(cell, mean, -1)
        key.cells.clear()

    def _learn(
        self,
        key: _Key,
        cell: Cell,
        score: float,
        expected: float,
        corrected: float | None,
    ) -> None:
        before = key.cells.get(cell)
        if before is not None:
            self._count(cell, before, -1)
        n, mean, logged = before or _Mean(0.0, 0.0, 0.0)
        if corrected is not None and n > 0.0:
            after = _Mean(n, min(max(mean + (score - corrected) / n, 0.0), 1.0), logged)
        else:
            n = min(n + 1.0, RECENT)
            after = _Mean(
                n,
                mean + (score - mean) / n,
                logged + (expected - logged) / min(n, RECENT_EXPECTED),
            )
        self._count(cell, after, 1)
        if (gone := _newest(key.cells, cell, after, CELLS)) is not None:
            self._count(*gone, -1)

    def _count(self, cell: Cell, mean: _Mean, sign: int) -> None:
        weight, total, count = self._all.get(cell, (0.0, 0.0, 0))
        w = sign * mean.n / (mean.n + BETWEEN)
        if count + sign == 0:
            del self._all[cell]
        else:
            self._all[cell] = weight + w, total + w * mean.score, count + sign

    def _others(self, own: _Mean, cell: Cell) -> tuple[float, float] | None:
        """Mean score of the other keys in a cell, and its standard error; None if there are too few keys."""
        weight, total, count = self._all[cell]
        if count - 1 < OTHERS:
            return None
        w = own.n / (own.n + BETWEEN)
        mean = min(max((total - w * own.score + 0.5) / (weight - w + 1.0), 0.0), 1.0)
        return mean, ERRORS * sqrt(mean * (1.0 - mean) / (BETWEEN * (weight - w + 1.0)))

    def _suspicion(self, key: _Key) -> float:
        """The log likelihood ratio of all scores of a key together."""
        high = 0.0  # of the cells where high scores are expected
        low = 0.0  # of the cells where low scores are expected
        for cell, own in key.cells.items():
            others = self._others(own, cell)
            if others is None:
                continue
            mean, error = others
            below = own.score < mean
            towards = mean - error if below else mean + error
            nearer = max(own.score, towards) if below else min(own.score, towards)
            ratio = likelihood_ratio(own.score, nearer)
            if own.expected:  # 0 if the policy has no estimate
                ratio = min(ratio, likelihood_ratio(own.score, own.expected))
            found = log((1.0 + exp(own.n * ratio)) / 2.0)
            if mean > 0.5:
                high += found
            else:
                low += found
        return high + min(high, low)

    def state(self, compact: bool = False) -> dict[str, Any]:
        """The state of all keys as plain data.

        Args:
            compact: leave out the decisions of keys without any suspicion, which are most of the data.
        """
        keys = {
            name: {
                "cells": [[*cell, *mean] for cell, mean in key.cells.items()],
                "decisions": list(key.decisions)
                if not compact or self._suspected(name)
                else [],
            }
            for name, key in self._keys.items()
        }
        every = [[*cell, *found] for cell, found in self._all.items()]
        found = {name: dict(evidence) for name, evidence in self.quarantined.items()}
        return {
            "keys": keys,
            "all": every,
            "quarantined": found,
            "silenced": sorted(self.silenced),
        }

    def _suspected(self, name: str) -> bool:
        return name in self.silenced or self._suspicion(self._keys[name]) > 0.0

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state that `state` returned; an empty state clears everything."""
        self.quarantined.clear()
        self.quarantined |= {
            name: dict(found) for name, found in state.get("quarantined", {}).items()
        }
        self.silenced.clear()
        self.silenced |= self.quarantined.keys() | set(state.get("silenced", ()))
        self._all = {
            (arm, kind, grade): tuple(found)
            for arm, kind, grade, *found in state.get("all", ())
        }
        self._keys = {
            name: _Key(
                OrderedDict(
                    ((arm, kind, grade), _Mean(*mean))
                    for arm, kind, grade, *mean in key["cells"]
                ),
                OrderedDict.fromkeys(key["decisions"]),
            )
            for name, key in state.get("keys", {}).items()
        }


def _newest(
    items: OrderedDict[K, V], name: K, value: V, capacity: int
) -> tuple[K, V] | None:
    """Add an item as the newest; returns the oldest item if it had to be removed for lack of capacity."""
    items[name] = value
    items.move_to_end(name)
    return items.popitem(last=False) if len(items) > capacity else None
