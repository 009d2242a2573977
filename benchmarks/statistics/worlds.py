"""Worlds with a known truth, which produce logs of decisions for the benchmark of the promotion statistics.

There are four kinds of requests and three sizes, and the rewards are 0 or 1. Thompson sampling, with one normal
posterior for each kind and size and an update every ten requests, collects many logs in parallel. An answer may fail
visibly, a hedge may answer in place of the chosen size, and few of the answers may be scored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from policies.evaluation.overlap import LoggedDecisions
from policies.events import ArmEstimate, Decision, Feedback, Outcome, Record
from policies.thompson.propensity import probability_best
from policies.types import Objective, TaskProfile, Vector

BATCH = 10  # decisions between updates of the posterior
TOGETHER = 250  # logs that are collected at once, because of the memory
SIZES = ("nano", "small", "large")
KINDS = ("code", "strings", "chat", "writing")
# mean reward minus cost of each size [3], by kind of request [4]
CLEAR = np.array(
    [[0.80, 0.77, 0.75], [0.40, 0.77, 0.70], [0.30, 0.47, 0.80], [0.10, 0.27, 0.60]]
)
FLAT = np.full((4, 3), 0.5)  # all sizes are equally good
FLAKY = np.tile([0.95, 0.80, 0.60], (4, 1))
# The first size is better at the first two kinds, and worse by 0.05 on the mean of all.
BY_KIND = np.array([[0.85, 0.55, 0.5]] * 2 + [[0.40, 0.80, 0.5]] * 2)


def rule(*sizes: int, noise: float = 0.1) -> Vector:
    """Probabilities [4, 3] of a policy that mostly chooses one given size for each kind of request."""
    return (1 - noise) * np.eye(3)[list(sizes)] + noise / 3


CHAMPION = rule(0, 0, 2, 2)
BETTER = rule(0, 1, 2, 2)
WORSE = rule(0, 0, 1, 2)
ALWAYS = tuple(rule(k, k, k, k, noise=0.0) for k in range(3))


@dataclass(frozen=True)
class World:
    """A world that produces logs.

    means: [4, 3] mean rewards of answers without a visible flaw.
    floor: minimum propensity of each size.
    feedback: share of the answers without a visible flaw that are scored, by size, or by kind and size.
    failures: share of the answers with a visible flaw, by size.
    slow: share of the requests that a hedge with the next size answers, by the chosen size.
    good_scored: a good answer is scored so much less often than a bad one.
    sample: share of a judge's sample, in which the answers of the log are; the others are served without exploration.
        1 if there is no sample.
    """

    means: Vector
    floor: float = 0.03
    feedback: tuple[float, ...] | tuple[tuple[float, ...], ...] = (1.0, 1.0, 1.0)
    failures: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slow: tuple[float, float, float] = (0.0, 0.0, 0.0)
    good_scored: float = 1.0
    sample: float = 1.0

    @property
    def rewards(self) -> Vector:
        """[4, 3] true mean rewards of requests, by the size that was chosen first."""
        own = self.means * (1 - np.array(self.failures))
        slow = np.array(self.slow)
        return np.asarray((1 - slow) * own + slow * np.roll(own, -1, axis=1))

    def value(self, policy: Vector) -> float:
        """True mean reward of a policy [4, 3]."""
        return float((policy * self.rewards).sum(axis=1).mean())


@dataclass(frozen=True, eq=False)
class Log:
    """N decisions of one policy that learned while it decided.

    kinds, chosen, answered_by: [N] the kind, the size that was chosen, and the size that answered.
    propensities, predictions, unflawed: [N, 3] propensities, expected rewards, and those of unflawed answers.
    failed, scored: [N] whether the answer failed, and whether it was scored.
    rewards: [N] 0 or 1, also where they were not seen.
    """

    kinds: NDArray[np.int64]
    chosen: NDArray[np.int64]
    answered_by: NDArray[np.int64]
    propensities: Vector
    predictions: Vector
    unflawed: Vector
    failed: NDArray[np.bool_]
    scored: NDArray[np.bool_]
    rewards: Vector

    def logged(self) -> LoggedDecisions:
        """The arrays of off-policy evaluation, as replay.to_log makes them from `records`."""
        rows = np.arange(len(self.chosen))
        return LoggedDecisions(
            self.chosen,
            self.propensities,
            np.where(self.failed, 0.0, np.where(self.scored, self.rewards, np.nan)),
            self.predictions,
            kinds=self.kinds,
            always_seen=self.failed,
            answers=self.unflawed[rows, self.answered_by],
            answered_by=self.answered_by,
        )

    def naive(self) -> LoggedDecisions:
        """The same, as if the feedback rate depended on the size alone and a hedge's answer were not known."""
        hedged = self.answered_by != self.chosen
        data = self.logged()
        return replace(
            data,
            kinds=None,
            answers=None,
            answered_by=None,
            rewards=np.where(hedged, np.nan, data.rewards),
        )

    def records(self, sample: float = 1.0) -> list[Record]:
        """The decision records. With a judge's sample, as many decisions outside of it are among them."""
        found = []
        spread = max(1, round(1 / sample))
        for n in range(len(self.chosen)):
            found += self._request(n, n * spread)
            for other in range(1, spread):
                found.append(_unsampled(n * spread + other, self.kinds[n]))
        return found

    def _request(self, n: int, sequence: int) -> list[Record]:
        first = int(self.chosen[n])
        other = int(self.answered_by[n])
        decision = self._decision(n, f"d{sequence}", sequence, first)
        if other == first:
            return [self._answered(n, decision)]
        lost = Record(decision, Outcome(decision.id, "disconnected", latency_s=0.5))
        hedge = self._decision(n, f"d{sequence} hedge", sequence, other)
        return [lost, self._answered(n, _hedge_of(hedge, decision.id))]

    def _answered(self, n: int, decision: Decision) -> Record:
        status = "error" if self.failed[n] else "ok"
        record = Record(decision, Outcome(decision.id, status, latency_s=0.5))
        if self.scored[n]:
            score = Feedback(decision.id, float(self.rewards[n]), "judge")
            record.scores[score.source] = score.score
        return record

    def _decision(self, n: int, name: str, sequence: int, arm: int) -> Decision:
        estimates = tuple(
            ArmEstimate(
                size,
                quality=float(self.predictions[n, k]),
                utility=float(self.predictions[n, k]),
                propensity=float(self.propensities[n, k]),
                availability=float(self.predictions[n, k] / self.unflawed[n, k]),
            )
            for k, size in enumerate(SIZES)
        )
        profile = PROFILES[self.kinds[n]]
        return Decision(name, SIZES[arm], sequence, "", profile, Objective(), estimates)


PROFILES = tuple(TaskProfile(np.ones(1), "chat", kind, 20) for kind in KINDS)


def _hedge_of(decision: Decision, first: str) -> Decision:
    return Decision(
        decision.id,
        decision.arm,
        decision.sequence,
        "",
        decision.profile,
        decision.objective,
        decision.estimates,
        fallback="hedge",
        retry_of=first,
    )


def _unsampled(sequence: int, kind: int) -> Record:
    """A decision outside of a judge's sample: the best estimate was served, and nothing was scored."""
    estimates = tuple(ArmEstimate(size, 0.5, propensity=0.0) for size in SIZES)
    served = (*estimates[:2], estimates[2]._replace(propensity=1.0))
    decision = Decision(
        f"d{sequence}",
        SIZES[2],
        sequence,
        "",
        PROFILES[kind],
        Objective(),
        served,
        score_chance=0.01,
    )
    return Record(decision, Outcome(decision.id, latency_s=0.5))


def best_of(mean: Vector, deviation: Vector) -> Vector:
    """See probability_best. Computes 64 rows at a time, so that they stay in the processor's cache."""
    parts = []
    for start in range(0, len(mean), 64):
        rows = slice(start, start + 64)
        allowed = np.ones(mean[rows].shape, dtype=bool)
        parts.append(probability_best(mean[rows], deviation[rows], allowed))
    return np.vstack(parts)


def collect(
    world: World, logs: int, decisions: int, seed: int
) -> Iterator[tuple[LoggedDecisions, NDArray[np.int64]]]:
    """Logs of Thompson-sampling policies that start without data, each with the kinds [N] of its requests."""
    for log in collect_logs(world, logs, decisions, seed):
        yield log.logged(), log.kinds


def collect_logs(world: World, logs: int, decisions: int, seed: int) -> Iterator[Log]:
    """Logs of Thompson-sampling policies that start without data."""
    rng = np.random.default_rng(seed)
    for begin in range(0, logs, TOGETHER):
        yield from _together(world, min(TOGETHER, logs - begin), decisions, rng)


def _together(
    world: World, logs: int, decisions: int, rng: np.random.Generator
) -> Iterator[Log]:
    shape = (logs, decisions)
    kinds = rng.integers(4, size=shape)
    chosen = np.zeros(shape, dtype=np.int64)
    answered_by = np.zeros(shape, dtype=np.int64)
    failed, scored = np.zeros((2, *shape), dtype=bool)
    rewards = np.zeros(shape)
    propensities, predictions, unflawed = np.zeros((3, *shape, 3))
    count, total = np.zeros((2, logs, 4, 3))
    answers, flaws = np.zeros((2, logs, 3))
    failures = np.array(world.failures)
    slow = np.array(world.slow)
    feedback = np.broadcast_to(np.array(world.feedback), (4, 3))
    rows = np.arange(logs)
    for begin in tqdm(range(0, decisions, BATCH), desc="collecting", leave=False):
        available = 1 - (0.02 + flaws) / (1 + answers)  # [logs, 3]
        quality = (0.5 + total) / (1 + count)
        mean = quality * available[:, None]
        deviation = 0.5 / np.sqrt(1 + count)
        table = best_of(mean.reshape(-1, 3), deviation.reshape(-1, 3))
        table = (1 - 3 * world.floor) * table.reshape(logs, 4, 3) + world.floor
        batch = range(begin, min(decisions, begin + BATCH))
        for t in batch:
            kind = kinds[:, t]
            p = table[rows, kind]
            arm = np.minimum((p.cumsum(axis=1) < rng.random((logs, 1))).sum(axis=1), 2)
            by = np.where(rng.random(logs) < slow[arm], (arm + 1) % 3, arm)
            fails = rng.random(logs) < failures[by]
            good = ~fails & (rng.random(logs) < world.means[kind, by])
            rate = feedback[kind, by] * np.where(good, world.good_scored, 1.0)
            chosen[:, t] = arm
            answered_by[:, t] = by
            failed[:, t] = fails
            rewards[:, t] = good
            scored[:, t] = ~fails & (rng.random(logs) < rate)
            propensities[:, t] = p
            predictions[:, t] = mean[rows, kind]
            unflawed[:, t] = quality[rows, kind]
        for t in batch:
            np.add.at(answers, (rows, answered_by[:, t]), 1.0)
            np.add.at(flaws, (rows, answered_by[:, t]), failed[:, t])
            got = np.flatnonzero(scored[:, t])
            cells = (got, kinds[got, t], answered_by[got, t])
            np.add.at(count, cells, 1.0)
            np.add.at(total, cells, rewards[got, t])
    for i in rows:
        yield Log(
            kinds[i],
            chosen[i],
            answered_by[i],
            propensities[i],
            predictions[i],
            unflawed[i],
            failed[i],
            scored[i],
            rewards[i],
        )
