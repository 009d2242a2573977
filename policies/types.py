"""The vocabulary of the whole system: frozen records, shape or unit first in each field's line.

B requests in a batch, K arms (an arm is a model that can be chosen), D features of a request.
Records cross process borders; nothing here knows how. Decision and Outcome are msgspec's structs, made in a tenth of a
dataclass's time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

TASKS = ("chat", "completion", "embed")
FORCED = "forced"  # Decision.fallback of a choice that the client made
FLAWS = ("empty", "invalid_json")


@dataclass(frozen=True)
class Arm:
    """A model that can be chosen, as the operator describes it.

    name: what clients call it.
    tasks: which of TASKS it can do.
    context_tokens: prompt and answer together.
    prompt_price_usd, output_price_usd: per token; for an own GPU, its hourly price over its tokens an hour.
    prior_quality: score in [0, 1] that is expected before anything is known; None goes by the price (base.py).
    parent: the arm from which a new one inherits what was learned; "" for none.
    inherit: events that this counts for, and also what was learned of the same name when other weights served it.
    revision: of the weights, where nothing else tells that they are others.
    """

    name: str
    tasks: tuple[str, ...] = ("chat", "completion")
    context_tokens: int = 4096
    prompt_price_usd: float = 0.0
    output_price_usd: float = 0.0
    prior_quality: float | None = None
    parent: str = ""
    inherit: float = 50.0
    revision: str = ""


@dataclass(frozen=True)
class Objective:
    """What a request is worth: utility = score - latency_weight * latency_s - cost_weight * cost_usd.

    latency_weight: score points given up to save a second.
    cost_weight: score points given up to save a US dollar.
    max_latency_s, max_cost_usd: hard limits on the expected latency and cost.
    models: the only arms allowed; empty allows all.
    unavailable: pairs of an arm that cannot be asked now and the reason, as the way in knows it.
    """

    latency_weight: float = 0.0
    cost_weight: float = 0.0
    max_latency_s: float = inf
    max_cost_usd: float = inf
    models: tuple[str, ...] = ()
    unavailable: tuple[tuple[str, str], ...] = ()

    def utility(self, score: float, latency_s: float, cost_usd: float) -> float:
        """What an answer with this score, latency and cost was worth."""
        return score - self.latency_weight * latency_s - self.cost_weight * cost_usd


@dataclass(frozen=True, eq=False)
class TaskProfile:
    """What is known of a request before anybody answers it.

    features: [D] the context of the decision; the first is 1.
    task: one of TASKS.
    kind: what sort of work it is, one of features.KINDS.
    prompt_tokens: counted or estimated.
    max_output_tokens: the client's own limit, or 0.
    output_tokens: usual for its kind, whatever the limit: the fixed base on top of which answers are learned.
    complexity, accuracy_sensitivity, time_sensitivity: in [0, 1]; sensitivities are 0 when nothing was said.
    reasons: what was seen in the text, in words.
    expected_output_tokens: as learned from finished requests (forecast.py); 0 where nobody said.
    sufficiency: by arm, the calibrated probability that its answer is good enough.
    profiler_version: which fit of the profiler said so; 0 had nothing to learn from yet.
    """

    features: Vector
    task: str
    kind: str
    prompt_tokens: int
    max_output_tokens: int = 0
    output_tokens: float = 48.0
    complexity: float = 0.0
    accuracy_sensitivity: float = 0.0
    time_sensitivity: float = 0.0
    reasons: tuple[str, ...] = ()
    expected_output_tokens: float = 0.0
    sufficiency: Mapping[str, float] = field(default_factory=dict)
    profiler_version: int = 0


@dataclass(frozen=True)
class ModelState:
    """Live measurements of one arm.

    in_flight: requests being answered now.
    replicas: that are ready.
    ttft_s, tpot_s: moving averages of the time to the first token, and of the time per further token.
    tokens_per_s: output tokens of all its requests together, lately.
    error_rate, accuracy: moving averages in [0, 1]; accuracy is that of the answers with feedback.
    healthy: False takes the arm out of the choice.
    wait_s: expected for a place, before the arm hears of a request.
    """

    in_flight: int = 0
    replicas: int = 1
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    tokens_per_s: float = 0.0
    error_rate: float = 0.0
    accuracy: float = 0.0
    healthy: bool = True
    wait_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Request:
    """One question to the router: what to do (profile) and what is wanted (objective).

    forced: the client named the model, which is then the only one the objective allows.
    fallback: what was already done without, on the way here ("" for nothing).
    prompt_hash: salted hash of all that the model will read; prompt: that text itself, only where it may be stored.
    owner: whose it is, by the name of the API key; "" where there are none.
    """

    id: str
    profile: TaskProfile
    objective: Objective
    forced: bool = False
    fallback: str = ""
    prompt_hash: str = ""
    prompt: str = ""
    owner: str = ""


class ArmEstimate(NamedTuple):
    """What the policy thought of one arm at one decision; a tuple, because every decision makes K of them.

    quality, latency_s, cost_usd, utility: the means.
    sampled_utility: this decision's draw from the posterior.
    ttft_s, tpot_s: expected time to the first token once there is a place, and per further token.
    output_tokens: expected.
    propensity: probability in [0, 1] with which this policy chooses the arm in this situation.
    load, total_load: requests in flight per replica, on the arm and over all arms.
    removed_by: the limit that took the arm out, in words; empty if it was eligible.
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
    """Which arm answers, and all that learning, explaining and judging it later needs.

    sequence: how many decisions came before it; the clock of forgetting.
    arm: empty when no arm was eligible.
    fallback: "" for none; "profiler" or "router" that did not answer in time, so it was done without; of a second try,
        "model" if the first one failed or "hedge" if it was silent for too long; FORCED if the client named the model.
    time_s: seconds since the epoch.
    prompt_hash, prompt: see Request.
    owner: of the request; feedback comes from the same.
    shadow: the arm that a policy on trial would have chosen (roles.py); "" if there was none.
    known: scores of the chosen arm, since it last changed, from which the policy had learned; -1 if nobody noted it.
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
        """The estimate of an arm, by default of the chosen one; an empty one if the policy had none."""
        wanted = arm or self.arm
        for estimate in self.estimates:  # not by a generator, which costs more than what it looks for
            if estimate.arm == wanted:
                return estimate
        return ArmEstimate(wanted)

    def made(self, request: Request, policy_version: str, time_s: float) -> "Decision":
        """The same, as made for this request by this version at this time."""
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
    """What was measured while the arm answered.

    status: ok, error (the arm failed), disconnected (the client left), rejected (the request itself was wrong).
    ttft_s, latency_s: seconds from the decision to the first and to the last token; ttft_s is 0 where the answer
        came in one piece.
    waited_s: of these, for a place, before the arm heard of it.
    flaw: what a look at the answer alone shows to be wrong with it, one of FLAWS; "" for nothing.
    answer: its text, only where it may be stored.
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
    """A score in [0, 1] for an answer, often late; one vote per decision and source, the one with the latest time_s
    counts.

    owner: who gives it; must be the decision's.
    trusted: an operator vouches for it (trust.py).
    """

    decision_id: str
    score: float
    source: str = "user"
    time_s: float = field(default=0.0, compare=False)
    owner: str = field(default="", compare=False)
    trusted: bool = field(default=False, compare=False)
