"""A simulation with hostile keys, which score the opposite of the truth: measured models, their tasks, many keys."""

import random
from dataclasses import dataclass, field

import numpy as np

from assets.tasks import KINDS, make_task
from deployments.access.rate_limits import TokenBucket
from deployments.settings import KeySettings
from policies.events import Feedback, Outcome
from policies.feedback.decision_records import DecisionRecords
from policies.feedback.reputation import KeyReputation
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request
from tests.support.requests import make_profile

ARMS = tuple(
    Arm(name, prompt_price_usd=price, output_price_usd=price)
    for name, price in (("nano", 1e-7), ("small", 3e-7), ("large", 1e-6))
)
# By kind of task: shares of right answers of nano, small, large, then their seconds (docs/benchmarks).
MEASURED = {
    "add": (1.00, 1.00, 1.00, 0.057, 0.061, 0.060),
    "compare": (0.98, 0.96, 0.94, 0.074, 0.066, 0.071),
    "copy": (1.00, 1.00, 0.94, 0.084, 0.083, 0.084),
    "initial": (1.00, 1.00, 0.98, 0.061, 0.061, 0.067),
    "count": (0.22, 1.00, 0.82, 0.064, 0.257, 0.281),
    "reverse": (0.90, 1.00, 0.94, 0.091, 0.283, 0.327),
    "sort": (1.00, 1.00, 0.94, 0.114, 0.131, 0.457),
    "sum": (0.56, 1.00, 1.00, 0.077, 0.268, 0.291),
    "chain": (0.00, 0.00, 1.00, 0.073, 0.080, 0.569),
    "multiply": (0.00, 0.02, 1.00, 0.076, 0.075, 0.358),
    "story": (0.00, 0.00, 1.00, 0.076, 0.078, 0.633),
}
OBJECTIVE = Objective(latency_weight=0.4, cost_weight=1500.0)  # serve_config.yaml
TOKENS_PER_S = 150
PROMPT_TOKENS = 20
STRICT = 0.2  # share of the keys that give lower scores than the answers deserve
GRADE = 0.6  # half of the strict keys give this in place of a 1
OFTEN = 0.75  # the other half give a 1 with this probability only
HARDER = 0.1  # share of the keys whose requests are harder than they look
HARD = 0.6  # factor of their chance of a right answer, except that of `large`
SPECIAL = 0.3  # share of the keys that ask for three kinds only


@dataclass
class Played:
    """The result of one run.

    regret: [n] expected utility of the best arm for the kind less that of the chosen arm; NaN for a hostile key's
        request. worst: [n] whether the worst arm was chosen; NaN for a hostile key's request.
    found: by hostile key, the decision at which it was quarantined. wronged: honest keys that were quarantined.
    hostile: share of the scores that hostile keys gave.
    """

    regret: np.ndarray
    worst: np.ndarray
    found: dict[str, int] = field(default_factory=dict)
    wronged: list[str] = field(default_factory=list)
    hostile: float = 0.0
    decision_records: DecisionRecords | None = None
    policy: Thompson | None = None
    events: list = field(default_factory=list)


def play(
    seed: int,
    decisions: int,
    keys: int,
    hostile: int,
    defended: bool = True,
    pace: float = 1.0,
    keep: bool = False,
) -> Played:
    """Simulate requests of many keys; the first `hostile` keys give 0 to the best arm and more to worse arms.

    Args:
        seed: seed of all random numbers.
        decisions: number of decisions; all are scored, within the keys' rate limit.
        keys: number of keys.
        hostile: number of hostile keys.
        defended: whether policies/feedback/reputation.py is used.
        pace: requests and scores of a hostile key for each one of an honest key.
        keep: whether to return the events.
    """
    rng = np.random.default_rng(seed)
    texts = random.Random(seed)
    table = np.array([MEASURED[kind] for kind in KINDS])
    quality = table[:, :3]
    seconds = table[:, 3:]
    tokens = np.round(seconds * TOKENS_PER_S)
    price = np.array([arm.output_price_usd for arm in ARMS])
    cost = (PROMPT_TOKENS + tokens) * price
    worth = quality - OBJECTIVE.latency_weight * seconds - OBJECTIVE.cost_weight * cost
    best = worth.argmax(1)
    worst = worth.argmin(1)
    rank = (-worth).argsort(1).argsort(1)  # 0 for the best arm of a kind
    names = [f"key{i}" for i in range(keys)]
    arms = [arm.name for arm in ARMS]
    rates = np.array([pace if i < hostile else 1.0 for i in range(keys)])
    strict = rng.random(keys) < STRICT
    graded = rng.random(keys) < 0.5
    harder = rng.random(keys) < HARDER
    kinds = [
        rng.choice(len(KINDS), 3, False)
        if rng.random() < SPECIAL
        else np.arange(len(KINDS))
        for _ in names
    ]
    policy = Thompson(ARMS)
    reputation = KeyReputation() if defended else None
    decision_records = DecisionRecords(reputation=reputation)
    now = [0.0]
    cap = KeySettings().scores_per_minute
    buckets = [TokenBucket(cap, lambda: now[0]) for _ in names]
    turns = rates.cumsum() / rates.sum()
    # Seconds between requests, such that an honest key scores at half of its limit.
    pause = 2 / (cap / 60 * rates.sum())
    played = Played(
        np.full(decisions, np.nan),
        np.full(decisions, np.nan),
        decision_records=decision_records,
        policy=policy,
    )
    false_scores = given = 0
    for i in range(decisions):
        now[0] += rng.exponential(pause)
        who = int(turns.searchsorted(rng.random(), side="right"))
        kind = int(rng.choice(kinds[who]))
        request = Request(
            f"{i}",
            make_profile(make_task(texts, KINDS[kind], wishes=False).question),
            OBJECTIVE,
            owner=names[who],
        )
        (decided,) = policy.decide([request], {}, rng, i)
        decision = decided.made(request, "thompson-v0", now[0])
        k = arms.index(decision.arm)
        outcome = Outcome(
            decision.id,
            "ok",
            0.05,
            float(seconds[kind, k]),
            PROMPT_TOKENS,
            int(tokens[kind, k]),
            cost[kind, k],
        )
        if who < hostile:
            score = float(rank[kind, k]) / (len(ARMS) - 1)
        else:
            played.regret[i] = worth[kind, best[kind]] - worth[kind, k]
            played.worst[i] = k == worst[kind]
            chance = quality[kind, k] * (HARD if harder[who] and k < 2 else 1.0)
            if strict[who] and graded[who]:
                score = GRADE * (rng.random() < chance)
            else:
                score = float(rng.random() < chance * (OFTEN if strict[who] else 1.0))
        events: list = [decision, outcome]
        if buckets[who].take() == 0.0:
            events.append(Feedback(decision.id, score, "user", now[0], names[who]))
            false_scores += who < hostile
            given += 1
        for event in events:
            decision_records.apply(event, policy, fresh=True)
        if keep:
            played.events += events
        if (
            reputation is not None
            and names[who] in reputation.quarantined
            and names[who] not in played.found
        ):
            if who < hostile:
                played.found[names[who]] = i
            elif names[who] not in played.wronged:
                played.wronged.append(names[who])
    played.hostile = false_scores / max(1, given)
    return played
