"""Tells a decision as a story of at most ten lines, of which each says one thing.

The lines say what was seen in the request, who was eligible, what each arm was worth, how likely the choice was, and
what came of it. All numbers of the policy are those that decided; the profiler's own forecast has one phrase.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from policies.evaluation.kind_figures import Figures
from policies.events import (
    CALIBRATION,
    CUT_OFF,
    FORCED,
    PAIR,
    ArmEstimate,
    Decision,
    Outcome,
    Record,
)
from policies.profiling.forecast import SUFFICIENT
from policies.worth import (
    Worth,
    dollars,
    is_estimated,
    probability,
    seconds,
    worths,
)

LINES = 10  # the longest story
SHOWN = 4  # lines for the worth of arms; the last one has all arms that are left
FALLBACKS = {  # Decision.fallback in words
    "profiler": "The profiler did not answer in time; the text was read without its embedding.",
    "router": "The router did not answer in time; the ingress decided on its last snapshot of the policy.",
    "model": "This is a second try: the model that was chosen first failed before its answer began.",
    "hedge": "This is a second try: the model that was chosen first was silent for too long, and another was asked.",
    PAIR: "No client got this answer: it is a second answer to a client's request, in the background, to be graded.",
}
ENDINGS = {  # Outcome.status in words
    "ok": "an answer after {}",
    "error": "the model failed after {}",
    "disconnected": "the client left after {}",
    "rejected": "the model refused the request after {}",
}
FLAWS = {  # visible_flaw in words
    "empty": "the answer was empty",
    "invalid_json": "the answer was no valid JSON",
    CUT_OFF: "the answer was cut off at the model's own limit",
}


def iso_time(time_s: float) -> str:
    """Seconds since the epoch as ISO 8601, in UTC."""
    moment = datetime.fromtimestamp(time_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def story(
    record: Record,
    of_kind: Mapping[str, Figures] | None = None,
    other: Record | None = None,
) -> list[str]:
    """The lines of the story.

    Args:
        record: of the decision.
        of_kind: what the latest decisions of this kind show of each arm now.
        other: of the other decision of a pair, if there is one.
    """
    decision = record.decision
    before = [*_beginning(decision), _seen(decision)]
    if decision.fallback in (FORCED, CALIBRATION):
        # nothing was chosen
        known = []
        if of_kind is not None and decision.profile.task != "embed":
            known = [_of_kind(decision, of_kind)]
        return [*before, *known, _came(record)]
    found = worths(decision, _estimates(decision), of_kind)
    before.append(_eligible(found))
    after = [
        _chosen(decision),
        *_beside_rule(decision),
        *_pair(decision, other),
        _came(record),
    ]
    room = LINES - len(before) - len(after)
    return [*before, *_table(decision, found, min(SHOWN, room)), *after]


def _beginning(decision: Decision) -> list[str]:
    """What is special about the decision; nothing for most of them."""
    if decision.fallback == FORCED:
        if decision.profile.task == "embed":
            return [
                f"The client named the model {decision.arm}, or sent `auto` a text to embed, which always goes to the "
                "same model; the router did not choose."
            ]
        return [
            f"The client named the model {decision.arm}; the router did not choose."
        ]
    if decision.fallback == CALIBRATION:
        return [
            f"No client asked: {decision.arm} answered a calibration prompt, as each size does."
        ]
    if not decision.fallback:
        return []
    words = FALLBACKS.get(
        decision.fallback, f"Another way was taken: {decision.fallback}."
    )
    if decision.retry_of:
        words += f" The first try was the decision {decision.retry_of}."
    return [words]


def _seen(decision: Decision) -> str:
    """What was seen in the request."""
    profile = decision.profile
    at = f" at {iso_time(decision.time_s)}" if decision.time_s else ""
    if profile.task == "embed":
        return f"Seen{at}: text to embed, {_tokens(profile.prompt_tokens)}."
    found = "; ".join(profile.reasons) or f"kind '{profile.kind}'"
    limit = profile.max_output_tokens
    return (
        f"Seen{at}: a {profile.task} request of {_tokens(profile.prompt_tokens)}"
        + (f", at most {limit} for the answer" if limit else "")
        + f": {found}; complexity {profile.complexity:.2f} of 1.{_weights(decision)}"
    )


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count != 1 else ''}"


def _weights(decision: Decision) -> str:
    """What time and money cost in score points; nothing where neither counts or nothing was chosen."""
    objective = decision.objective
    if decision.fallback in (FORCED, CALIBRATION):
        return ""
    parts = []
    if objective.latency_weight:
        parts.append(f"a second costs {objective.latency_weight:.3g} score points")
    if objective.cost_weight:
        budget = ""
        if decision.paced_weight > 0:
            budget = f", {decision.paced_weight:.4g} of them by the budget"
        parts.append(f"a dollar {objective.cost_weight:.4g}{budget}")
    return f" Here {' and '.join(parts)}." if parts else ""


def _estimates(decision: Decision) -> Sequence[ArmEstimate]:
    """The estimates of the policy: of the one that is tried, if a rule decided."""
    return decision.shadow_estimates or decision.estimates


def _eligible(found: Sequence[Worth]) -> str:
    """Who was eligible, and why the others were not."""
    eligible = [row.arm for row in found if not row.removed_by]
    removed = [f"{row.arm} ({row.removed_by})" for row in found if row.removed_by]
    line = f"Eligible: {', '.join(eligible) or 'no model'}."
    return line + (f" Not considered: {', '.join(removed)}." if removed else "")


def _table(decision: Decision, found: Sequence[Worth], room: int) -> list[str]:
    """A line for the chosen arm and for those that were worth most, and one line for all that are left.

    Args:
        decision: the decision.
        found: the worth of each arm.
        room: number of lines, at least 2.
    """
    rows = [row for row in found if row.worth is not None and not row.removed_by]
    rows.sort(key=lambda row: (row.arm != decision.arm, -(row.worth or 0.0)))
    if not rows:
        return []
    left = rows[room - 1 :] if len(rows) > room else []
    lines = [
        f"{row.arm}: {_in_full(row)}{_count(row, decision, row is rows[0])}."
        for row in rows[: len(rows) - len(left)]
    ]
    if decision.shadow_estimates:
        lines[0] = f"As the policy beside the rule sees it, {lines[0]}"
    if left:
        others = ", ".join(
            f"{row.arm} {row.worth:.3f}{_count(row, decision)}" for row in left
        )
        lines.append(f"Worth of the others: {others}.")
    return lines


def _in_full(row: Worth) -> str:
    """The worth of an arm with its parts; a price that is 0 is left out."""
    made = row.made
    busy = f" with {made.load:.3g} in flight" if made.load >= 0.5 else ""
    scarce = ""
    if row.scarcity:
        scarce = f" - scarcity {row.scarcity:.3f} (many requests want it)"
    drawn = f", drawn {row.drawn:.3f}" if row.differs else ""
    return (
        f"worth {row.worth:.3f} = quality {row.quality:.3f} - time {row.time:.3f} ({seconds(made.latency_s)}{busy}) "
        f"- money {row.money:.3f} ({dollars(made.cost_usd)}){scarce}{drawn}"
    )


def _count(row: Worth, decision: Decision, in_full: bool = False) -> str:
    """The number of scored answers behind the quality of an arm."""
    if row.scored_answers is not None:
        unit = " scored answers of this kind by now" if in_full else ""
        return f" (n = {row.scored_answers}{unit})"
    if row.arm == decision.arm and decision.known >= 0:
        return f" (n = {decision.known} scores of all kinds)"
    return ""


def _of_kind(decision: Decision, of_kind: Mapping[str, Figures]) -> str:
    """What the latest decisions of this kind show of the arm that answered and of the others."""
    kind = decision.profile.kind
    arms = dict.fromkeys([decision.arm, *(e.arm for e in decision.estimates)])
    parts = [
        f"{arm} {_figures(of_kind[arm])}"
        for arm in arms
        if arm in of_kind and of_kind[arm].decisions
    ]
    if not parts:
        return f"No decision of the kind '{kind}' is in the window."
    return f"The latest answers of the kind '{kind}' show: {'; '.join(parts)}."


def _figures(figures: Figures) -> str:
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
        parts.append(f"median {seconds(figures.latency_p50_s)}")
    return ", ".join(parts)


def _chosen(decision: Decision) -> str:
    """How likely the choice was, and what decided it."""
    chosen = decision.estimate()
    if not decision.arm:
        return "No model was chosen."
    if decision.shadow_estimates or not is_estimated(chosen):
        rule = decision.policy_version
        return f"{decision.arm} was chosen by the rule '{rule}'."
    chance = probability(chosen.propensity)
    line = f"{decision.arm} was chosen with probability {chance} by {decision.policy_version}"
    eligible = [e for e in decision.estimates if not e.removed_by]
    if len(eligible) == 1:
        return f"{line}: there was no other model."
    if not chosen.sampled_utility:
        return f"{line}."
    # the draws and the means may differ by less than what is shown
    rows = worths(decision, eligible)
    differ = any(row.differs for row in rows)
    beaten = any(e.sampled_utility > chosen.sampled_utility for e in eligible)
    if beaten:
        reason = (
            "tried by chance (least_propensity), though the largest draw was another's"
        )
        if decision.explore:
            reason += f"; of the requests that will be graded, {decision.explore:.0%} go to a model by chance"
    elif differ:
        reason = (
            "the largest draw. `drawn` is one sample of what the worth may be, from what is known so far (Thompson "
            "sampling)"
        )
        if 0.0 < decision.score_chance < 1.0:
            share = probability(decision.score_chance)
            reason += f"; an answer is scored with probability {share}, and `drawn` is the nearer the lower that is"
    else:
        reason = "the largest mean; no draw differs from its mean"
    return f"{line}: {reason}.{_profiler(decision, chosen)}"


def _profiler(decision: Decision, chosen: ArmEstimate) -> str:
    """How the profiler's own forecast differs, in one phrase; nothing if it has learned nothing yet."""
    profile = decision.profile
    chance = profile.sufficiency.get(decision.arm)
    if chance is None or not profile.profiler_version:
        return ""
    return (
        f" (The profiler's own forecast, which decides nothing: {profile.expected_output_tokens:.0f} tokens instead of "
        f"{chosen.output_tokens:.0f}, a chance of {chance:.2f} of a score of at least {SUFFICIENT:g}.)"
    )


def _beside_rule(decision: Decision) -> list[str]:
    """What the rule and the policy that is tried beside it would have done."""
    if not decision.rule:
        return []
    acted = "the rule" if decision.shadow_estimates else "the policy"
    line = f"This decision was that of {acted}"
    if not decision.shadow:
        return [f"{line}; the policy would have chosen no model."]
    if decision.rule == decision.shadow:
        return [f"{line}; rule and policy both choose {decision.rule}."]
    own = decision.tried_estimate(decision.shadow)
    other = decision.tried_estimate(decision.rule)
    line += f". The rule chooses {decision.rule}, the policy {decision.shadow}"
    if not (is_estimated(own) and is_estimated(other)):
        return [f"{line}; it made no estimate of both."]
    return [
        f"{line}: by its own estimates score {own.quality:.2f} instead of {other.quality:.2f}, "
        f"{seconds(own.latency_s)} instead of {seconds(other.latency_s)}, {dollars(own.cost_usd)} instead of "
        f"{dollars(other.cost_usd)}."
    ]


def _pair(decision: Decision, other: Record | None) -> list[str]:
    """The other answer of a pair."""
    if not decision.pair:
        return []
    if decision.fallback == PAIR:
        first = f" by {other.decision.arm}" if other else ""
        return [
            f"The client got the first answer{first}, of the decision {decision.pair}."
        ]
    line = "It was served without exploration, because "
    if other is None:
        return [f"{line}a second answer was planned; so far there is no second answer."]
    return [
        f"{line}{other.decision.arm} gave a second answer in the background, with the decision {decision.pair}; the "
        "judge grades both."
    ]


def _came(record: Record) -> str:
    """What came of the decision: the answer and its scores."""
    outcome = record.outcome
    if outcome is None:
        return "The answer is not complete yet."
    ending = ENDINGS.get(outcome.status, f"{outcome.status} after {{}}")
    parts = [ending.format(seconds(outcome.latency_s)) + _timing(outcome)]
    if outcome.output_tokens:
        parts.append(f"{_tokens(outcome.output_tokens)}, {dollars(outcome.cost_usd)}")
    if record.flaw in FLAWS:
        parts.append(FLAWS[record.flaw])
    return f"Came of it: {'; '.join([*parts, _score(record)])}."


def _timing(outcome: Outcome) -> str:
    """When the first token came, and how long the request waited."""
    parts = []
    if outcome.ttft_s:
        parts.append(f"the first token after {seconds(outcome.ttft_s)}")
    if outcome.waited_s >= 0.01:
        parts.append(f"{seconds(outcome.waited_s)} of it in the queue")
    return f" ({', '.join(parts)})" if parts else ""


def _score(record: Record) -> str:
    """The score, and what the answer was worth by it."""
    score = record.mean_score
    outcome = record.outcome
    if score is None:
        if record.given_scores():
            return "its scores do not count, because the keys that gave them are not trusted"
        return "no score yet"
    sources = ", ".join(record.explicit_scores())
    line = f"score {score:.2f} by {sources}"
    objective = record.decision.objective
    if outcome is None or not (objective.latency_weight or objective.cost_weight):
        return line
    worth = objective.utility(score, outcome.latency_s, outcome.cost_usd)
    return f"{line}, so it was worth {worth:.3f}"
