"""The vocabulary of the whole system: frozen records, shape or unit first in each field's line.

B requests in a batch, K arms (an arm is a model, or a variant of one, that can be chosen), D features of a request.
Records cross process borders, so they hold plain data. The records of decisions, outcomes and feedback are in
events.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite

import msgspec
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

TASKS = ("chat", "completion", "embed")


@dataclass(frozen=True)
class Arm:
    """A model that can be chosen, as the operator describes it.

    name: what clients call it.
    tasks: which of TASKS it can do.
    context_tokens: prompt and answer together.
    prompt_price_usd, output_price_usd: per token; for your own GPU, its hourly price divided by its tokens an hour.
    prior_quality: expected score in [0, 1] before any score arrives; None derives it from the price (base.py).
    prior_by_kind: pairs of a kind of work and the expected score for it, in place of prior_quality.
    prior_scores: number of scores that prior_by_kind counts for.
    parent: the arm from which a new arm inherits what was learned; "" for none.
    inherit: number of events that the inherited past counts for. It also limits what was learned of the same name
        while other weights served it.
    revision: of the weights; a new revision tells the router that the weights changed.
    variant_of: the arm of whose application this one is a variant: the same weights, asked with other defaults. Both
        share its replicas, its load and its price; each has its own scores, lengths and times. "" for an arm with an
        application of its own.
    languages: of the texts that it is for, some of profiling.classifier.LANGUAGES; empty for all.
    """

    name: str
    tasks: tuple[str, ...] = ("chat", "completion")
    context_tokens: int = 4096
    prompt_price_usd: float = 0.0
    output_price_usd: float = 0.0
    prior_quality: float | None = None
    prior_by_kind: tuple[tuple[str, float], ...] = ()
    prior_scores: float = 10.0
    parent: str = ""
    inherit: float = 50.0
    revision: str = ""
    variant_of: str = ""
    languages: tuple[str, ...] = ()

    @property
    def application(self) -> str:
        """Name of the application that serves the arm."""
        return self.variant_of or self.name


@dataclass(frozen=True)
class Objective:
    """What a request is worth: utility = score - latency_weight * latency_s - cost_weight * cost_usd.

    latency_weight: score points given up to save a second.
    cost_weight: score points given up to save a US dollar.
    max_latency_s, max_cost_usd: hard limits on the expected latency and cost.
    models: the only arms allowed; empty allows all.
    unavailable: pairs of an arm that the ingress cannot ask and the sentence that says why (constraints.py).
    """

    latency_weight: float = 0.0
    cost_weight: float = 0.0
    max_latency_s: float = inf
    max_cost_usd: float = inf
    models: tuple[str, ...] = ()
    unavailable: tuple[tuple[str, str], ...] = ()

    def utility(self, score: float, latency_s: float, cost_usd: float) -> float:
        """The utility of an answer with this score, latency and cost."""
        return score - self.latency_weight * latency_s - self.cost_weight * cost_usd


@dataclass(frozen=True, eq=False)
class TaskProfile:
    """What is known of a request before a model answers it.

    features: [D] the context of the decision; the first is 1.
    task: one of TASKS.
    kind: the kind of work, one of features.KINDS.
    prompt_tokens: counted or estimated; of all prompts together.
    longest_prompt_tokens: of the longest of several prompts, which the model reads one by one; 0 for a single one.
    max_output_tokens: the client's own limit, or 0.
    output_tokens: usual number for the kind of work, whatever the limit. The length model learns the ratio to it.
    complexity, accuracy_sensitivity, time_sensitivity: in [0, 1]; a sensitivity is 0 if the text does not ask for it.
    reasons: what was found in the text, in words.
    expected_output_tokens: forecast learned from finished requests (forecast.py); 0 without a forecast.
    sufficiency: by arm, the calibrated probability that its answer is good enough.
    profiler_version: number of the forecaster's fit that made the forecast; version 0 has learned from no request.
    needs: the capabilities that an arm must have to answer (capabilities.py).
    min_output_tokens: the client's own least length of the answer, or 0.
    language: of the text, one of profiling.classifier.LANGUAGES; "" if that is not sure.

    Raises:
        ValueError: a feature is not finite.
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
    longest_prompt_tokens: int = 0
    needs: tuple[str, ...] = ()
    min_output_tokens: int = 0
    language: str = ""

    def __post_init__(self) -> None:
        # One NaN would spread into everything that is learned. The sum is the quickest check.
        if not isfinite(float(np.sum(self.features))):
            raise ValueError("a profile has features that are not finite")


class ModelState(msgspec.Struct, frozen=True, gc=False):
    """Live measurements of one arm's application. A struct, because each decision makes one for every arm.

    in_flight: requests being answered now; a fraction where it stands for the load per replica. Arms of one application
        have all of its requests.
    replicas: number of ready replicas.
    tokens_per_s: recent output tokens per second of all requests together.
    healthy: False excludes the arm from the choice.
    wait_s: expected time in the queue before the request is sent to the arm.
    lacks: the capabilities that the arm does not have (capabilities.py).
    price: score points that a request pays for a thousand tokens of work (scarcity.py); 0 with room.
    target_replicas: number of replicas that the application should have now; 0 if the autoscaler has none of it.
    """

    in_flight: float = 0
    replicas: int = 1
    tokens_per_s: float = 0.0
    healthy: bool = True
    wait_s: float = 0.0
    lacks: frozenset[str] = frozenset()
    price: float = 0.0
    target_replicas: int = 1

    @property
    def is_at_zero(self) -> bool:
        """Whether it has no replica because none is wanted now, so that nothing is wrong with it."""
        return not self.replicas and not self.target_replicas


@dataclass(frozen=True, eq=False)
class Request:
    """One question to the router: what to do (profile) and what is wanted (objective).

    forced: the client named the model, which is then the only one the objective allows.
    fallback: see Decision.fallback; "" if every component answered in time.
    prompt_hash: salted hash of all that the model will read. prompt: that text itself, only if it may be stored.
    owner: name of the API key that sent the request; "" without keys.
    users: salted hashes of the client's fields `user` and `safety_identifier`; empty if it sent neither.
    score_chance: probability that the answer gets a score, as far as it is known before the decision.
    explore: probability with which the arm is drawn uniformly from the eligible ones.
    pair: see Decision.pair.
    paced_weight: the part of the objective's cost weight that the budget pacer added; -1 if no pacer saw the request.
    pays_price: whether the prices of scarce arms count (ModelState.price). A request of high priority pays none, so
        other requests do not push it from the arm that it would get otherwise.
    """

    id: str
    profile: TaskProfile
    objective: Objective
    forced: bool = False
    fallback: str = ""
    prompt_hash: str = ""
    prompt: str = ""
    owner: str = ""
    score_chance: float = 1.0
    explore: float = 0.0
    pair: str = ""
    paced_weight: float = -1.0
    users: tuple[str, ...] = ()
    pays_price: bool = True
