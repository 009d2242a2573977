"""Explains a decision in words and numbers."""

from dataclasses import asdict
from typing import Any

from msgspec import structs

from policies.events import FORCED, Decision, Record

FALLBACKS = {  # Decision.fallback in words
    "profiler": "The profiler did not answer in time; the text was read without its embedding.",
    "router": "The router did not answer in time; the ingress decided on its last snapshot of the policy.",
    "model": "This is a second try: the model that was chosen first failed before its answer began.",
    "hedge": "This is a second try: the model that was chosen first was silent for too long, and another was asked.",
}


def explain(record: Record) -> dict[str, Any]:
    """The reasons for a decision, the estimate of each arm, the outcome and the feedback, as plain data."""
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
    return {
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
    if decision.fallback == FORCED:
        return " ".join(
            [
                *sentences,
                f"The client named the model {decision.arm}; the router did not choose.",
            ]
        )
    if decision.fallback:
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
