"""The records of one decision, from the estimates to the scores."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from policies.types import Objective, Request, TaskProfile

FORCED = "forced"  # Decision.fallback of a choice that the client made
FLAWS = ("empty", "invalid_json")


class ArmEstimate(NamedTuple):
    """A policy's estimate of one arm at one decision.

    quality, latency_s, cost_usd, utility: expected values.
    sampled_utility: this decision's draw from the posterior.
    ttft_s, tpot_s: expected time from leaving the queue to the first token, and per further token.
    output_tokens: expected number.
    propensity: probability in [0, 1] with which this policy chooses the arm in this situation.
    load, total_load: requests in flight per replica of the arm, and over all arms.
    removed_by: the sentence for the limit that excluded the arm (constraints.Exclusion); empty if it was eligible.
    """

    arm: str
    quality: float = 0.0
    latency_s: float = 0.0
    cost_usd: float = 0.0
    utility: float = 0.0
    sampled_utility: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    output_tokens: float = 0.0
    propensity: float = 0.0
    load: float = 0.0
    total_load: float = 0.0
    removed_by: str = ""


class Decision(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The chosen arm, with all that is needed to learn from the decision, explain it and evaluate it later.

    sequence: number of decisions before this one; the forgetting clock.
    arm: empty if no arm was eligible.
    fallback: "" for none. "profiler" or "router": that component did not answer in time, so the decision was made
        without it. "model" or "hedge": a second attempt, because the first model failed or was silent for too long.
        FORCED: the client named the model.
    time_s: seconds since the epoch.
    prompt_hash, prompt: see Request.
    owner: of the request; only the same owner may give feedback.
    shadow: the arm that the shadow policy would have chosen (roles.py); "" without a shadow policy.
    known: number of scores of the chosen arm that the policy had learned from since the arm last changed; -1 if not
        recorded.
    """

    id: str
    arm: str
    sequence: int
    policy_version: str
    profile: TaskProfile
    objective: Objective
    estimates: tuple[ArmEstimate, ...] = ()
    fallback: str = ""
    time_s: float = 0.0
    prompt_hash: str = ""
    prompt: str = ""
    owner: str = ""
    shadow: str = ""
    known: int = -1

    def estimate(self, arm: str = "") -> ArmEstimate:
        """The estimate of an arm, by default of the chosen arm; an empty estimate if the policy made none."""
        wanted = arm or self.arm
        for estimate in self.estimates:
            if estimate.arm == wanted:
                return estimate
        return ArmEstimate(wanted)

    def made(self, request: Request, policy_version: str, time_s: float) -> "Decision":
        """A copy of the decision with the request's fields, the policy's version and the time."""
        return Decision(
            id=self.id,
            arm=self.arm,
            sequence=self.sequence,
            policy_version=policy_version,
            profile=self.profile,
            objective=self.objective,
            estimates=self.estimates,
            fallback=FORCED if request.forced else request.fallback,
            time_s=time_s,
            prompt_hash=request.prompt_hash,
            prompt=request.prompt,
            owner=request.owner,
            shadow=self.shadow,
            known=self.known,
        )


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The measurements of one answer.

    status: ok, error (the arm failed), disconnected (the client left), rejected (the request itself was wrong).
    ttft_s, latency_s: seconds from the decision to the first and to the last token; ttft_s is 0 where the answer
        came in one piece.
    waited_s: the part of these in the queue, before the request was sent to the arm.
    flaw: the defect that the answer alone shows, one of FLAWS; "" for none.
    answer: its text, only if it may be stored.
    """

    decision_id: str
    status: str = "ok"
    ttft_s: float = 0.0
    latency_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    finish_reason: str = ""
    flaw: str = ""
    answer: str = ""
    waited_s: float = 0.0


@dataclass(frozen=True)
class Feedback:
    """A score in [0, 1] for an answer, which may arrive late.

    Each source has one vote for each decision: its score with the latest time_s.

    owner: name of the key that gives the score; must be the decision's owner, or ANY_OWNER.
    trusted: an operator vouches for the key (reputation.py).
    """

    decision_id: str
    score: float
    source: str = "user"
    time_s: float = field(default=0.0, compare=False)
    owner: str = field(default="", compare=False)
    trusted: bool = field(default=False, compare=False)


# Results of an event. Responses and journals hold these strings.
ACCEPTED = "accepted"
DUPLICATE = "duplicate"
UNKNOWN = "unknown"
# The event is stored and counts when its decision arrives.
PENDING = "held"
# The same score was given again later. It is stored, because an older correction may still arrive.
REPEATED = "repeated"
# The decision already has scores from the largest number of sources.
TOO_MANY_SOURCES = "crowded"
# The event's decision is too old or was deleted.
EXPIRED = "expired"
BUSY = "busy"
# The idempotency key belongs to a request that is being answered, or to one with another body.
REUSED = "reused"
NOTED = (
    ACCEPTED,
    PENDING,
    REPEATED,
)  # results of events that must be written to the journal

IMPLICIT = "implicit"  # source of scores that were derived from the answer alone
ANY_OWNER = "*"  # owner of feedback that may belong to a decision of any owner
MAX_SOURCES = (
    8  # of one decision: each source is a vote, and clients choose the names of sources
)


Event = Decision | Outcome | Feedback


@dataclass
class Record:
    """One decision with its outcome and its scores so far.

    scores, times, owners: by source, the score, when it was given and by which key; one vote for each source.
    silenced: the keys whose scores do not count (reputation.py).
    """

    decision: Decision
    outcome: Outcome | None = None
    scores: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    silenced: Container[str] = ()

    def votes(self) -> dict[str, float]:
        """The scores that count, by source: the explicit scores, or the implicit score if there is no explicit one."""
        return self.explicit_scores() or self._counting()

    def explicit_scores(self) -> dict[str, float]:
        """The scores that count and were given explicitly, by source."""
        counting = self._counting()
        return {s: score for s, score in counting.items() if s != IMPLICIT}

    def _counting(self) -> dict[str, float]:
        if not self.silenced:
            return self.scores
        return {
            source: score
            for source, score in self.scores.items()
            if self.owners.get(source) not in self.silenced
        }
