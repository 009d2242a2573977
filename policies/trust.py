"""Finds keys whose scores say the opposite of what all others say; their votes are then put aside.

Page's cumulative sum for each key (drift.py has the source and the bound on false alarms) of log likelihood ratios,

    S ← max(0, S + y log(q / p) + (1 - y) log((1 - q) / (1 - p))),   put aside at S > h,

of a score y in [0, 1] where e is expected: a hostile key gives q = 1 - e on the mean, and p is the nearest to that which
an honest key may give, at least the share c of e, and of the misses 1 - e at least the share c as well. So a strict
judge is not suspect, nor one whose grades are all alike as long as they are not half of what others give; and where
the two cannot be told apart, around e = 1/2, nothing is concluded.

What is expected is known in two ways, and the one that is kinder to the key is taken, so a key is wronged only if both
are wrong. First what the decision itself logged: it knows the request, and has learned from this key as well, so that
one whose requests are harder than others' explains itself. Secondly the mean of the other keys for this arm and kind of
request, each key weighing as a group does in a random-effects model (n / (n + m) for n scores; Gelman et al., Bayesian
Data Analysis, 3rd ed., 2013, ch. 5), so that many scores are no majority; it follows when an arm changes for all.

Needed: at least three other keys that scored the same, and that hostile keys are fewer than honest ones. Not seen: a key
that lies about few of its requests. All is a function of the journal in its order, so a replay finds the same.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any

from policies.types import Decision, Feedback

TOLERANCE = 0.5  # c
THRESHOLD = log(1_000.0)  # h
OTHERS = 3  # keys, at least, that what is expected is known from
RECENT = 10.0  # scores of a key, for an arm and a kind, over which its mean goes
BETWEEN = 2.0  # m: scores at which a key's own mean is as uncertain as keys differ
TAKEN_BACK = 200  # decisions of a key, the newest, whose votes are taken back
ANYBODY = ("", "*")  # no key, or an operator's (ledger.py): never suspect, and no witness

Cell = tuple[str, str]  # arm, and kind of request


def evidence(score: float, expected: float) -> float:
    """The log likelihood ratio of a hostile key to an honest one, for one score where another was expected."""
    e = min(max(expected, 0.02), 0.98)
    low, high = TOLERANCE * e, 1.0 - TOLERANCE * (1.0 - e)
    hostile = min(max(1.0 - e, 0.05), 0.95)
    honest = min(max(hostile, low), high)
    return score * log(hostile / honest) + (1.0 - score) * log((1.0 - hostile) / (1.0 - honest))


@dataclass
class _Key:
    """means: number (as far as it counts) and mean of its scores. run: number and sums of the scores and of what was
    expected, since `sum` was 0. decisions: the newest that it scored.
    """

    means: dict[Cell, tuple[float, float]] = field(default_factory=dict)
    sum: float = 0.0
    run: tuple[int, float, float] = (0, 0.0, 0.0)
    decisions: OrderedDict[str, None] = field(default_factory=OrderedDict)


class Trust:
    """Who is put aside, by the scores of all keys.

    Attributes:
        aside: the keys that are, by name, with the evidence.
    """

    def __init__(self) -> None:
        self.aside: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, _Key] = {}
        self._all: dict[Cell, tuple[float, float, int]] = {}  # of all keys: weight, weighted sum of means, how many

    def observe(self, event: Feedback, decision: Decision) -> bool:
        """Take in a score; whether its key's standing changes, which `turn` then does.

        A key is put aside by its score; it comes back, and is no longer looked at, by one from a trusted key.
        """
        name = event.owner
        if name in ANYBODY:
            return False
        key = self._keys.setdefault(name, _Key())
        key.decisions[event.decision_id] = None
        key.decisions.move_to_end(event.decision_id)
        if len(key.decisions) > TAKEN_BACK:
            key.decisions.popitem(last=False)
        if name in self.aside:
            return event.trusted
        cell = decision.arm, decision.profile.kind
        others = self._others(key, cell, event.score)
        self._mean(key, cell, event.score)
        if others is None or event.trusted:
            return False
        gained = evidence(event.score, others)
        if expected := decision.estimate().quality:  # 0 where the policy has no opinion
            gained = min(gained, evidence(event.score, expected))
        key.sum = max(0.0, key.sum + gained)
        count, given, wanted = key.run
        key.run = (count + 1, given + event.score, wanted + others) if key.sum else (0, 0.0, 0.0)
        return key.sum > THRESHOLD

    def recent(self, name: str) -> list[str]:
        """The decisions whose votes are taken back, or given back, when a key's standing changes; oldest first."""
        return list(self._keys[name].decisions)

    def turn(self, event: Feedback) -> None:
        """Put the key that gave this score aside, or take it back."""
        key = self._keys[event.owner]
        if self.aside.pop(event.owner, None) is not None:
            return
        count, given, wanted = key.run
        self.aside[event.owner] = {
            "since_s": event.time_s,
            "decision_id": event.decision_id,
            "scores": count,
            "mean_score": given / count,
            "mean_of_others": wanted / count,
            "log_likelihood_ratio": key.sum,
        }
        for cell, (n, mean) in key.means.items():
            self._add(cell, n, mean, -1)
        key.means, key.sum, key.run = {}, 0.0, (0, 0.0, 0.0)

    def _others(self, key: _Key, cell: Cell, score: float) -> float | None:
        """What the other keys expect here, by a standard error nearer to the score; None if there are too few."""
        weight, total, count = self._all.get(cell, (0.0, 0.0, 0))
        if (own := key.means.get(cell)) is not None:
            w = own[0] / (own[0] + BETWEEN)
            weight, total, count = weight - w, total - w * own[1], count - 1
        if count < OTHERS:
            return None
        mean = (total + 0.5) / (weight + 1.0)
        error = sqrt(max(mean * (1.0 - mean), 0.0) / (BETWEEN * (weight + 1.0)))
        return max(score, mean - error) if score < mean else min(score, mean + error)

    def _mean(self, key: _Key, cell: Cell, score: float) -> None:
        if (own := key.means.get(cell)) is not None:
            self._add(cell, *own, -1)
        n, mean = own or (0.0, 0.0)
        n = min(n + 1.0, RECENT)
        key.means[cell] = own = n, mean + (score - mean) / n
        self._add(cell, *own, 1)

    def _add(self, cell: Cell, n: float, mean: float, sign: int) -> None:
        weight, total, count = self._all.get(cell, (0.0, 0.0, 0))
        w = sign * n / (n + BETWEEN)
        self._all[cell] = weight + w, total + w * mean, count + sign

    def state(self) -> dict[str, Any]:
        """All of it as plain data."""
        keys = {
            name: {
                "means": [[*cell, *mean] for cell, mean in key.means.items()],
                "sum": key.sum,
                "run": list(key.run),
                "decisions": list(key.decisions),
            }
            for name, key in self._keys.items()
        }
        every = [[*cell, *found] for cell, found in self._all.items()]
        return {"keys": keys, "all": every, "aside": {name: dict(found) for name, found in self.aside.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave; nothing from an empty one."""
        self.aside.clear()
        self.aside |= {name: dict(found) for name, found in state.get("aside", {}).items()}
        self._all = {(arm, kind): (weight, total, count) for arm, kind, weight, total, count in state.get("all", ())}
        self._keys = {
            name: _Key(
                {(arm, kind): (n, mean) for arm, kind, n, mean in key["means"]},
                key["sum"],
                tuple(key["run"]),
                OrderedDict.fromkeys(key["decisions"]),
            )
            for name, key in state.get("keys", {}).items()
        }
