"""Turns decision records into the arrays of off-policy evaluation, and replays them to other policies."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import nan

import numpy as np

from policies.base import Policy
from policies.constraints import Exclusion
from policies.evaluation.overlap import LoggedDecisions
from policies.events import FORCED, ArmEstimate, Decision, Record
from policies.types import ModelState, Request, Vector

# Values of Decision.fallback of decisions that were not drawn by a policy. A second attempt, because a model failed
# ("model") or was silent for too long ("hedge"), excludes the first model. A decision of the ingress on a snapshot of
# the policy ("router") is drawn as any other.
NOT_DRAWN = (FORCED, "model", "hedge")
Reward = Callable[[Record], float]


def score(record: Record) -> float:
    """The mean of the explicit scores; without any, 0 for an arm that failed and NaN otherwise."""
    explicit = record.explicit_scores()
    if explicit:
        return float(np.mean(list(explicit.values())))
    failed = record.outcome is not None and record.outcome.status == "error"
    return 0.0 if failed else nan


def utility(record: Record) -> float:
    """The utility of the answer under the request's own objective, clipped to [-1, 1]; NaN without a score."""
    points = score(record)
    outcome = record.outcome
    if outcome is None or np.isnan(points):
        return nan
    objective = record.decision.objective
    worth = objective.utility(points, outcome.latency_s, outcome.cost_usd)
    return min(1.0, max(-1.0, worth))


def evaluable(records: Sequence[Record], after: int = -1) -> list[Record]:
    """The records whose arm was drawn with the logged propensities, in the order of their decisions.

    Args:
        records: of any kind.
        after: sequence of the last decision that the evaluated policies have learned from. Records up to it are left
            out, because they cannot test these policies.
    """
    kept = []
    for record in records:
        decision = record.decision
        total = sum(e.propensity for e in decision.estimates)
        drawn = (
            decision.arm
            and decision.fallback not in NOT_DRAWN
            and abs(total - 1) < 1e-3
        )
        if drawn and decision.sequence > after and decision.estimate().propensity > 0:
            kept.append(record)
    return sorted(kept, key=lambda record: record.decision.sequence)


def arms_of(records: Sequence[Record], *policies: Policy) -> tuple[str, ...]:
    """Names of all arms in the records or the policies, each once: the columns of the arrays."""
    names: dict[str, None] = {}  # in the order of their first appearance
    for record in records:
        names |= dict.fromkeys(estimate.arm for estimate in record.decision.estimates)
    for policy in policies:
        names |= dict.fromkeys(arm.name for arm in policy.arms)
    return tuple(names)


def _table(
    decisions: Sequence[Decision],
    arms: Sequence[str],
    value: Callable[[ArmEstimate], float],
) -> Vector:
    column = {name: k for k, name in enumerate(arms)}
    table = np.zeros((len(decisions), len(arms)))
    for row, decision in zip(table, decisions, strict=True):
        for e in decision.estimates:
            if e.arm in column:
                row[column[e.arm]] = value(e)
    return table


def to_log(
    records: Sequence[Record], arms: Sequence[str], reward: Reward = utility
) -> LoggedDecisions:
    """The arrays of these records, which must be `evaluable`.

    The predictions are those of the policy that decided: it made them before the reward was known. A failed answer
    always has a reward; the feedback rate of the other answers is that of their arm.

    Args:
        records: N records.
        arms: K names, as from `arms_of`.
        reward: `utility`, `score`, or another function with values in [-1, 1] or NaN.
    """
    decisions = [record.decision for record in records]
    column = {name: k for k, name in enumerate(arms)}
    chosen = np.array([column[decision.arm] for decision in decisions], dtype=np.int64)
    rewards = np.array([reward(record) for record in records], dtype=np.float64)
    propensities = _table(decisions, arms, lambda e: e.propensity)
    propensities /= np.maximum(propensities.sum(axis=1, keepdims=True), 1e-12)
    failed = np.array(
        [r.outcome is not None and r.outcome.status == "error" for r in records],
        dtype=bool,
    )
    rate = np.ones(len(records))
    for k in range(len(arms)):
        mine = (chosen == k) & ~failed
        if (mine & ~np.isnan(rewards)).any():
            rate[mine] = (~np.isnan(rewards[mine])).mean()
    if reward is score:
        predictions = _table(decisions, arms, lambda e: e.quality)
        bounds = (0.0, 1.0)
    else:
        predictions = _table(decisions, arms, lambda e: e.utility)
        bounds = (-1.0, 1.0)
    return LoggedDecisions(
        chosen,
        propensities,
        rewards,
        predictions if predictions.any() else None,
        rate,
        bounds,
    )


def target_probabilities(
    records: Sequence[Record], policy: Policy, arms: Sequence[str]
) -> Vector:
    """[N, K] probabilities with which a policy, as it is now, would have chosen each arm at each of these decisions.

    The policy decides under the logged load, waiting times and health, and learns nothing. A row is all 0 if the
    request's limits exclude every arm.

    Args:
        records: N records.
        policy: over some or all of the arms.
        arms: K names, as from `arms_of`.
    """
    alike: dict[tuple[tuple[str, ModelState], ...], list[int]] = defaultdict(list)
    for n, record in enumerate(records):
        alike[tuple((e.arm, _state(e)) for e in record.decision.estimates)].append(n)
    rng = np.random.default_rng(0)
    table = np.zeros((len(records), len(arms)))
    for states, rows in alike.items():
        decisions = [records[n].decision for n in rows]
        requests = [Request(d.id, d.profile, d.objective) for d in decisions]
        # At sequence 0 nothing is forgotten, so the policy stays as it is.
        table[rows] = _table(
            policy.decide(requests, dict(states), rng, 0), arms, lambda e: e.propensity
        )
    total = table.sum(axis=1, keepdims=True)
    return np.asarray(
        np.divide(table, total, out=np.zeros_like(table), where=total > 0)
    )


def policy_distance(one: Vector, other: Vector) -> float:
    """The distance of two policies: the mean total variation between their probabilities, both [N, K]."""
    return float(0.5 * np.abs(one - other).sum(axis=1).mean())


def _state(estimate: ArmEstimate) -> ModelState:
    """An arm's live state at a decision, from the log. The load is per replica, so it is given to one replica.

    The wait in the queue is the expected latency less that of the tokens; less than 1 µs is a rounding error.
    """
    answer_s = (
        estimate.ttft_s + max(estimate.output_tokens - 1.0, 0.0) * estimate.tpot_s
    )
    return ModelState(
        in_flight=round(estimate.load),
        healthy=Exclusion.of(estimate.removed_by) is not Exclusion.NO_REPLICA,
        wait_s=max(0.0, round(estimate.latency_s - answer_s, 6)),
    )
