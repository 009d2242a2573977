"""Turns decision records into the arrays of off-policy evaluation, and replays them to other policies."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan

import numpy as np
from msgspec import structs

from policies.base import Policy
from policies.constraints import Exclusion, total_load
from policies.coverage import is_unflawed
from policies.evaluation.overlap import LoggedDecisions
from policies.events import (
    CALIBRATION,
    FORCED,
    NOT_ROUTED,
    PAIR,
    ArmEstimate,
    Decision,
    Record,
)
from policies.scarcity import work
from policies.types import Arm, ModelState, Request, Vector

# Values of Decision.fallback of decisions that were not drawn by a policy. A second attempt, because a model failed
# ("model") or was silent for too long ("hedge"), excludes the first model. A decision of the ingress on a snapshot of
# the policy ("router") is drawn as any other.
HEDGE = "hedge"
NOT_DRAWN = (*NOT_ROUTED, "model", HEDGE)
OUTSIDE = "outside of the scored sample"  # reason to leave a decision out
MIN_SAMPLE = 20  # answers of a judge's sample
MIN_SCORED = 0.5  # smallest share of a judge's sample that is scored
Reward = Callable[[Record], float]


def score(record: Record) -> float:
    """0 for an answer with a visible flaw, otherwise the mean of its scores; NaN without any."""
    if record.flaw:
        return 0.0
    points = record.mean_score
    return nan if points is None else points


def utility(record: Record) -> float:
    """The utility of the answer under the request's own objective, clipped to [-1, 1]; NaN without a score."""
    points = score(record)
    outcome = record.outcome
    if outcome is None or np.isnan(points):
        return nan
    objective = record.decision.objective
    worth = objective.utility(points, outcome.latency_s, outcome.cost_usd)
    return min(1.0, max(-1.0, worth))


@dataclass(frozen=True)
class Selection:
    """The decisions of a log that can test a policy.

    records: in the order of their decisions.
    left_out: number of the other decisions, by the reason.
    """

    records: list[Record]
    left_out: dict[str, int]


def evaluable(records: Sequence[Record], after: int = -1) -> list[Record]:
    """The records of `select`."""
    return select(records, after).records


def select(records: Sequence[Record], after: int = -1) -> Selection:
    """Select the decisions whose arm was drawn with the logged propensities.

    If answers were sampled for a judge, only these decisions are selected: their rate is known and does not depend on
    the answer, and outside of the sample the best estimate is served. A decision whose request was answered by a hedge
    has the outcome and the scores of its request.

    Args:
        records: of any kind.
        after: sequence of the last decision that the evaluated policies have learned from. Records up to it are left
            out, because they cannot test these policies.
    """
    left_out: Counter[str] = Counter()
    kept = []
    for record in _with_hedges(records):
        reason = _unusable(record.decision, after)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(record)
    sample = scored_sample(kept)
    if sample is not None:
        left_out[OUTSIDE] += len(kept) - len(sample)
        kept = sample
    kept.sort(key=lambda record: record.decision.sequence)
    return Selection(kept, {reason: n for reason, n in left_out.items() if n})


def _unusable(decision: Decision, after: int) -> str:
    """Why a decision cannot be evaluated; "" if it can be."""
    if not decision.arm:
        return "no arm was eligible"
    if decision.fallback == FORCED:
        return "the client chose the model"
    if decision.fallback == CALIBRATION:
        return "a calibration"
    if (
        decision.fallback == PAIR
    ):  # drawn among the arms that did not give the first answer
        return "a second answer in the background"
    if decision.fallback in NOT_DRAWN:
        return "a second attempt"
    if decision.sequence <= after:
        return "the policies have learned from it"
    if decision.score_chance <= 0:  # without a score nothing was explored
        return OUTSIDE
    total = sum(e.propensity for e in decision.estimates)
    if abs(total - 1) >= 1e-3 or not decision.estimate().propensity > 0:
        return "no propensities"
    others = [e for e in decision.estimates if e.arm != decision.arm]
    if all(e.removed_by for e in others):
        return "no other arm was eligible"
    return ""


def scored_sample(records: Sequence[Record]) -> list[Record] | None:
    """The records whose answer was known to be scored before the arm was chosen; None if there is no such sample.

    There is one if most unflawed answers with a `score_chance` of 1 were scored. Otherwise the chance is that of new
    API keys, which are taken to score until they show that they do not (scoring_rates.py).
    """
    sample = [record for record in records if record.decision.score_chance >= 1.0]
    answers = [record for record in sample if is_unflawed(record)]
    scored = sum(record.vote is not None for record in answers)
    if len(answers) < MIN_SAMPLE or scored < MIN_SCORED * len(answers):
        return None
    return sample


def _with_hedges(records: Sequence[Record]) -> list[Record]:
    """The records, in which a decision that lost to its hedge has what its request got."""
    hedges = {
        record.decision.retry_of: record
        for record in records
        if record.decision.fallback == HEDGE
    }
    return [
        answered_by_hedge(record, hedges.get(record.decision.id)) for record in records
    ]


def answered_by_hedge(first: Record, hedge: Record | None) -> Record:
    """The record of a request's first decision, with the answer of its hedge if the hedge answered."""
    if hedge is None or hedge.outcome is None or first.outcome is None:
        return first
    if first.outcome.status != "disconnected":
        return first
    later_s = max(0.0, hedge.decision.time_s - first.decision.time_s)
    answer = hedge.outcome
    outcome = structs.replace(
        answer,
        decision_id=first.decision.id,
        ttft_s=answer.ttft_s + later_s if answer.ttft_s > 0 else 0.0,
        latency_s=answer.latency_s + later_s,
    )
    return replace(
        hedge,
        decision=first.decision,
        outcome=outcome,
        answered_by=hedge.decision.arm,
    )


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
    value: Callable[[Decision, ArmEstimate], float],
) -> Vector:
    column = {name: k for k, name in enumerate(arms)}
    table = np.zeros((len(decisions), len(arms)))
    for row, decision in zip(table, decisions, strict=True):
        for e in decision.estimates:
            if e.arm in column:
                row[column[e.arm]] = value(decision, e)
    return table


def to_log(
    records: Sequence[Record], arms: Sequence[str], reward: Reward = utility
) -> LoggedDecisions:
    """The arrays of these records, which must be `evaluable`.

    The predictions are those of the policy that decided: it made them before the reward was known. An answer with a
    visible flaw always has a reward; the feedback rate of the other answers is estimated by arm and kind.

    Args:
        records: N records.
        arms: K names, as from `arms_of`.
        reward: `utility`, `score`, or another function with values in [-1, 1] or NaN.
    """
    decisions = [record.decision for record in records]
    column = {name: k for k, name in enumerate(arms)}
    kinds: dict[str, int] = {}
    for decision in decisions:
        kinds.setdefault(decision.profile.kind, len(kinds))
    propensities = _table(decisions, arms, lambda _, e: e.propensity)
    propensities /= np.maximum(propensities.sum(axis=1, keepdims=True), 1e-12)
    predictions = _table(
        decisions, arms, _PREDICTIONS.get(reward, Decision.expected_reward)
    )
    answers = [_expected_answer(record, reward) for record in records]
    return LoggedDecisions(
        chosen=np.array([column[d.arm] for d in decisions], dtype=np.int64),
        propensities=propensities,
        rewards=np.array([reward(record) for record in records], dtype=np.float64),
        predictions=predictions if predictions.any() else None,
        bounds=(0.0, 1.0) if reward is score else (-1.0, 1.0),
        kinds=np.array([kinds[d.profile.kind] for d in decisions], dtype=np.int64),
        always_seen=np.array([r.flaw != "" for r in records], dtype=np.bool_),
        answers=np.array(answers) if predictions.any() else None,
        answered_by=np.array(
            [column.get(r.answered_by, column[r.decision.arm]) for r in records],
            dtype=np.int64,
        ),
    )


def _quality_of(decision: Decision, estimate: ArmEstimate) -> float:
    return estimate.quality


_PREDICTIONS: dict[Reward, Callable[[Decision, ArmEstimate], float]] = {
    score: _quality_of
}


def _expected_answer(record: Record, reward: Reward) -> float:
    """The reward that the policy expected of an unflawed answer, with the latency and the cost that it had.

    A hedge's answer has the expectation of the hedge's arm at the first decision.
    """
    expected = record.decision.estimate(record.answered_by)
    quality = min(1.0, max(0.0, expected.unflawed_quality))
    if reward is score:
        return quality
    outcome = record.outcome
    if outcome is None or outcome.status != "ok":
        return record.decision.expected_reward(expected)
    worth = record.decision.objective.utility(
        quality, outcome.latency_s, outcome.cost_usd
    )
    return min(1.0, max(-1.0, worth))


def target_probabilities(
    records: Sequence[Record],
    policy: Policy,
    arms: Sequence[str],
    chance: float | None = None,
) -> Vector:
    """[N, K] probabilities with which a policy, as it is now, would have chosen each arm at each of these decisions.

    The policy decides under the logged load, waiting times and health, and learns nothing. A row is all 0 if the
    request's limits exclude every arm.

    Args:
        records: N records.
        policy: over some or all of the arms.
        arms: K names, as from `arms_of`.
        chance: the requests' chance to be scored; None uses what was logged.
    """
    alike: dict[tuple[tuple[str, ModelState], ...], list[int]] = defaultdict(list)
    for n, record in enumerate(records):
        alike[_states(record.decision, policy.arms)].append(n)
    rng = np.random.default_rng(0)
    table = np.zeros((len(records), len(arms)))
    for states, rows in alike.items():
        decisions = [records[n].decision for n in rows]
        requests = [
            Request(
                d.id,
                d.profile,
                d.objective,
                score_chance=d.score_chance if chance is None else chance,
                explore=d.explore,
            )
            for d in decisions
        ]
        # At sequence 0 nothing is forgotten, so the policy stays as it is.
        table[rows] = _table(
            policy.decide(requests, dict(states), rng, 0),
            arms,
            lambda _, e: e.propensity,
        )
    total = table.sum(axis=1, keepdims=True)
    return np.asarray(
        np.divide(table, total, out=np.zeros_like(table), where=total > 0)
    )


def policy_distance(one: Vector, other: Vector) -> float:
    """The distance of two policies: the mean total variation between their probabilities, both [N, K]."""
    return float(0.5 * np.abs(one - other).sum(axis=1).mean())


def _states(
    decision: Decision, arms: Sequence[Arm]
) -> tuple[tuple[str, ModelState], ...]:
    """The live states at a decision, from the log.

    A policy takes the load of all arms from the states (constraints.total_load). The logged loads are per replica, so
    one more state, which is no arm's, holds the rest.

    Args:
        decision: from the log.
        arms: of the policy that decides again.
    """
    needs = frozenset(decision.profile.needs)
    prompt_tokens = decision.profile.prompt_tokens
    states = []
    for e in decision.estimates:
        taken = work(prompt_tokens, e.output_tokens)
        price = decision.scarcity(e) / taken if taken > 0.0 else 0.0
        states.append((e.arm, _state(e, needs, price)))
    total = max((e.total_load for e in decision.estimates), default=0.0)
    rest = total - total_load(arms, dict(states))
    return (*states, ("", ModelState(in_flight=rest)))


def _state(
    estimate: ArmEstimate, needs: frozenset[str] = frozenset(), price: float = 0.0
) -> ModelState:
    """An arm's live state at a decision, from the log: one replica with the load per replica.

    The wait in the queue is the expected latency less that of the tokens; less than 1 µs is a rounding error. An arm
    that lacked a capability lacks all that the request needs.
    """
    reason = Exclusion.of(estimate.removed_by)
    answer_s = estimate.answer_s
    return ModelState(
        in_flight=estimate.load,
        healthy=reason is not Exclusion.NO_REPLICA,
        wait_s=max(0.0, round(estimate.latency_s - answer_s, 6)),
        lacks=needs if reason is Exclusion.CAPABILITY else frozenset(),
        price=price,
    )
