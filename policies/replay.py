"""Records of the ledger as the arrays that off-policy evaluation works on, and what another policy makes of them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import nan

import numpy as np

from policies.base import Policy
from policies.ledger import Record
from policies.overlap import Log
from policies.types import FORCED, ArmEstimate, Decision, ModelState, Request, Vector

# A second try, after a model failed ("model") or was silent for too long ("hedge"), is nobody's free choice; the
# router's stand-in is, on the policy of its snapshot.
NOT_DRAWN = (FORCED, "model", "hedge")
Reward = Callable[[Record], float]


def score(record: Record) -> float:
    """The mean over the sources' scores; 0 for an arm that failed, NaN if nobody said anything."""
    if record.said():
        return float(np.mean(list(record.said().values())))
    return 0.0 if record.outcome is not None and record.outcome.status == "error" else nan


def utility(record: Record) -> float:
    """The score less what latency and cost took off it under the request's own objective, kept in [-1, 1]."""
    points, outcome = score(record), record.outcome
    if outcome is None or np.isnan(points):
        return nan
    return min(1.0, max(-1.0, record.decision.objective.utility(points, outcome.latency_s, outcome.cost_usd)))


def usable(records: Sequence[Record], after: int = -1) -> list[Record]:
    """Those whose arm was drawn with the propensities that were logged, in the order of their decisions.

    Args:
        records: of any kind.
        after: the last decision that the policies to be judged have learned from; what they know is no test of them.
    """
    kept = []
    for record in records:
        decision = record.decision
        total = sum(e.propensity for e in decision.estimates)
        drawn = decision.arm and decision.fallback not in NOT_DRAWN and abs(total - 1) < 1e-3
        if drawn and decision.sequence > after and decision.estimate().propensity > 0:
            kept.append(record)
    return sorted(kept, key=lambda record: record.decision.sequence)


def arms_of(records: Sequence[Record], *policies: Policy) -> tuple[str, ...]:
    """Names of all arms that the records or the policies know, each once: the columns of the arrays."""
    logged = (e.arm for record in records for e in record.decision.estimates)
    return tuple(dict.fromkeys([*logged, *(arm.name for policy in policies for arm in policy.arms)]))


def _table(decisions: Sequence[Decision], arms: Sequence[str], value: Callable[[ArmEstimate], float]) -> Vector:
    column, table = {name: k for k, name in enumerate(arms)}, np.zeros((len(decisions), len(arms)))
    for row, decision in zip(table, decisions, strict=True):
        for e in decision.estimates:
            if e.arm in column:
                row[column[e.arm]] = value(e)
    return table


def to_log(records: Sequence[Record], arms: Sequence[str], reward: Reward = utility) -> Log:
    """The arrays of these records, which must be `usable`.

    The predictions are those of the policy that decided: it made them before it knew. An arm that failed always
    tells; the feedback rate of the other answers is that of their arm.

    Args:
        records: N of them.
        arms: K names, as from `arms_of`.
        reward: `utility`, `score`, or any other in [-1, 1] that is NaN where it is not known.
    """
    decisions = [record.decision for record in records]
    column = {name: k for k, name in enumerate(arms)}
    chosen = np.array([column[decision.arm] for decision in decisions], dtype=np.int64)
    rewards = np.array([reward(record) for record in records], dtype=np.float64)
    propensities = _table(decisions, arms, lambda e: e.propensity)
    propensities /= np.maximum(propensities.sum(axis=1, keepdims=True), 1e-12)
    failed = np.array([r.outcome is not None and r.outcome.status == "error" for r in records], dtype=bool)
    rate = np.ones(len(records))
    for k in range(len(arms)):
        mine = (chosen == k) & ~failed
        if (mine & ~np.isnan(rewards)).any():
            rate[mine] = (~np.isnan(rewards[mine])).mean()
    predictions = _table(decisions, arms, (lambda e: e.quality) if reward is score else (lambda e: e.utility))
    bounds = (0.0, 1.0) if reward is score else (-1.0, 1.0)
    return Log(chosen, propensities, rewards, predictions if predictions.any() else None, rate, bounds)


def target_probabilities(records: Sequence[Record], policy: Policy, arms: Sequence[str]) -> Vector:
    """[N, K] probabilities with which a policy, as it is now, would have taken each arm at each of these decisions.

    It meets the load, waits and health that were logged, and learns nothing. A row is all 0 where it would have found
    no arm within the request's limits.

    Args:
        records: N of them.
        policy: over some or all of the arms.
        arms: K names, as from `arms_of`.
    """
    alike: dict[tuple[tuple[str, ModelState], ...], list[int]] = defaultdict(list)
    for n, record in enumerate(records):
        alike[tuple((e.arm, _state(e)) for e in record.decision.estimates)].append(n)
    rng, table = np.random.default_rng(0), np.zeros((len(records), len(arms)))
    for states, rows in alike.items():
        decisions = [records[n].decision for n in rows]
        requests = [Request(d.id, d.profile, d.objective) for d in decisions]
        # at sequence 0 nothing is forgotten: the policy stays as it was handed in
        table[rows] = _table(policy.decide(requests, dict(states), rng, 0), arms, lambda e: e.propensity)
    total = table.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(table, total, out=np.zeros_like(table), where=total > 0))


def apart(one: Vector, other: Vector) -> float:
    """How differently two policies decide: the mean total variation between their probabilities, both [N, K]."""
    return float(0.5 * np.abs(one - other).sum(axis=1).mean())


def _state(estimate: ArmEstimate) -> ModelState:
    """What the log tells of an arm at a decision: load is per replica, so that one replica with it is as good.

    The wait for a place is what the expected latency has beyond that of the tokens; less than 1 µs is rounding.
    """
    answer_s = estimate.ttft_s + max(estimate.output_tokens - 1.0, 0.0) * estimate.tpot_s
    return ModelState(
        in_flight=round(estimate.load),
        healthy=estimate.removed_by != "no healthy replica",
        wait_s=max(0.0, round(estimate.latency_s - answer_s, 6)),
    )
