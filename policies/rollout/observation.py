"""Observation: what a policy that does not decide would have done, beside the rule that decides.

Agreement is a fact. The differences in score, latency and cost are the policy's own estimates: they are worth no more
than what it has learned, and a rule that always asks the same arm teaches nothing about the others. Measured
differences need a share of the traffic (comparison.py).
"""

from dataclasses import dataclass

import msgspec

from policies.events import Decision

BLOCK = 500  # requests; expected differences are means over the last one to two blocks


class ExpectedSums(msgspec.Struct):
    """Sums over `requests` of the policy's estimate for its own choice less that for the rule's choice."""

    requests: int = 0
    score: float = 0.0
    latency_s: float = 0.0
    cost_usd: float = 0.0
    utility: float = 0.0


@dataclass(frozen=True)
class ExpectedDifference:
    """The mean over `requests` of what the policy expects to change; None without any request.

    A negative latency or cost is a saving.
    """

    requests: int
    score: float | None = None
    latency_s: float | None = None
    cost_usd: float | None = None
    utility: float | None = None


class Observation(msgspec.Struct):
    """Counts the choices of a rule and of the policy that is tried beside it.

    Only requests that leave a choice count: two arms or more that no limit excludes.

    requests: number of requests.
    agreed: those for which both choose the same arm.
    chosen, by_rule: by arm, how often the policy and the rule chose it.
    scored: by arm, the number of answers with a score from which the policy has learned meanwhile. Requests whose
        client named the model, and answers that no client asked for, are among them.
    earlier, latest: the last full block of requests, and the block that is being filled.
    """

    requests: int = 0
    agreed: int = 0
    chosen: dict[str, int] = {}
    by_rule: dict[str, int] = {}
    scored: dict[str, int] = {}
    earlier: ExpectedSums = msgspec.field(default_factory=ExpectedSums)
    latest: ExpectedSums = msgspec.field(default_factory=ExpectedSums)

    def add(self, decision: Decision) -> None:
        """Count a decision that leaves a choice, and for which rule and policy both chose an arm."""
        self.requests += 1
        self.agreed += decision.rule == decision.shadow
        _count(self.chosen, decision.shadow)
        _count(self.by_rule, decision.rule)
        own = decision.tried_estimate(decision.shadow)
        other = decision.tried_estimate(decision.rule)
        if self.latest.requests >= BLOCK:
            self.earlier = self.latest
            self.latest = ExpectedSums()
        sums = self.latest
        sums.requests += 1
        sums.score += own.quality - other.quality
        sums.latency_s += own.latency_s - other.latency_s
        sums.cost_usd += own.cost_usd - other.cost_usd
        sums.utility += decision.expected_reward(own) - decision.expected_reward(other)

    def add_score(self, arm: str) -> None:
        """Count an answer of this arm that got its first score."""
        _count(self.scored, arm)

    @property
    def scores(self) -> int:
        """Number of answers with a score."""
        return sum(self.scored.values())

    @property
    def agreement(self) -> float | None:
        """Share of the requests for which both choose the same arm; None without any request."""
        return self.agreed / self.requests if self.requests else None

    def expected(self) -> ExpectedDifference:
        """What the policy expects to change, over the last one to two blocks."""
        blocks = (self.earlier, self.latest)
        n = sum(block.requests for block in blocks)
        if not n:
            return ExpectedDifference(0)
        return ExpectedDifference(
            requests=n,
            score=sum(block.score for block in blocks) / n,
            latency_s=sum(block.latency_s for block in blocks) / n,
            cost_usd=sum(block.cost_usd for block in blocks) / n,
            utility=sum(block.utility for block in blocks) / n,
        )


def leaves_choice(decision: Decision) -> bool:
    """Whether rule and policy both chose an arm, and the request's limits left the policy two arms or more."""
    if not (decision.rule and decision.shadow):
        return False
    estimates = decision.shadow_estimates or decision.estimates
    return sum(not estimate.removed_by for estimate in estimates) > 1


def _count(counts: dict[str, int], arm: str) -> None:
    counts[arm] = counts.get(arm, 0) + 1
