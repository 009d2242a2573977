"""Implicit feedback: scores that follow from the answer alone. An answer that shows no defect gets no score.

An error gets no feedback here, because the policy itself learns it as a score of 0. A disconnected client gives none
either: it may have read enough. An empty answer, or an answer that is not JSON although JSON was requested, is
certainly wrong: it gets a 0 from the source "check". An answer that was cut off although the client set no limit is
unfinished and may have been right: it gets a 0 from the source "implicit", which has a small weight and which any
other score replaces (decision_records.py).
"""

from policies.events import ANY_OWNER, FLAWS, IMPLICIT, Decision, Feedback, Outcome

CHECK = "check"


def implicit_feedback(
    decision: Decision, outcome: Outcome, time_s: float
) -> Feedback | None:
    """The feedback that an outcome implies, or None.

    Args:
        decision: the decision of the outcome.
        outcome: the measurements of the answer.
        time_s: current time, in seconds since the epoch.
    """
    if outcome.status != "ok" or decision.profile.task == "embed":
        return None
    if outcome.flaw in FLAWS:
        return Feedback(decision.id, 0.0, CHECK, time_s, ANY_OWNER)
    if outcome.finish_reason == "length" and not decision.profile.max_output_tokens:
        return Feedback(decision.id, 0.0, IMPLICIT, time_s, ANY_OWNER)
    return None
