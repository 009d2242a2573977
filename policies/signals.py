"""What an answer says of its own quality, where nobody has scored it yet. No news is no score.

error: the policy itself learns it as an answer worth nothing. disconnected: says nothing, the client may have had
enough. An empty answer, or one that is no JSON where JSON was asked for, is wrong for certain: a 0 of the source
"check". An answer cut off although the client set no limit is unfinished, yet may have been right: a 0 of the source
"implicit", which weighs little and gives way to any other score (ledger.py).
"""

from policies.ledger import ANYBODY, IMPLICIT
from policies.types import FLAWS, Decision, Feedback, Outcome

CHECK = "check"


def implied(decision: Decision, outcome: Outcome, time_s: float) -> Feedback | None:
    """The score that an outcome implies, or None.

    Args:
        decision: that led to it.
        outcome: what came of it.
        time_s: seconds since the epoch, now.
    """
    if outcome.status != "ok" or decision.profile.task == "embed":
        return None
    if outcome.flaw in FLAWS:
        return Feedback(decision.id, 0.0, CHECK, time_s, ANYBODY)
    if outcome.finish_reason == "length" and not decision.profile.max_output_tokens:
        return Feedback(decision.id, 0.0, IMPLICIT, time_s, ANYBODY)
    return None
