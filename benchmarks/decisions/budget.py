"""A ceiling on the mean cost of a stream: our budget pacer beside ParetoBandit's, under the same ceiling.

The ceiling is half-way between the cost of the cheapest arm and the mean cost of our router without a ceiling at a
cost weight of 0. So the ceiling always binds.

ParetoBandit's pacer runs as in its own router, in the adaptive mode. The penalty is its dual variable times the
logarithm of the price between market anchors. Arms above a falling price limit are excluded.

With a delay (`--scenario budget-delay`) ingresses decide on snapshots, and the router learns of a decision so many
requests later. Each delay is played twice: with answers that cost what the decision expected, the arm's mean, and with
their recorded costs.
"""

from collections import deque
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from benchmarks.decisions.peers import ParetoBandit
from policies.budget import BudgetPacer, IngressPacer, Spending
from policies.evaluation.simulate import (
    FeedbackPlan,
    SimulationResult,
    Stream,
    simulate,
)
from policies.events import Decision, Outcome
from policies.registry import make_policy
from policies.types import Objective, Vector

# USD per thousand tokens
DEAREST = 0.0056  # the dearest model in ParetoBandit's own registry
FLOOR = 0.0001  # ParetoBandit's lower market anchor
ANCHOR = 0.10  # ParetoBandit's upper market anchor
DELAYS = (0, 10, 30, 100, 300)  # requests between a decision and its outcome
INGRESSES = 2  # as in serve_config.yaml
# Its defaults, and settings that may suit it better: more exploration, no price limit (a price limit excludes the
# dearest arm at any penalty), penalties in proportion to the cost, slower steps.
GRID: dict[str, dict[str, Any]] = {
    "paretobandit": {},
    "paretobandit, alpha 0.1": {"alpha": 0.1},
    "paretobandit, soft": {"mode": "soft"},
    "paretobandit, soft, linear": {"mode": "soft", "linear": True},
    "paretobandit, soft, linear, lr 0.01": {"mode": "soft", "linear": True, "lr": 0.01},
    "paretobandit, soft, linear, lr 0.01, alpha 0.1": {
        "mode": "soft",
        "linear": True,
        "lr": 0.01,
        "alpha": 0.1,
    },
}


class PacedParetoBandit(ParetoBandit):
    """ParetoBandit with its own budget pacer.

    Args:
        given: positional arguments of Peer.
        ceiling: mean cost of a request, in the unit of the arms' prices.
        linear: makes penalties proportional to the cost instead of its logarithm.
        mode, lr: mode and learning rate of the pacer.
        options: options of the bandit.
    """

    def __init__(
        self,
        *given: Any,
        ceiling: float,
        linear: bool = False,
        mode: str = "adaptive",
        lr: float = 0.05,
        **options: float,
    ):
        super().__init__(*given, **options)
        from pareto_bandit.budget_pacer import BudgetPacer, PacingMode
        from pareto_bandit.costs import log_normalize_cost

        self.pacer = BudgetPacer(ceiling, PacingMode(mode), lr)
        self._price = {arm.name: arm.output_price_usd for arm in self.arms}
        dearest = max(self._price.values())
        self._normalised = {}
        for name, price in self._price.items():
            share = price / dearest
            if not linear:
                share = log_normalize_cost(DEAREST * price / dearest, FLOOR, ANCHOR)
            self._normalised[name] = share

    def choose(self, x: Vector) -> int:
        allowed = list(self._price)
        if self.pacer.uses_hard:
            limit = self.pacer.get_cost_ceiling_per_1k(max(self._price.values()))
            if limit is not None:
                within = [name for name in allowed if self._price[name] <= limit]
                allowed = within or allowed
        penalties = {}
        if self.pacer.uses_soft:
            penalties = self.pacer.get_extra_cost_penalties(self._normalised)
        total = {
            name: self._penalties[name] + penalties.get(name, 0.0) for name in allowed
        }
        arm, _ = self.bandit.select_arm(x, candidates=allowed, cost_penalties=total)
        self.bandit.mark_selected(arm)
        return self._index[arm]

    def update(self, x: Vector, arm: int, score: float) -> None:
        super().update(x, arm, score)
        self.pacer.observe(self._price[self.arms[arm].name])


class DelayedPacer:
    """The pacers of several ingresses, which decide in turn, and of the router, which learns of a decision later.

    Args:
        ceiling: mean cost of a request.
        arms: names of the arms, in the order of the columns of `paid`.
        paid: [N, K] what the answer to each request costs in fact.
        delay: number of requests between a decision and its outcome. Snapshots come three times as often.
        ingresses: number of ingresses.
        rng: draws the ingress of a request.
    """

    def __init__(
        self,
        ceiling: float,
        arms: Sequence[str],
        paid: Vector,
        delay: int,
        ingresses: int,
        rng: np.random.Generator,
    ):
        self.router = BudgetPacer(ceiling)
        self._ingresses = [IngressPacer(ceiling) for _ in range(ingresses)]
        self._column = {arm: k for k, arm in enumerate(arms)}
        self._paid = paid
        self._delay = delay
        self._refresh = delay // 3 + 1
        self._turn = rng.integers(ingresses, size=len(paid)).tolist()
        self._under_way: deque[tuple[IngressPacer, Decision]] = deque()
        self._requests = 0
        self.weights: list[float] = []  # the price at each request

    @property
    def _here(self) -> IngressPacer:
        return self._ingresses[self._turn[self._requests]]

    @property
    def cost_weight(self) -> float:
        """See BudgetPacer."""
        self.weights.append(self._here.cost_weight)
        return self.weights[-1]

    def decided(self, decision: Decision) -> None:
        """Charge a decision where it is made, and at the router those whose outcome arrives now."""
        here = self._here
        here.decided(decision)
        self._under_way.append((here, decision))
        while len(self._under_way) > self._delay:
            ingress, earlier = self._under_way.popleft()
            paid = float(self._paid[int(earlier.id), self._column[earlier.arm]])
            self.router.decided(earlier)
            self.router.finished(earlier, Outcome(earlier.id, cost_usd=paid))
            ingress.delivered(earlier)
        self._requests += 1
        if self._requests % self._refresh == 0:
            lacking = [ingress.undelivered for ingress in self._ingresses]
            for i, ingress in enumerate(self._ingresses):
                others = sum(lacking[:i] + lacking[i + 1 :], start=Spending())
                ingress.restore(self.router.state(), len(self._ingresses), others)


def measure_delays(
    stream: Stream,
    paid: Vector,
    ours: str,
    shuffle: int,
    delays: Sequence[int] = DELAYS,
    ingresses: int = INGRESSES,
) -> list[dict[str, Any]]:
    """Rows for our policy with its pacer, by the costs of the answers and the delay of the outcomes.

    `kept, %` is the score as a share of that without a delay. The scores arrive with the outcomes.

    Args:
        stream: a stream with constant prices.
        paid: [N, K] the recorded costs of the answers.
        ours: name of our policy.
        shuffle: seed of the random choices.
        delays: numbers of requests, the first one 0.
        ingresses: number of ingresses.
    """
    arms = stream.arms_at(0)
    objective = Objective()
    free = simulate(
        make_policy(ours, arms), stream, objective, np.random.default_rng((shuffle, 1))
    )
    ceiling = float(stream.costs[0].min() + free.cost_usd.mean()) / 2
    rows: list[dict[str, Any]] = []
    at_once = 0.0
    both = (("expected", stream.costs), ("recorded", paid))
    for (kind, spent), delay in product(both, delays):
        turns = np.random.default_rng((shuffle, 4))
        pacer = DelayedPacer(ceiling, stream.arms, spent, delay, ingresses, turns)
        trace = simulate(
            make_policy(ours, arms),
            stream,
            objective,
            np.random.default_rng((shuffle, 2)),
            FeedbackPlan(delay=delay),
            pacer=pacer,
        )
        costs = spent[np.arange(len(spent)), trace.chosen]
        row = _row(f"{kind} costs, {delay} requests late", trace, ceiling, costs)
        at_once = row["score"] if delay == 0 else at_once
        low, high = np.quantile(pacer.weights[len(costs) // 2 :], (0.05, 0.95))
        rows.append(
            row
            | {
                "kept, %": 100 * row["score"] / at_once if at_once else float("nan"),
                "price, 5 %": low * ceiling,
                "price, 95 %": high * ceiling,
            }
        )
    return rows


def mix(scores: Vector, costs: Vector, ceiling: float) -> float:
    """Mean score of the best fixed mix of arms in hindsight whose mean cost is at most the ceiling.

    Args:
        scores: [K] mean scores.
        costs: [K] mean costs; at least one is below the ceiling.
        ceiling: upper bound of the mean cost.
    """
    best = float(scores[costs <= ceiling].max())
    for i in np.flatnonzero(costs <= ceiling):
        for j in np.flatnonzero(costs > ceiling):
            share = (ceiling - costs[i]) / (costs[j] - costs[i])
            best = max(best, float((1 - share) * scores[i] + share * scores[j]))
    return best


def measure(
    stream: Stream, ours: str, shuffle: int, peers: Sequence[str] = tuple(GRID)
) -> list[dict[str, Any]]:
    """Rows for our policy without a ceiling, for our policy with its pacer, and for ParetoBandit with its own.

    The ceiling binds if the pacer's price is above zero at the end. `curve` is the running mean of the cost divided by
    the ceiling, minus one.

    Args:
        stream: a stream with constant prices.
        ours: name of our policy.
        shuffle: seed of the random choices.
        peers: names in GRID.
    """
    arms = stream.arms_at(0)
    objective = Objective()
    free = simulate(
        make_policy(ours, arms), stream, objective, np.random.default_rng((shuffle, 1))
    )
    ceiling = float(stream.costs[0].min() + free.cost_usd.mean()) / 2
    pacer = BudgetPacer(ceiling)
    paced = simulate(
        make_policy(ours, arms),
        stream,
        objective,
        np.random.default_rng((shuffle, 2)),
        pacer=pacer,
    )
    rows = [
        _row(f"{ours} without", free, ceiling),
        _row(f"{ours} with pacer", paced, ceiling),
    ]
    rows[1]["binds"] = float(pacer.cost_weight > 0)
    if rows[1]["binds"]:
        rows[1]["off by where it binds, %"] = rows[1]["off by, %"]
    for name in peers:
        given = arms, 0.0, len(stream.profiles[0].features), shuffle
        peer = PacedParetoBandit(*given, ceiling=ceiling, **GRID[name])
        rows.append(
            _row(
                name,
                simulate(peer, stream, objective, np.random.default_rng((shuffle, 3))),
                ceiling,
            )
        )
    reference = mix(stream.scores.mean(axis=0), stream.costs[0], ceiling)
    return [
        *rows,
        {
            "strategy": "best fixed mix",
            "score": reference,
            "off by, %": 0.0,
            "curve": [],
        },
    ]


def _row(
    name: str, trace: SimulationResult, ceiling: float, costs: Vector | None = None
) -> dict[str, Any]:
    """Figures of one run; `costs` [N] are those of the answers, if other than expected."""
    costs = trace.cost_usd if costs is None else costs
    running = np.cumsum(costs) / np.arange(1, len(costs) + 1) / ceiling - 1
    off = 100 * float(running[-1])
    second = 100 * (float(costs[len(running) // 2 :].mean()) / ceiling - 1)
    row = {
        "strategy": name,
        "score": float(trace.score.mean()),
        "cost over ceiling, %": off,
        "off by, %": abs(off),
    }
    return row | {"second half, %": second, "curve": running.tolist()}
