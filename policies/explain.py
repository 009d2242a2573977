"""Explains a decision in words and numbers."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from msgspec import structs

from policies.evaluation.kind_figures import Figures
from policies.events import CALIBRATION, FORCED, PAIR, Decision, Record
from policies.profiling.forecast import SUFFICIENT

FALLBACKS = {  # Decision.fallback in words
    "profiler": "The profiler did not answer in time; the text was read without its embedding.",
    "router": "The router did not answer in time; the ingress decided on its last snapshot of the policy.",
    "model": "This is a second try: the model that was chosen first failed before its answer began.",
    "hedge": "This is a second try: the model that was chosen first was silent for too long, and another was asked.",
}


def explain(
    record: Record,
    of_kind: Mapping[str, Figures] | None = None,
    other: Record | None = None,
) -> dict[str, Any]:
    """The reasons for a decision, the estimate of each arm, the outcome and the feedback, as plain data.

    Args:
        record: of the decision.
        of_kind: what the latest decisions of this kind show of each arm now; the decision may not have known it.
        other: of the other decision of a pair, if there is one.
    """
    decision = record.decision
    profile = asdict(decision.profile)
    profile["features"] = [
        round(float(value), 4) for value in decision.profile.features
    ]
    limits = {
        "max_latency_s": decision.objective.max_latency_s,
        "max_cost_usd": decision.objective.max_cost_usd,
        "models": list(decision.objective.models),
    }
    explained: dict[str, Any] = {
        "decision_id": decision.id,
        "model": decision.arm,
        "policy_version": decision.policy_version,
        "time_s": decision.time_s,
        "sequence": decision.sequence,
        "fallback": decision.fallback or "none",
        "summary": summary(decision),
        "profile": profile,
        "objective": {
            "latency_weight": decision.objective.latency_weight,
            "cost_weight": decision.objective.cost_weight,
            **{
                key: value
                for key, value in limits.items()
                if value not in (float("inf"), [])
            },
        },
        "models": [estimate._asdict() for estimate in decision.estimates],
        "outcome": structs.asdict(record.outcome) if record.outcome else None,
        "feedback": [
            {"source": source, "score": score}
            for source, score in record.scores.items()
        ],
    }
    if of_kind is not None:
        explained["figures_of_kind"] = {
            arm: asdict(figures) for arm, figures in of_kind.items()
        }
        explained["summary"] += " " + kind_summary(decision, of_kind)
    if decision.pair:
        explained["pair"] = _pair(decision, other)
        explained["summary"] += " " + _pair_summary(decision, other)
    if decision.rule and decision.fallback != FORCED:
        explained["first_day"] = _first_day(decision)
    return explained


def _pair(decision: Decision, other: Record | None) -> dict[str, Any]:
    """The other decision of a pair: its id, its arm and its scores; None where there is no such decision."""
    return {
        "this_answer": "second" if decision.fallback == PAIR else "first",
        "other_decision_id": decision.pair if other else None,
        "other_model": other.decision.arm if other else None,
        "other_score": other.mean_score if other else None,
    }


def _pair_summary(decision: Decision, other: Record | None) -> str:
    """The other answer of a pair in one sentence."""
    if decision.fallback == PAIR:
        first = f" by {other.decision.arm}" if other else ""
        return (
            f"The client got the first answer{first}, of the decision {decision.pair}."
        )
    if other is None:
        return (
            "It was served without exploration, because a second answer was planned; so far there is no second "
            "answer."
        )
    return (
        f"It was served without exploration, because {other.decision.arm} gave a second answer in the background, "
        f"with the decision {decision.pair}; the judge grades both."
    )


def kind_summary(decision: Decision, of_kind: Mapping[str, Figures]) -> str:
    """What the latest decisions of this kind show of the chosen arm and of the others, in one sentence."""
    arms = dict.fromkeys([decision.arm, *(e.arm for e in decision.estimates)])
    parts = [
        f"{arm} {_in_words(of_kind[arm])}"
        for arm in arms
        if arm in of_kind and of_kind[arm].decisions
    ]
    if not parts:
        return f"No decision of the kind '{decision.profile.kind}' is in the window."
    return f"The latest answers of the kind '{decision.profile.kind}' show: {'; '.join(parts)}."


def _in_words(figures: Figures) -> str:
    """The figures of one arm in words, each mean with its number of observations."""
    score = "no score yet"
    if figures.score is not None:
        score = (
            f"mean score {figures.score:.2f} [{figures.score_low:.2f}, {figures.score_high:.2f}] "
            f"of {figures.votes} scored"
        )
    if figures.availability is None:
        return f"{score}, no answer yet"
    parts = [score, f"{figures.availability:.1%} of {figures.answers} without a flaw"]
    if figures.latency_p50_s is not None:
        parts.append(f"median {figures.latency_p50_s:.3f} s")
    return ", ".join(parts)


def _first_day(decision: Decision) -> dict[str, Any]:
    """What the rule and the policy that is tried beside it chose, and what that policy expected of both choices.

    An expected value is None if the policy had no estimate.
    """
    choices = {"rule": decision.rule, "policy": decision.shadow}
    plain: dict[str, Any] = {
        **choices,
        "decided_by": "rule" if decision.shadow_estimates else "policy",
        "basis": "estimates of the policy itself",
        "models": [estimate._asdict() for estimate in decision.shadow_estimates],
    }
    for name, arm in choices.items():
        expected = decision.tried_estimate(arm)
        known = bool(expected.utility or expected.latency_s)
        plain[f"expected_of_{name}"] = {
            "score": expected.quality if known else None,
            "latency_s": expected.latency_s if known else None,
            "cost_usd": expected.cost_usd if known else None,
            "utility": expected.utility if known else None,
        }
    return plain


def summary(decision: Decision) -> str:
    """The decision as a few sentences."""
    profile = decision.profile
    chosen = decision.estimate()
    sentences = [
        f"A {profile.task} request of {profile.prompt_tokens} tokens, complexity {profile.complexity:.2f}, "
        f"sensitivity to accuracy {profile.accuracy_sensitivity:.2f} and to time {profile.time_sensitivity:.2f}"
        f" ({'; '.join(profile.reasons)})."
    ]
    if profile.sufficiency:
        chances = ", ".join(
            f"{arm} {chance:.2f}" for arm, chance in profile.sufficiency.items()
        )
        sentences.append(
            f"The profiler, version {profile.profiler_version}, expected {profile.expected_output_tokens:.0f} output "
            f"tokens; chance that an answer suffices: {chances}."
        )
        if decision.fallback not in (FORCED, CALIBRATION):
            sentences.append(_two_models_of_quality())
    if decision.fallback == FORCED:
        return " ".join(
            [
                *sentences,
                f"The client named the model {decision.arm}; the router did not choose.",
            ]
        )
    if decision.fallback == CALIBRATION:
        return " ".join(
            [
                *sentences,
                f"No client asked: {decision.arm} answered a calibration prompt, as each size does.",
            ]
        )
    if decision.fallback == PAIR:
        sentences.append(
            "No client got this answer: it is a second answer to a client's request, given in the background to be "
            "graded."
        )
    elif decision.fallback:
        sentences.append(
            FALLBACKS.get(
                decision.fallback, f"Another way was taken: {decision.fallback}."
            )
        )
    if chosen.utility or chosen.latency_s:
        sentences.append(
            f"{decision.arm} was chosen with probability {chosen.propensity:.2f} by {decision.policy_version}: "
            f"expected score {chosen.quality:.2f}, {chosen.latency_s:.3f} s, {chosen.cost_usd:.2g} USD, "
            f"at {chosen.load:g} requests in flight a replica; utility {chosen.utility:.3f}, "
            f"drawn {chosen.sampled_utility:.3f}."
        )
        drawn = [
            e
            for e in decision.estimates
            if not e.removed_by and e.sampled_utility > chosen.sampled_utility
        ]
        if drawn and chosen.sampled_utility:
            sentences.append(
                "It was tried by chance (least_propensity), though the largest draw was another's."
            )
    else:
        sentences.append(
            f"{decision.arm} was chosen by the rule '{decision.policy_version}'."
        )
    if decision.rule:
        sentences.append(_beside_rule(decision))
    for other in sorted(decision.estimates, key=lambda e: -e.sampled_utility):
        if other.arm == decision.arm:
            continue
        if other.removed_by:
            sentences.append(f"{other.arm} was not considered: {other.removed_by}.")
        elif other.utility or other.latency_s:
            sentences.append(
                f"{other.arm} came to {other.sampled_utility:.3f}: expected score {other.quality:.2f}, "
                f"{other.latency_s:.3f} s at {other.load:g} in flight, {other.cost_usd:.2g} USD."
            )
    return " ".join(sentences)


def _two_models_of_quality() -> str:
    """How the profiler's forecast and the policy's expectation differ, as a sentence."""
    return (
        f"That chance is of a score of at least {SUFFICIENT:g}, fitted now and then on the journal; the expected score "
        "is the policy's mean, which each score changes, and the decision used it alone."
    )


def _beside_rule(decision: Decision) -> str:
    """What the rule and the policy that is tried beside it would have done, as a sentence."""
    own = decision.tried_estimate(decision.shadow)
    other = decision.tried_estimate(decision.rule)
    acted = "the rule" if decision.shadow_estimates else "the policy"
    if not decision.shadow:
        return (
            f"This decision was that of {acted}; the policy would have chosen no model."
        )
    if decision.rule == decision.shadow:
        return f"This decision was that of {acted}; rule and policy both choose {decision.rule}."
    return (
        f"This decision was that of {acted}. The rule chooses {decision.rule}, the policy {decision.shadow}: by "
        f"its own estimates score {own.quality:.2f} instead of {other.quality:.2f}, {own.latency_s:.3f} s instead of "
        f"{other.latency_s:.3f} s, {own.cost_usd:.2g} USD instead of {other.cost_usd:.2g} USD."
    )
