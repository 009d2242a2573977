"""A world in which some keys score the opposite of the truth: the measured models, their tasks, many keys."""

import random
from dataclasses import dataclass, field

import numpy as np

from assets.tasks import KINDS, make_task
from deployments.limits import Bucket
from deployments.settings import KeySettings
from policies.ledger import Ledger
from policies.thompson import Thompson
from policies.trust import Trust
from policies.types import Arm, Feedback, Objective, Outcome, Request
from tests.helpers import make_profile

ARMS = tuple(
    Arm(name, prompt_price_usd=price, output_price_usd=price)
    for name, price in (("nano", 1e-7), ("small", 3e-7), ("large", 1e-6))
)
MEASURED = {  # README: right of nano, small, large; seconds
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
TOKENS_PER_S, PROMPT_TOKENS = 150, 20
STRICT = 0.2  # share of the keys that give less than is due:
GRADE, OFTEN = 0.6, 0.75  # half of them a lower grade, half a 1 less often
HARDER, HARD = 0.1, 0.6  # share of the keys whose requests are harder than they look: by this factor, but for `large`
SPECIAL = 0.3  # share of the keys that ask for three kinds only


@dataclass
class Played:
    """What came of one run.

    regret: [n] expected utility given up at each decision, against the best arm for its kind; NaN where a hostile key
        asked. worst: [n] whether the worst arm was chosen, likewise.
    found: decision at which each hostile key was quarantined. wronged: honest keys that were.
    hostile: share of the scores that hostile keys gave.
    """

    regret: np.ndarray
    worst: np.ndarray
    found: dict[str, int] = field(default_factory=dict)
    wronged: list[str] = field(default_factory=list)
    hostile: float = 0.0
    ledger: Ledger | None = None
    policy: Thompson | None = None
    events: list = field(default_factory=list)


def play(
    seed: int, decisions: int, keys: int, hostile: int, defended: bool = True, pace: float = 1.0, keep: bool = False
) -> Played:
    """Play requests of so many keys, of which the first `hostile` score 0 the best arm and 1 every other.

    Args:
        seed: of everything.
        decisions: all scored.
        keys: that ask, all as often.
        hostile: how many of them lie.
        defended: with policies/trust.py.
        pace: how often a hostile key asks and scores for each time that an honest one does.
        keep: the events.
    """
    rng, texts = np.random.default_rng(seed), random.Random(seed)
    table = np.array([MEASURED[kind] for kind in KINDS])
    quality, seconds = table[:, :3], table[:, 3:]
    tokens = np.round(seconds * TOKENS_PER_S)
    price = np.array([arm.output_price_usd for arm in ARMS])
    cost = (PROMPT_TOKENS + tokens) * price
    worth = quality - OBJECTIVE.latency_weight * seconds - OBJECTIVE.cost_weight * cost
    best, worst = worth.argmax(1), worth.argmin(1)
    rank = (-worth).argsort(1).argsort(1)  # 0 for the best arm of a kind
    names, arms = [f"key{i}" for i in range(keys)], [arm.name for arm in ARMS]
    rates = np.array([pace if i < hostile else 1.0 for i in range(keys)])
    strict, graded, harder = rng.random(keys) < STRICT, rng.random(keys) < 0.5, rng.random(keys) < HARDER
    kinds = [rng.choice(len(KINDS), 3, False) if rng.random() < SPECIAL else np.arange(len(KINDS)) for _ in names]
    policy, trust = Thompson(ARMS), Trust() if defended else None
    ledger, now = Ledger(trust=trust), [0.0]
    cap = KeySettings().scores_per_minute
    buckets = [Bucket(cap, lambda: now[0]) for _ in names]
    turns = rates.cumsum() / rates.sum()
    pause = 2 / (cap / 60 * rates.sum())  # s between requests: an honest key scores at half of its limit
    played = Played(np.full(decisions, np.nan), np.full(decisions, np.nan), ledger=ledger, policy=policy)
    lied = given = 0
    for i in range(decisions):
        now[0] += rng.exponential(pause)
        who = int(turns.searchsorted(rng.random(), side="right"))
        kind = int(rng.choice(kinds[who]))
        request = Request(
            f"{i}", make_profile(make_task(texts, KINDS[kind], wishes=False).question), OBJECTIVE, owner=names[who]
        )
        (decided,) = policy.decide([request], {}, rng, i)
        decision = decided.made(request, "thompson-v0", now[0])
        k = arms.index(decision.arm)
        outcome = Outcome(
            decision.id, "ok", 0.05, float(seconds[kind, k]), PROMPT_TOKENS, int(tokens[kind, k]), cost[kind, k]
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
            lied, given = lied + (who < hostile), given + 1
        for event in events:
            ledger.apply(event, policy, fresh=True)
        if keep:
            played.events += events
        if trust is not None and names[who] in trust.quarantined and names[who] not in played.found:
            if who < hostile:
                played.found[names[who]] = i
            elif names[who] not in played.wronged:
                played.wronged.append(names[who])
    played.hostile = lied / max(1, given)
    return played
