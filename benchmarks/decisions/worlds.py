"""Worlds with a known truth, in which few answers are scored: `python -m benchmarks.decisions.worlds`.

All requests are alike, and each arm has a true quality and a true rate of failures. Failures are always seen, and a
score is seen for a share of the answers. The table says what the policy makes of it.

- flaky: 0.95 quality and 3 % failures beside a steady 0.80; share of the better arm in the second half.
- decay: the better arm begins to fail in 30 %; its own requests until it has lost half of its share.
- outage: the better arm fails 20 times in a row; its share in the 200 requests after its recovery.
- sources: five sources give every score, and nothing changes; false alarms of the drift test per 10,000 decisions.
- halving: the quality of an arm halves; its own scores until the drift test finds it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from policies.events import Decision, Feedback, Outcome
from policies.feedback.decision_records import DecisionRecords
from policies.profiling import features
from policies.thompson.policy import Thompson
from policies.types import Arm, Objective, Request

BETTER = "better"
STEADY = "steady"
ARMS = (Arm(BETTER), Arm(STEADY))
TEXT = "What is 347 plus 586?"
EXPLORE = 0.2  # as the judge's default
WINDOW = 50  # decisions over which a share is averaged


@dataclass(frozen=True)
class Truth:
    """The true quality of each arm's unflawed answers, and its rate of failures."""

    quality: tuple[float, float]
    failures: tuple[float, float] = (0.0, 0.0)


class World:
    """A policy in a world.

    Args:
        seed: of all random choices.
        scored: share of the answers that are scored.
        judged: whether the policy knows beforehand which.
        sources: number of sources that give the same score.
    """

    def __init__(
        self, seed: int, scored: float = 0.05, judged: bool = True, sources: int = 1
    ):
        self.policy = Thompson(ARMS)
        self.chosen: list[int] = []
        self.alarms = 0
        self._rng = np.random.default_rng(seed)
        self._records = DecisionRecords()
        self._scored = scored
        self._judged = judged
        self._sources = sources
        self._profile = features.profile(
            TEXT, features.Reading("arithmetic"), None, "chat", 20
        )

    def play(
        self,
        truth: Truth,
        count: int,
        until: Callable[[], bool] = lambda: False,
        arm: str = "",
    ) -> int:
        """Play so many requests, or until a condition holds; returns how many were played.

        Args:
            truth: of these requests.
            count: largest number of requests.
            until: is asked after each request.
            arm: the only arm that may be chosen; "" for all.
        """
        for played in range(count):
            if until():
                return played
            self._request(truth, arm)
        return count

    def _request(self, truth: Truth, arm: str) -> None:
        n = len(self.chosen)
        rng = self._rng
        judged = bool(rng.random() < self._scored)
        chance = float(judged) if self._judged else self._scored
        objective = Objective(models=(arm,) if arm else ())
        explore = EXPLORE * (1.0 - self._scored) if self._judged and judged else 0.0
        request = Request(
            f"d{n}", self._profile, objective, score_chance=chance, explore=explore
        )
        self.policy.advance(n, self._records.scored)
        (decision,) = self.policy.decide([request], {}, rng, n)
        k = int(decision.arm == STEADY)
        self.chosen.append(k)
        self._apply(decision)
        if rng.random() < truth.failures[k]:
            self._apply(Outcome(decision.id, "error"))
            return
        self._apply(Outcome(decision.id, output_tokens=10, latency_s=1.0))
        if judged:
            score = float(rng.random() < truth.quality[k])
            for source in range(self._sources):
                self._apply(Feedback(decision.id, score, f"source {source}"))

    def _apply(self, event: Decision | Outcome | Feedback) -> None:
        before = list(self.policy.drift.known)
        self._records.apply(event, self.policy, fresh=True)
        # An alarm sets an arm's number of known scores to 0.
        now = self.policy.drift.known
        self.alarms += any(n < m for n, m in zip(now, before, strict=True))

    def share(self, last: int) -> float:
        """Share of the better arm among the latest decisions."""
        return 1.0 - float(np.mean(self.chosen[-last:]))

    def own(self, since: int) -> int:
        """Number of decisions for the better arm since a decision."""
        return self.chosen[since:].count(0)


def flaky(seed: int, scored: float = 0.05, judged: bool = True) -> float:
    """Share of the better arm in the second half of 6,000 requests."""
    world = World(seed, scored, judged)
    world.play(Truth((0.95, 0.80), (0.03, 0.0)), 6000)
    return world.share(3000)


def decay(seed: int) -> int:
    """Own requests of the better arm, once it fails in 30 %, until it has lost half of its share."""
    world = World(seed)
    world.play(Truth((0.95, 0.80)), 3000)
    before = world.share(1000)
    start = len(world.chosen)

    def lost() -> bool:
        enough = len(world.chosen) - start >= WINDOW
        return enough and world.share(WINDOW) < before / 2

    world.play(Truth((0.95, 0.80), (0.3, 0.0)), 3000, until=lost)
    return world.own(start)


def outage(seed: int, failures: int = 20, scored: float = 0.05) -> float:
    """Share of the better arm in the 200 requests after its recovery."""
    world = World(seed, scored)
    truth = Truth((0.9, 0.8))
    world.play(truth, 3000)
    world.play(Truth((0.9, 0.8), (1.0, 0.0)), failures, arm=BETTER)
    world.play(truth, 200)
    return world.share(WINDOW)


def sources(seed: int, count: int = 10_000) -> int:
    """False alarms of the drift test in so many decisions, each scored by five sources."""
    world = World(seed, scored=1.0, sources=5)
    world.play(Truth((0.8, 0.8)), count)
    return world.alarms


def halving(seed: int) -> int:
    """Own scores of an arm whose quality halves until the drift test finds it."""
    world = World(seed, scored=1.0)
    world.play(Truth((0.8, 0.5)), 1000, arm=BETTER)
    before = world.alarms
    truth = Truth((0.4, 0.5))
    return world.play(truth, 1000, until=lambda: world.alarms > before, arm=BETTER)


def table(seeds: int) -> pd.DataFrame:
    """A row for each world: the figure over the seeds, and the bar."""
    by_judge = [flaky(seed) for seed in range(seeds)]
    by_users = [flaky(seed, judged=False) for seed in range(seeds)]
    lost = [decay(seed) for seed in range(seeds)]
    back = [outage(seed) for seed in range(seeds)]
    back_all = [outage(seed, scored=1.0) for seed in range(seeds)]
    alarms = [sources(seed) for seed in range(min(seeds, 4))]
    found = [halving(seed) for seed in range(seeds)]
    rows = [
        ("flaky, 5 % by a judge", np.mean(by_judge), "≥ 0.95", min(by_judge)),
        ("flaky, 5 % by users", np.mean(by_users), "≥ 0.95", min(by_users)),
        ("decay, own requests", np.mean(lost), "≤ 200", max(lost)),
        ("outage, 5 % by a judge", np.mean(back), "> 0.9", min(back)),
        ("outage, all scored", np.mean(back_all), "> 0.9", min(back_all)),
        ("sources, alarms", np.mean(alarms), "≤ 1", max(alarms)),
        ("halving, own scores", np.mean(found), "see docs", max(found)),
    ]
    return pd.DataFrame(rows, columns=["world", "mean", "bar", "worst"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    print(table(parser.parse_args().seeds).round(3).to_markdown(index=False))


if __name__ == "__main__":
    main()
