"""Explains a decision in words and numbers."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from msgspec import structs

from policies.evaluation.kind_figures import Figures
from policies.events import FORCED, PAIR, Decision, Outcome, Record
from policies.profiling.features import names_of
from policies.story import iso_time, story
from policies.types import TaskProfile
from policies.worth import is_estimated, rounded, worths

FEATURE_PLACES = 4


def explain(
    record: Record,
    of_kind: Mapping[str, Figures] | None = None,
    other: Record | None = None,
) -> dict[str, Any]:
    """The reasons for a decision, the worth of each arm, the outcome and the feedback, as plain data.

    `story` has at most ten lines, and `summary` is the same as one text.

    Args:
        record: of the decision.
        of_kind: what the latest decisions of this kind show of each arm now; the decision may not have known it.
        other: of the other decision of a pair, if there is one.
    """
    decision = record.decision
    lines = story(record, of_kind, other)
    explained: dict[str, Any] = {
        "decision_id": decision.id,
        "model": decision.arm,
        "policy_version": decision.policy_version,
        "time": iso_time(decision.time_s),
        "time_s": round(decision.time_s, 3),
        "sequence": decision.sequence,
        "fallback": decision.fallback or "none",
        "score_chance": rounded(decision.score_chance),
        "story": lines,
        "summary": "\n".join(lines),
        "models": [
            worth.plain() for worth in worths(decision, decision.estimates, of_kind)
        ],
        "objective": _objective(decision),
        "outcome": _outcome(record.outcome) if record.outcome else None,
        "feedback": [
            {"source": source, "score": score}
            for source, score in record.scores.items()
        ],
        "profile": _profile(decision.profile),
    }
    if of_kind is not None:
        explained["figures_of_kind"] = {
            arm: _figures(figures) for arm, figures in of_kind.items()
        }
    if decision.pair:
        explained["pair"] = _pair(decision, other)
    if decision.rule and decision.fallback != FORCED:
        explained["first_day"] = _first_day(decision)
    return explained


def _rounded(plain: dict[str, Any]) -> dict[str, Any]:
    """Plain data with rounded numbers; texts and whole numbers stay as they are."""
    return {
        name: rounded(value) if isinstance(value, float) else value
        for name, value in plain.items()
    }


def _figures(figures: Figures) -> dict[str, Any]:
    """The figures with rounded numbers, and the time of the latest answer as ISO 8601, too."""
    latest = figures.latest_s
    return _rounded(asdict(figures)) | {
        "latest": None if latest is None else iso_time(latest)
    }


def _profile(profile: TaskProfile) -> dict[str, Any]:
    """The profile with a name for each feature; features of 0 are left out."""
    plain = _rounded(asdict(profile))
    values = profile.features.tolist()
    plain["features"] = {
        name: round(value, FEATURE_PLACES)
        for name, value in zip(names_of(len(values)), values, strict=True)
        if round(value, FEATURE_PLACES)
    }
    plain["sufficiency"] = _rounded(dict(profile.sufficiency))
    return plain


def _objective(decision: Decision) -> dict[str, Any]:
    """The weights that decided, and the limits of the request."""
    objective = decision.objective
    plain: dict[str, Any] = {
        "latency_weight": rounded(objective.latency_weight),
        "cost_weight": rounded(objective.cost_weight),
    }
    if decision.paced_weight > 0:
        plain["cost_weight_of_budget"] = rounded(decision.paced_weight)
    limits = {
        "max_latency_s": objective.max_latency_s,
        "max_cost_usd": objective.max_cost_usd,
        "models": list(objective.models),
    }
    return plain | {
        key: value for key, value in limits.items() if value not in (float("inf"), [])
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """The outcome with rounded numbers, and the answer's text if it is stored."""
    return _rounded(structs.asdict(outcome))


def _pair(decision: Decision, other: Record | None) -> dict[str, Any]:
    """The other decision of a pair: its id, its arm and its scores; None where there is no such decision."""
    return {
        "this_answer": "second" if decision.fallback == PAIR else "first",
        "other_decision_id": decision.pair if other else None,
        "other_model": other.decision.arm if other else None,
        "other_score": other.mean_score if other else None,
    }


def _first_day(decision: Decision) -> dict[str, Any]:
    """What the rule and the policy that is tried beside it chose, and what that policy expected of both choices.

    An expected value is None if the policy had no estimate.
    """
    choices = {"rule": decision.rule, "policy": decision.shadow}
    plain: dict[str, Any] = {
        **choices,
        "decided_by": "rule" if decision.shadow_estimates else "policy",
        "basis": "estimates of the policy itself",
        "models": [
            worth.plain() for worth in worths(decision, decision.shadow_estimates)
        ],
    }
    for name, arm in choices.items():
        expected = decision.tried_estimate(arm)
        known = is_estimated(expected)
        plain[f"expected_of_{name}"] = {
            "score": rounded(expected.quality) if known else None,
            "latency_s": rounded(expected.latency_s) if known else None,
            "cost_usd": rounded(expected.cost_usd) if known else None,
            "utility": rounded(expected.utility) if known else None,
        }
    return plain
