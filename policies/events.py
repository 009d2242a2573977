"""The records of one decision, from the estimates to the scores."""

from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from policies.types import Objective, Request, TaskProfile

FORCED = "forced"  # Decision.fallback of a choice that the client made
# Decision.fallback of the answer to a calibration prompt, which every size gives; also the source of its score.
CALIBRATION = "calibration"
# Decision.fallback of a second answer to a client's request, by another size in the background. The client gets the
# first answer, and the judge grades both.
PAIR = "pair"
BACKGROUND = (CALIBRATION, PAIR)  # values of Decision.fallback for no client
NOT_ROUTED = (
    FORCED,
    *BACKGROUND,
)  # values of Decision.fallback that are no traffic of the router
FLAWS = ("empty", "invalid_json")
CUT_OFF = "cut_off"  # the answer ended at the model's limit, and the client set none


class ArmEstimate(NamedTuple):
    """A policy's estimate of one arm at one decision.

    quality: expected score, = availability · the expected score of an answer without a visible flaw.
    latency_s, cost_usd: expected values.
    utility: expected value, less what the request pays for its place at a scarce arm (Decision.scarcity).
    sampled_utility: this decision's draw from the posterior.
    ttft_s, tpot_s: expected time from leaving the queue to the first token, and per further token.
    output_tokens: expected number.
    propensity: probability in [0, 1] with which this policy chooses the arm in this situation.
    load, total_load: requests in flight per replica of the arm, and over all arms.
    removed_by: the sentence for the limit that excluded the arm (constraints.Exclusion); empty if it was eligible.
    availability: probability that the answer arrives without a visible flaw.
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
    availability: float = 1.0

    @property
    def answer_s(self) -> float:
        """Expected time from leaving the queue to the last token."""
        return self.ttft_s + max(self.output_tokens - 1.0, 0.0) * self.tpot_s

    @property
    def unflawed_quality(self) -> float:
        """Expected score of an answer without a visible flaw."""
        return self.quality / self.availability if self.availability > 0 else 0.0


class Expectation(NamedTuple):
    """What the policy with a role expected of the arm that was chosen, if it would have chosen the same.

    role: see roles.py.
    quality: expected score of an answer without a visible flaw.
    known: see Decision.known, for this policy.
    """

    role: str
    quality: float
    known: int


class Decision(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The chosen arm, with all that is needed to learn from the decision, explain it and evaluate it later.

    sequence: number of decisions before this one; the forgetting clock.
    arm: empty if no arm was eligible.
    fallback: "" for none. "profiler" or "router": that component did not answer in time, so the decision was made
        without it. "model" or "hedge": a second attempt, because the first model failed or was silent for too long.
        FORCED: the client named the model. CALIBRATION: no client asked; each of K sizes answers the same prompt, so
        the propensity of each is 1/K, although none was drawn. PAIR: no client asked; the arm was drawn among the arms
        that were idle and had not given the first answer.
    time_s: seconds since the epoch.
    prompt_hash, prompt: see Request.
    owner: of the request; only the same owner may give feedback.
    users: see Request.
    shadow: the arm that the shadow policy would have chosen (roles.py); "" without a shadow policy.
    known: number of scores of the chosen arm that the policy had learned from since the arm last changed; -1 if not
        recorded.
    scored: number of decisions that had a score when this one was made; the forgetting clock of quality. -1 if not
        recorded.
    score_chance, explore, paced_weight: see Request.
    expectations: of the policies with a role; empty if there is only a champion.
    retry_of: id of the request's first decision, if this is a second attempt.
    rule: the arm that the team's own rule chose for this request, while a policy is tried beside it
        (rollout/first_day.py); `shadow` is then the arm that the tried policy chose. Otherwise "".
    smearing, pace_smearing: factors in the expected tokens and in the expected TPOT of the chosen arm
        (thompson/smearing.py); 0 if it must not be learned from.
    shadow_estimates: the tried policy's estimates, with its own propensities, where the rule made the decision.
    pair: id of the other decision of a pair: two arms answer one request, the second of them in the background (PAIR).
        "" for a single answer. A first decision has it also if no second answer was given after all.
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
    scored: int = -1
    score_chance: float = 1.0
    explore: float = 0.0
    retry_of: str = ""
    expectations: tuple[Expectation, ...] = ()
    rule: str = ""
    shadow_estimates: tuple[ArmEstimate, ...] = ()
    pair: str = ""
    paced_weight: float = -1.0
    smearing: float = 0.0
    pace_smearing: float = 0.0
    users: tuple[str, ...] = ()

    def estimate(self, arm: str = "") -> ArmEstimate:
        """The estimate of an arm, by default of the chosen arm; an empty estimate if the policy made none."""
        wanted = arm or self.arm
        for estimate in self.estimates:
            if estimate.arm == wanted:
                return estimate
        return ArmEstimate(wanted)

    def expected_reward(self, estimate: ArmEstimate) -> float:
        """The expected utility of the answer itself, which leaves out what the request pays for a scarce arm."""
        return self.objective.utility(
            estimate.quality, estimate.latency_s, estimate.cost_usd
        )

    def scarcity(self, estimate: ArmEstimate) -> float:
        """Score points that the request pays for its place at a scarce arm (scarcity.py).

        No field has it, because an earlier release reads estimates of a fixed length.
        """
        return max(0.0, round(self.expected_reward(estimate) - estimate.utility, 9))

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
            scored=self.scored,
            score_chance=request.score_chance,
            explore=request.explore,
            retry_of=self.retry_of,
            expectations=self.expectations,
            rule=self.rule,
            shadow_estimates=self.shadow_estimates,
            pair=request.pair,
            paced_weight=request.paced_weight,
            smearing=self.smearing,
            pace_smearing=self.pace_smearing,
            users=request.users,
        )

    def tried_estimate(self, arm: str) -> ArmEstimate:
        """The estimate that the policy which is tried beside the rule made of an arm; an empty one if it made none."""
        for estimate in self.shadow_estimates or self.estimates:
            if estimate.arm == arm:
                return estimate
        return ArmEstimate(arm)


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The measurements of one answer.

    status: ok, error (the arm failed), disconnected (the client left), rejected (the request itself was wrong).
    ttft_s, latency_s: seconds from the decision to the first and to the last token; ttft_s is 0 where the answer
        came in one piece.
    waited_s: the part of these in the queue, before the request was sent to the arm.
    streamed: whether the client asked for a stream.
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
    streamed: bool = False


@dataclass(frozen=True)
class Feedback:
    """A score in [0, 1] for an answer, which may arrive late.

    Each source has one vote for each decision: its score with the latest time_s, and of two at the same time the lower.

    owner: name of the key that gives the score; must be the decision's owner, or ANY_OWNER.
    trusted: an operator vouches for the key (reputation.py).
    given_by: name of the key that sent the score; its owner is ANY_OWNER if the key may score all decisions. "" without
        keys, for the router's own judge, and in journals of earlier releases.
    """

    decision_id: str
    score: float
    source: str = "user"
    time_s: float = field(default=0.0, compare=False)
    owner: str = field(default="", compare=False)
    trusted: bool = field(default=False, compare=False)
    given_by: str = field(default="", compare=False)

    def is_of_key(self, name: str) -> bool:
        """Whether the key of this name gave the score."""
        return name in (self.owner, self.given_by)


# Results of an event. Responses and journals hold these strings.
ACCEPTED = "accepted"
DUPLICATE = "duplicate"
UNKNOWN = "unknown"
# The event is stored and counts when its decision arrives.
PENDING = "pending"
# The same score was given again later. It is stored, because an older correction may still arrive.
REPEATED = "repeated"
# The decision already has scores from the largest number of sources.
TOO_MANY_SOURCES = "too_many_sources"
# The event's decision is too old or was deleted.
EXPIRED = "expired"
# The decision's request was refused, so there is no answer to score.
UNANSWERED = "unanswered"
BUSY = "busy"
# The idempotency key belongs to a request that is being answered, or to one with another body.
REUSED = "reused"
# The names of two of them in journals of release 0.1.0.
FORMER_STATUSES = {"held": PENDING, "crowded": TOO_MANY_SOURCES}
NOTED = (
    ACCEPTED,
    PENDING,
    REPEATED,
)  # results of events that must be written to the journal

JUDGE = "judge"  # source of the scores of the router's own judge
ANY_OWNER = "*"  # owner of feedback that may belong to a decision of any owner
# Sources of the zeros that earlier releases derived from a visible flaw. Their journals hold them; they do not count.
DERIVED_SOURCES = ("check", "implicit")
MAX_SOURCES = (
    8  # of one decision: each source is a vote, and clients choose the names of sources
)


Event = Decision | Outcome | Feedback


def is_derived(source: str, owner: str) -> bool:
    """Whether a score is one of those that earlier releases derived from a visible flaw."""
    return source in DERIVED_SOURCES and owner == ANY_OWNER


def visible_flaw(decision: Decision, outcome: Outcome) -> str:
    """The flaw that an outcome shows without a score: "error", one of FLAWS, or CUT_OFF; "" for none.

    A disconnected client shows none, because it may have read enough.
    """
    if outcome.status == "error":
        return outcome.status
    if outcome.status != "ok" or decision.profile.task == "embed":
        return ""
    if outcome.flaw in FLAWS:
        return outcome.flaw
    limited = decision.profile.max_output_tokens > 0
    return CUT_OFF if outcome.finish_reason == "length" and not limited else ""


@dataclass
class Record:
    """One decision with its outcome and its scores so far.

    scores, times, owners: by source, the score, when it was given and by which key; one vote for each source.
    corrected: the sources that have replaced their first score.
    silenced: the keys whose scores do not count (reputation.py).
    answered_by: arm of the hedge that answered the request; "" if the decision's own arm did (replay.py).
    """

    decision: Decision
    outcome: Outcome | None = None
    scores: dict[str, float] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    corrected: set[str] = field(default_factory=set)
    silenced: Container[str] = ()
    answered_by: str = ""

    def is_first_of_source(self, event: Feedback) -> bool:
        """Whether feedback that has just changed the record is the first score of its source, and no correction."""
        return event.source not in self.corrected

    def given_scores(self) -> dict[str, float]:
        """The scores that were given, by source, whether they count or not."""
        return {
            source: score
            for source, score in self.scores.items()
            if not is_derived(source, self.owners.get(source, ""))
        }

    def explicit_scores(self) -> dict[str, float]:
        """The scores that count, by source."""
        given = self.given_scores()
        if not self.silenced:
            return given
        return {
            source: score
            for source, score in given.items()
            if self.owners.get(source) not in self.silenced
        }

    @property
    def is_calibration(self) -> bool:
        """Whether this is an answer to a calibration prompt, and no traffic."""
        return self.decision.fallback == CALIBRATION

    @property
    def is_background(self) -> bool:
        """Whether no client asked for this answer: it is a calibration's, or the second answer of a pair."""
        return self.decision.fallback in BACKGROUND

    @property
    def mean_score(self) -> float | None:
        """The mean over the sources of the scores that count; None without any."""
        scores = self.explicit_scores()
        return sum(scores.values()) / len(scores) if scores else None

    @property
    def flaw(self) -> str:
        """See visible_flaw; "" while there is no outcome."""
        if self.outcome is None:
            return ""
        return visible_flaw(self.decision, self.outcome)

    @property
    def vote(self) -> float | None:
        """The decision's one vote on the quality of unflawed answers.

        None if the answer has a visible flaw or no score, or if the request was refused.
        """
        return None if self.flaw or self.refused else self.mean_score

    @property
    def refused(self) -> bool:
        """Whether the request was refused, so that there is no answer."""
        return self.outcome is not None and self.outcome.status == "rejected"
