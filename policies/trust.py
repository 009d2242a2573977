"""Finds keys whose scores say the opposite of what all others say; their votes are then in quarantine.

A request's cell is its arm, kind and complexity. In each, from the mean y of a key's latest n scores and the score e
that is expected there, comes the log likelihood ratio of a hostile key to an honest one,

    S = n (y log(q / p) + (1 - y) log((1 - q) / (1 - p))),

where a hostile key gives q = 1 - e on the mean, and p is the nearest to that which an honest one may give: at least
the share c of e, and of the misses 1 - e at least the share c as well. A key may be hostile in some cells only, in each
with probability 1/2, so all its scores together have the log likelihood ratio Σ log((1 + exp S) / 2) (a mixture:
Robbins, Annals of Mathematical Statistics 1970). At h the key is quarantined until an operator vouches for it. Long
before, in doubt, its votes are held back, and they count again when its further scores have cleared it: lies do their
harm in the time until they are found, and an honest key's votes that come late are hardly missed.
Where bad scores are expected a key that gives good ones may just be easily pleased, so these cells count no more than
those where it gave bad scores for good answers. A strict judge is not suspect as long as it gives the share c of what
others give, and where nobody can tell the two apart, around e = 1/2, nothing is concluded.
S has a short memory, so h is no bound on false alarms for all times; they are measured (tests/poisoning.py).

What is expected is known in two ways, and the one that is kinder to the key is taken, so a key is wronged only if both
are wrong. First what the decisions themselves logged: that knows the requests, and has learned from this key as well,
so one whose requests are harder than they look explains itself. Secondly what the other keys gave in the same cell,
each weighing as a group does in a random-effects model (n / (n + m) for n scores; Gelman et al., Bayesian Data
Analysis, 3rd ed., 2013, ch. 5), so that many scores are no majority; that follows an arm that changes for all.

Needed: at least three other keys in a cell, and fewer hostile keys than honest ones. Not seen: a key that lies now and
then, or that soon takes its lies back. All is a function of the journal in its order, so a replay finds the same.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from math import exp, log, sqrt
from typing import Any, NamedTuple, TypeVar

from policies.types import Decision, Feedback

TOLERANCE = 0.75  # c
THRESHOLD = 3.0  # h
DOUBT, CLEARED = 0.5, 0.0  # log likelihood ratios above which votes are held back, and down to which they stay so
OTHERS = 3  # keys, at least, that must have scored the same
RECENT = 20.0  # scores of a key in a cell, over which its mean goes
RECENT_EXPECTED = 5.0  # decisions over which goes what they expected: the policy is quick to see that an arm changed
BETWEEN = 2.0  # m: scores at which a key's own mean is as uncertain as keys differ
ERRORS = 0.25  # standard errors by which what others give is moved towards the key's own
GRADES = 5  # of complexity
CELLS = 64  # of a key, the latest
TAKEN_BACK = 200  # decisions of a key, the latest, whose votes are taken back
UNJUDGED = ("", "*")  # no key, or an operator's (ledger.py): never suspect, and no witness

HEARD, SILENCED, QUARANTINED = range(3)  # how a key stands

K = TypeVar("K")
V = TypeVar("V")
Cell = tuple[str, str, int]  # arm, kind and grade of complexity


class _Mean(NamedTuple):
    """Of a key's latest scores in a cell: number, mean, and the mean of what the decisions expected."""

    n: float
    score: float
    expected: float


@dataclass
class _Key:
    cells: OrderedDict[Cell, _Mean] = field(default_factory=OrderedDict)
    decisions: OrderedDict[str, None] = field(default_factory=OrderedDict)  # the latest that it scored


def likelihood_ratio(score: float, expected: float) -> float:
    """Log likelihood ratio of a hostile key to an honest one, for a mean score in [0, 1] where another is expected."""
    e = min(max(expected, 0.02), 0.98)
    hostile = min(max(1.0 - e, 0.05), 0.95)
    honest = min(max(hostile, TOLERANCE * e), 1.0 - TOLERANCE * (1.0 - e))
    return score * log(hostile / honest) + (1.0 - score) * log((1.0 - hostile) / (1.0 - honest))


class Trust:
    """Who is quarantined, by the scores of all keys.

    Attributes:
        quarantined: the keys that are, by name, with the evidence.
        silenced: the keys whose votes do not count: these, and those that are in doubt.
    """

    def __init__(self) -> None:
        self.quarantined: dict[str, dict[str, Any]] = {}
        self.silenced: set[str] = set()
        self._keys: dict[str, _Key] = {}
        self._all: dict[Cell, tuple[float, float, int]] = {}  # of all keys: weight, weighted sum of means, how many

    def observe(self, event: Feedback, decision: Decision, corrected: float | None = None) -> bool:
        """Take in a score; whether its key's standing changes, which `turn` then does.

        It changes by its own scores alone; one that an operator vouches for ends every doubt. A score that the key
        itself has `corrected` counts no more: what it says in the end is what the policy learns from.
        """
        name = event.owner
        if name in UNJUDGED:
            return False
        key = self._keys.setdefault(name, _Key())
        _newest(key.decisions, event.decision_id, None, TAKEN_BACK)
        if name in self.quarantined:
            return event.trusted
        profile = decision.profile
        cell = decision.arm, profile.kind, min(GRADES - 1, int(GRADES * profile.complexity))
        self._learn(key, cell, event.score, decision.estimate().quality, corrected)
        return self._standing(event) != (SILENCED if name in self.silenced else HEARD)

    def recent(self, name: str) -> list[str]:
        """The decisions whose votes are taken back, or given back, when a key's standing changes; oldest first."""
        return list(self._keys[name].decisions)

    def turn(self, event: Feedback) -> None:
        """Give the key that gave this score the standing that it now has."""
        name, key = event.owner, self._keys[event.owner]
        released = self.quarantined.pop(name, None) is not None
        standing = HEARD if released else self._standing(event)
        if standing == HEARD:
            self.silenced.discard(name)
            return
        self.silenced.add(name)
        if standing == QUARANTINED:
            self._quarantine(event, key)

    def _standing(self, event: Feedback) -> int:
        """Of the key that gave this score, by all that is known; of one that is not quarantined."""
        if event.trusted:
            return HEARD
        suspicion = self._suspicion(self._keys[event.owner])
        if suspicion > THRESHOLD:
            return QUARANTINED
        return SILENCED if suspicion > (CLEARED if event.owner in self.silenced else DOUBT) else HEARD

    def _quarantine(self, event: Feedback, key: _Key) -> None:
        cells = {cell: (mean, self._others(mean, cell)) for cell, mean in key.cells.items()}
        known = {cell: (mean, others[0]) for cell, (mean, others) in cells.items() if others is not None}
        count = sum(mean.n for mean, _ in known.values())
        self.quarantined[event.owner] = {
            "since_s": event.time_s,
            "decision_id": event.decision_id,
            "scores": int(count),
            "mean_score": sum(mean.n * mean.score for mean, _ in known.values()) / count,
            "mean_of_others": sum(mean.n * others for mean, others in known.values()) / count,
            "log_likelihood_ratio": self._suspicion(key),
        }
        for cell, mean in key.cells.items():
            self._count(cell, mean, -1)
        key.cells.clear()

    def _learn(self, key: _Key, cell: Cell, score: float, expected: float, corrected: float | None) -> None:
        before = key.cells.get(cell)
        if before is not None:
            self._count(cell, before, -1)
        n, mean, logged = before or _Mean(0.0, 0.0, 0.0)
        if corrected is not None and n > 0.0:
            after = _Mean(n, min(max(mean + (score - corrected) / n, 0.0), 1.0), logged)
        else:
            n = min(n + 1.0, RECENT)
            after = _Mean(n, mean + (score - mean) / n, logged + (expected - logged) / min(n, RECENT_EXPECTED))
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
        """What the other keys give in a cell, and its standard error; None if there are too few."""
        weight, total, count = self._all[cell]
        if count - 1 < OTHERS:
            return None
        w = own.n / (own.n + BETWEEN)
        mean = min(max((total - w * own.score + 0.5) / (weight - w + 1.0), 0.0), 1.0)
        return mean, ERRORS * sqrt(mean * (1.0 - mean) / (BETWEEN * (weight - w + 1.0)))

    def _suspicion(self, key: _Key) -> float:
        """The log likelihood ratio of all its scores together."""
        high, low = 0.0, 0.0  # of cells where good scores are expected, and bad ones
        for cell, own in key.cells.items():
            others = self._others(own, cell)
            if others is None:
                continue
            mean, error = others
            nearer = max(own.score, mean - error) if own.score < mean else min(own.score, mean + error)
            ratio = likelihood_ratio(own.score, nearer)
            if own.expected:  # 0 where the policy has no opinion
                ratio = min(ratio, likelihood_ratio(own.score, own.expected))
            found = log((1.0 + exp(own.n * ratio)) / 2.0)
            high, low = (high + found, low) if mean > 0.5 else (high, low + found)
        return high + min(high, low)

    def state(self, brief: bool = False) -> dict[str, Any]:
        """All of it as plain data.

        Args:
            brief: without the decisions of keys that nothing speaks against, which are most of it.
        """
        keys = {
            name: {
                "cells": [[*cell, *mean] for cell, mean in key.cells.items()],
                "decisions": list(key.decisions) if not brief or self._suspected(name) else [],
            }
            for name, key in self._keys.items()
        }
        every = [[*cell, *found] for cell, found in self._all.items()]
        found = {name: dict(evidence) for name, evidence in self.quarantined.items()}
        return {"keys": keys, "all": every, "quarantined": found, "silenced": sorted(self.silenced)}

    def _suspected(self, name: str) -> bool:
        return name in self.silenced or self._suspicion(self._keys[name]) > 0.0

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; nothing from an empty one."""
        self.quarantined.clear()
        self.quarantined |= {name: dict(found) for name, found in state.get("quarantined", {}).items()}
        self.silenced.clear()
        self.silenced |= self.quarantined.keys() | set(state.get("silenced", ()))
        self._all = {(arm, kind, grade): tuple(found) for arm, kind, grade, *found in state.get("all", ())}
        self._keys = {
            name: _Key(
                OrderedDict(((arm, kind, grade), _Mean(*mean)) for arm, kind, grade, *mean in key["cells"]),
                OrderedDict.fromkeys(key["decisions"]),
            )
            for name, key in state.get("keys", {}).items()
        }


def _newest(items: OrderedDict[K, V], name: K, value: V, capacity: int) -> tuple[K, V] | None:
    """Put an item in as the newest; returns the oldest if there is no more room for it."""
    items[name] = value
    items.move_to_end(name)
    return items.popitem(last=False) if len(items) > capacity else None
