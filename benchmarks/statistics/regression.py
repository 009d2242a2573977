"""The regression watch after a promotion: how fast it finds a regression, and how often it is wrong.

`watching` gives the rewards to the test itself. `rolled_back` sends requests, of which few are scored and failures are
always seen, through the rollout of a router (deployments/router/rollout.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from deployments.journal.snapshot import Snapshot
from deployments.router.rollout import Rollout
from deployments.settings import GatewaySettings
from policies.events import ArmEstimate, Decision, Feedback, Outcome, Record
from policies.registry import make_policy
from policies.rollout.regression_watch import RegressionTest
from policies.rollout.roles import CHALLENGER, CHAMPION
from policies.types import Objective, TaskProfile

KINDS = ("code", "chat")
BEFORE = 4000  # requests before the promotion
LATER_S = 1e10  # time of the requests after the promotion, later than the present


@dataclass(frozen=True)
class Arm:
    """One arm of a world, which is all that a policy of this benchmark chooses.

    quality: share of good answers among those without a failure, by kind.
    failures: share of failures.
    scored: share of the answers without a failure that are scored, by kind.
    slow: share of the requests that a hedge with the other arm answers, late.
    """

    quality: tuple[float, float]
    failures: float = 0.0
    scored: tuple[float, float] = (0.05, 0.05)
    slow: float = 0.0


FLAKY = Arm((0.95, 0.95), failures=0.03)  # mean score 0.921
STEADY = Arm((0.80, 0.80))
BY_KIND = (0.20, 0.02)
# On the mean of both kinds the first is worse by 0.05, and better where most scores are.
CODER = Arm((0.85, 0.40), scored=BY_KIND)
TALKER = Arm((0.55, 0.80), scored=BY_KIND)
# A hedge after 4 s answers half of the first one's requests; a second is worth 0.1.
SLOW = Arm((0.80, 0.80), slow=0.5)
OFTEN = Arm((0.80, 0.80), scored=(0.10, 0.10))


@dataclass(frozen=True)
class Promotion:
    """A promotion in a world.

    promoted, predecessor: what each policy always chooses.
    judged: whether the scored answers are a judge's sample, known before the decision.
    worse: whether the promoted policy is worse by more than the margin.
    longer: so many times as long is the watch, because a worse policy is found after many requests.
    """

    promoted: Arm
    predecessor: Arm
    judged: bool = False
    worse: bool = False
    longer: int = 1


PROMOTIONS = {
    "flaky 0.921 after steady 0.80, users": Promotion(FLAKY, STEADY),
    "flaky 0.921 after steady 0.80, judge": Promotion(FLAKY, STEADY, judged=True),
    "steady 0.80 after flaky 0.921, users": Promotion(
        STEADY, FLAKY, worse=True, longer=3
    ),
    "steady 0.80 after flaky 0.921, judge": Promotion(
        STEADY, FLAKY, judged=True, worse=True, longer=3
    ),
    "as good, scored twice as often": Promotion(OFTEN, STEADY),
    "better by 0.05, rates by kind": Promotion(TALKER, CODER),
    "worse by 0.05, rates by kind": Promotion(CODER, TALKER, worse=True),
    "slow, hedged": Promotion(SLOW, STEADY, worse=True),
}
NAMES = ("promoted", "predecessor")


class Trial:
    """One promotion, request by request, in the rollout of a router without Ray.

    Args:
        world: the promotion.
        rng: of all random choices.
    """

    def __init__(self, world: Promotion, rng: np.random.Generator):
        self._arms = (world.promoted, world.predecessor)
        self._judged = world.judged
        self._rng = rng
        self._made = 0
        settings = make_settings()
        self._share = settings.rollout.watch_share
        self.rollout = Rollout(settings)
        self.rollout.make()
        options = {"arm": NAMES[0]}
        snapshot = Snapshot("always", NAMES, 0, 1, {}, options=options)
        policy = make_policy("always", settings.arms(), options)
        self.rollout.assign_role(CHALLENGER, policy, snapshot, 0.1, "")

    def play(self, promoted: bool) -> None:
        """One request, by the promoted policy or by its predecessor."""
        k = int(not promoted)
        kind = int(self._rng.random() < 0.5)
        judged = self._judged and bool(self._rng.random() < self._arms[k].scored[kind])
        chance = float(judged) if self._judged else 0.5
        role = CHAMPION if self.rollout.watch is None or promoted else CHALLENGER
        first = self._decide(k, kind, chance, self.rollout.label(role))
        record = self._apply(first)
        late_s = 0.0
        if self._rng.random() < self._arms[k].slow:
            k = 1 - k
            late_s = 4.0
            lost = Outcome(first.id, "disconnected", latency_s=late_s)
            self._finish(record, lost)
            record = self._apply(self._hedge(first, k, late_s))
        arm = self._arms[k]
        name = record.decision.id
        if self._rng.random() < arm.failures:
            self._finish(record, Outcome(name, "error", latency_s=1.0))
            return
        self._finish(record, Outcome(name, latency_s=1.0))
        scored = self._rng.random() < arm.scored[kind]
        if judged if self._judged else scored:
            good = float(self._rng.random() < arm.quality[kind])
            record.scores["user"] = good
            self.rollout.record(Feedback(name, good), record)

    def _decide(self, k: int, kind: int, chance: float, label: str) -> Decision:
        self._made += 1
        estimates = tuple(
            ArmEstimate(name, propensity=0.5, quality=0.8) for name in NAMES
        )
        decision = Decision(
            f"d{self._rng.integers(1 << 62):x}",
            NAMES[k],
            self._made,
            label,
            PROFILES[kind],
            OBJECTIVE,
            estimates,
            time_s=LATER_S if self.rollout.watch is not None else 0.0,
            score_chance=chance,
        )
        return decision

    def _hedge(self, first: Decision, k: int, late_s: float) -> Decision:
        decision = Decision(
            f"{first.id} hedge",
            NAMES[k],
            first.sequence,
            first.policy_version,
            first.profile,
            first.objective,
            first.estimates,
            fallback="hedge",
            time_s=first.time_s + late_s,
            score_chance=first.score_chance,
            retry_of=first.id,
        )
        return decision

    def _apply(self, decision: Decision) -> Record:
        record = Record(decision)
        self.rollout.record(decision, record)
        return record

    def _finish(self, record: Record, outcome: Outcome) -> None:
        record.outcome = outcome
        self.rollout.record(outcome, record)

    def run(self, most: int) -> int:
        """Number of requests after the promotion until it is rolled back, or -1."""
        for _ in range(BEFORE):
            self.play(promoted=bool(self._rng.random() < 0.1))
        self.rollout.promote("")
        for n in range(most):
            self.play(promoted=bool(self._rng.random() >= self._share))
            if self.rollout.watch is None:
                rolled_back = self.rollout.summary().history[-2].what == "rolled back"
                return n + 1 if rolled_back else -1
        return -1


PROFILES = tuple(TaskProfile(np.ones(1), "chat", kind, 20) for kind in KINDS)
OBJECTIVE = Objective(latency_weight=0.1)


def make_settings() -> GatewaySettings:
    """The settings of a router with two arms, and the default watch."""
    return GatewaySettings.model_validate(
        {
            "models": {name: {} for name in NAMES},
            "policy": {"name": "always", "options": {"arm": NAMES[1]}},
            "rollout": {"watch_alpha": 0.05, "watch_margin": 0.02},
        }
    )


def rolled_back(
    names: Sequence[str], runs: int, most: int, seed: int
) -> list[dict[str, object]]:
    """Share of these promotions that are rolled back, with few scores and failures that are always seen."""
    rows: list[dict[str, object]] = []
    for name in names:
        world = PROMOTIONS[name]
        ends = np.array(
            [
                Trial(world, np.random.default_rng((seed, run))).run(
                    most * world.longer
                )
                for run in tqdm(range(runs), desc=name)
            ]
        )
        stopped = ends[ends > 0]
        rows.append(
            {
                "promotion": name,
                "requests": most * world.longer,
                "runs": runs,
                "should be rolled back": world.worse,
                "rolled back": len(stopped) / runs,
                "median requests": float(np.median(stopped)) if len(stopped) else None,
            }
        )
    return rows


def watch_once(
    watch: RegressionTest,
    rng: np.random.Generator,
    change: int,
    drop: float,
    share: float,
    most: int,
) -> int:
    """Number of requests until the roll-back, or -1. The mean reward of 0.7 drops at request `change`."""
    old = rng.random(most) < share
    level = np.where(old | (np.arange(most) < change), 0.7, 0.7 - drop)
    rewards = rng.random(most) < level
    for n in range(most):
        if watch.observe(float(rewards[n]), bool(old[n])):
            return n + 1
    return -1


def watching(runs: int, most: int, seed: int) -> list[dict[str, object]]:
    """Requests until a planted regression is rolled back, and the rate of false alarms."""
    modes = {"reference 0.7": (0.7, 0.0), "10 % to the predecessor": (None, 0.1)}
    plans = [(0, 0.2), (0, 0.1), (2000, 0.2), (2000, 0.1), (0, 0.0)]
    rows = []
    todo = [(mode, change, drop) for mode in modes for change, drop in plans]
    for mode, change, drop in todo:
        reference, share = modes[mode]
        ends = [
            watch_once(
                RegressionTest(reference),
                np.random.default_rng((seed, run)),
                change,
                drop,
                share,
                most,
            )
            for run in tqdm(range(runs), desc=f"watch, {mode}, drop {drop} at {change}")
        ]
        stopped = np.array([end for end in ends if end > 0])
        early = float((stopped <= change).sum() / runs) if drop else len(stopped) / runs
        row: dict[str, object] = {
            "test": mode,
            "drop": drop,
            "from request": change,
            "false alarms": early,
        }
        if drop:
            delays = []
            for end in ends:
                if end > change:
                    delays.append(end - change)
                elif end <= 0:
                    delays.append(most)
            after = np.array(delays)
            row |= {
                "rolled back": float((after < most).mean()),
                "median": float(np.median(after)),
                "p90": float(np.quantile(after, 0.9)),
            }
        rows.append(row)
    return rows
