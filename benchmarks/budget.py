"""A ceiling on the mean cost of a stream: our pacer beside ParetoBandit's, on the same stream under the same ceiling.

The ceiling is half-way between the cheapest arm's cost and the mean cost of our router without one, at a cost weight
of 0, so it always binds. ParetoBandit's pacer is used as its router uses it, in its adaptive mode: a penalty of its
dual variable times the logarithm of the price between market anchors, and arms over a falling price limit left out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers import ParetoBandit
from policies.evaluate import Stream, Trace, play
from policies.pacer import Pacer
from policies.registry import make_policy
from policies.types import Objective, Vector

DEAREST = 0.0056  # USD per thousand tokens: of the dearest model in ParetoBandit's own registry
FLOOR, ANCHOR = 0.0001, 0.10  # USD per thousand tokens: its market anchors
# its defaults, and what may serve it better: more exploration, no price limit (while there is one, the dearest arm is
# left out at any penalty), penalties in proportion to the cost, slower steps
GRID: dict[str, dict[str, Any]] = {
    "paretobandit": {},
    "paretobandit, alpha 0.1": {"alpha": 0.1},
    "paretobandit, soft": {"mode": "soft"},
    "paretobandit, soft, linear": {"mode": "soft", "linear": True},
    "paretobandit, soft, linear, lr 0.01": {"mode": "soft", "linear": True, "lr": 0.01},
    "paretobandit, soft, linear, lr 0.01, alpha 0.1": {"mode": "soft", "linear": True, "lr": 0.01, "alpha": 0.1},
}


class PacedParetoBandit(ParetoBandit):
    """ParetoBandit with its own budget pacer.

    Args:
        given: see Peer.
        ceiling: in the unit of the arms' prices.
        linear: penalties in proportion to the cost, in place of its logarithm.
        mode, lr: of the pacer.
        options: of the bandit.
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
        self._normalised = {
            name: price / dearest if linear else log_normalize_cost(DEAREST * price / dearest, FLOOR, ANCHOR)
            for name, price in self._price.items()
        }

    def choose(self, x: Vector) -> int:
        limit = self.pacer.get_cost_ceiling_per_1k(max(self._price.values())) if self.pacer.uses_hard else None
        allowed = [name for name, price in self._price.items() if limit is None or price <= limit] or list(self._price)
        penalties = self.pacer.get_extra_cost_penalties(self._normalised) if self.pacer.uses_soft else {}
        total = {name: self._penalties[name] + penalties.get(name, 0.0) for name in allowed}
        arm, _ = self.bandit.select_arm(x, candidates=allowed, cost_penalties=total)
        self.bandit.mark_selected(arm)
        return self._index[arm]

    def update(self, x: Vector, arm: int, score: float) -> None:
        super().update(x, arm, score)
        self.pacer.observe(self._price[self.arms[arm].name])


def mix(scores: Vector, costs: Vector, ceiling: float) -> float:
    """Best mean score of choosing arms at random with fixed probabilities, known in hindsight, under the ceiling.

    Args:
        scores: [K] means.
        costs: [K] means, of which one at least is under the ceiling.
        ceiling: of the mean cost.
    """
    best = float(scores[costs <= ceiling].max())
    for i in np.flatnonzero(costs <= ceiling):
        for j in np.flatnonzero(costs > ceiling):
            share = (ceiling - costs[i]) / (costs[j] - costs[i])
            best = max(best, float((1 - share) * scores[i] + share * scores[j]))
    return best


def measure(stream: Stream, ours: str, shuffle: int, peers: Sequence[str] = tuple(GRID)) -> list[dict[str, Any]]:
    """A row for our policy without a ceiling, with our pacer, and for ParetoBandit with its own.

    The ceiling binds where the pacer's price is above zero at the end. `curve` is the running mean of the cost over
    the ceiling, minus one.

    Args:
        stream: at constant prices.
        ours: name of the policy.
        shuffle: seed.
        peers: names in GRID.
    """
    arms, objective = stream.arms_at(0), Objective()
    free = play(make_policy(ours, arms), stream, objective, np.random.default_rng((shuffle, 1)))
    ceiling = float(stream.costs[0].min() + free.cost_usd.mean()) / 2
    pacer = Pacer(ceiling)
    paced = play(make_policy(ours, arms), stream, objective, np.random.default_rng((shuffle, 2)), pacer=pacer)
    rows = [_row(f"{ours} without", free, ceiling), _row(f"{ours} with pacer", paced, ceiling)]
    rows[1]["binds"] = float(pacer.cost_weight > 0)
    if rows[1]["binds"]:
        rows[1]["off by where it binds, %"] = rows[1]["off by, %"]
    for name in peers:
        given = arms, 0.0, len(stream.profiles[0].features), shuffle
        peer = PacedParetoBandit(*given, ceiling=ceiling, **GRID[name])
        rows.append(_row(name, play(peer, stream, objective, np.random.default_rng((shuffle, 3))), ceiling))
    reference = mix(stream.scores.mean(axis=0), stream.costs[0], ceiling)
    return [*rows, {"strategy": "best fixed mix", "score": reference, "off by, %": 0.0, "curve": []}]


def _row(name: str, trace: Trace, ceiling: float) -> dict[str, Any]:
    running = np.cumsum(trace.cost_usd) / np.arange(1, len(trace.cost_usd) + 1) / ceiling - 1
    off = 100 * float(running[-1])
    second = 100 * (float(trace.cost_usd[len(running) // 2 :].mean()) / ceiling - 1)
    row = {"strategy": name, "score": float(trace.score.mean()), "cost over ceiling, %": off, "off by, %": abs(off)}
    return row | {"second half, %": second, "curve": running.tolist()}
