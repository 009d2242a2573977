"""The policy protocol: decide, learn, and a state that can be saved and restored."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.events import Decision, Outcome
from policies.types import Arm, ModelState, Request, Vector

State = dict[str, NDArray[np.float64]]

# The last part of the names of arrays in a State that all arms share.
SHARED = ("reference", "latest")
# The last part of the names of arrays of clock readings.
TICKS = (*SHARED, "changed")
# The last part of the names of arrays whose last axis begins with a sequence number.
DATED = ("cuts", "window")
# The parts of a state whose clock counts scores.
BY_SCORES = ("quality", "clock", "drift")
PRIOR = 0.5  # expected score without a price
PRIOR_BY_DECADE = 0.1  # score points for a price ten times higher


class EventLearner(Protocol):
    """Learns from decisions, their outcomes and their scores."""

    def advance(self, sequence: int, scored: int = -1) -> None:
        """Set the forgetting clocks. A replay must call it, or the weights overflow.

        Args:
            sequence: number of decisions so far; `decide` sets it, too.
            scored: number of decisions that have had a score so far; -1 if it is unknown, and then the number of
                decisions is used.
        """

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Learn from an outcome. A forced decision counts too, because its latency is a valid measurement."""

    def score(
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """Learn from a score of the chosen arm's answer, which has no visible flaw.

        Args:
            decision: of the answer.
            score: in [0, 1].
            weight: -1 withdraws an earlier score exactly.
            again: the score replaces or restores an earlier one, or this policy did not expect anything. It is no
                evidence of drift.
            expected: the score that this policy expected, if another one decided; None takes it from the decision.
        """

    def discount(self, arm: str, events: float) -> None:
        """Reduce what was learned of an arm so far to the weight of at most `events` events of each kind.

        All past events are multiplied by one factor. This is a power prior (Ibrahim and Chen, Statistical Science
        2000): it keeps the means and inflates the variances. An unknown arm changes nothing.
        """


class Policy(EventLearner, Protocol):
    """Chooses an arm for each request, and learns from the outcome.

    Everything that a decision depends on is an argument or in `state()`. Time, live load and random numbers are
    arguments, so a restart, a replay and an offline evaluation run the same code.
    """

    @property
    def name(self) -> str:
        """The policy's name in registry.py."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms among which the policy chooses."""

    def decide(
        self,
        requests: Sequence[Request],
        states: Mapping[str, ModelState],
        rng: np.random.Generator,
        sequence: int,
    ) -> list[Decision]:
        """Decide a batch; `sequence` is the number of decisions made before it.

        A decision's arm is "" if the limits exclude every arm; the estimates then state the reason for each.
        """

    def state(self) -> State:
        """Everything learned, as named arrays of finite numbers."""

    def restore(self, state: State) -> None:
        """Replace what was learned by the state of a policy of the same name and arms.

        Raises:
            ValueError: an array is missing, has another shape, or is not finite.
        """


def shift_sequence(state: State, sequence: int, scored: int) -> State:
    """The state for clocks that restart later.

    Args:
        state: of a policy.
        sequence: number of decisions by which the clock of decisions is reduced.
        scored: number of scored decisions by which the clock of scores is reduced.
    """
    moved = {}
    for name, array in state.items():
        part, _, array_name = name.rpartition(".")
        by_scores = part.rpartition(".")[2] in BY_SCORES
        moved[name] = _shifted(array, array_name, scored if by_scores else sequence)
    return moved


def restart_clock(state: State, part: str) -> State:
    """The state with the arrays of one part shifted so that their clock is at 0."""
    moved = dict(state)
    reference = state.get(f"{part}.reference")
    by = float(reference[0]) if reference is not None else 0.0
    for name, array in state.items():
        own_part, _, array_name = name.rpartition(".")
        if own_part == part:
            moved[name] = _shifted(array, array_name, by)
    return moved


def _shifted(array: NDArray[np.float64], name: str, by: float) -> NDArray[np.float64]:
    """An array of a state whose clock is reduced."""
    if name in TICKS:
        return array - by
    moved = array.copy()
    if name in DATED:
        moved[..., 0] -= by
    return moved


def prior_quality(arms: Sequence[Arm]) -> Vector:
    """[K] expected scores of arms without data: `Arm.prior_quality`, or a value derived from the price.

    In the median recorded stream, a price ten times higher goes with a score 0.1 higher (benchmarks/LOG.md). The price
    is that of one prompt token and one output token, compared with the geometric mean of all priced arms. An arm
    without a price gets PRIOR.
    """
    prices = np.array([arm.prompt_price_usd + arm.output_price_usd for arm in arms])
    beyond = np.zeros(len(arms))
    priced = prices > 0
    if priced.any():
        decades = np.log10(prices[priced])
        beyond[priced] = decades - decades.mean()
    by_price = np.clip(PRIOR + PRIOR_BY_DECADE * beyond, 0.1, 0.9)
    prior = by_price.copy()
    for k, arm in enumerate(arms):
        if arm.prior_quality is not None:
            prior[k] = arm.prior_quality
    return prior


def realign(
    state: State,
    before: Sequence[str],
    after: Sequence[str],
    fresh: State,
    parents: Mapping[str, str] | None = None,
) -> State:
    """A state laid out for other arms: known arms keep their rows, new arms take the rows of `fresh`.

    Args:
        state: arrays whose first axis is the arms `before`, except the arrays that all arms share (SHARED).
        before: names of the arms of `state`.
        after: names of the arms wanted.
        fresh: state of a policy over `after` that has learned nothing; gives the shapes.
        parents: by new arm, the arm whose rows it inherits.
    """
    rows = {name: i for i, name in enumerate(before)}
    for name, parent in (parents or {}).items():
        if name not in before and parent in before:
            rows[name] = rows[parent]
    aligned: State = {}
    for key, blank in fresh.items():
        known = state.get(key)
        if known is None or known.shape[1:] != blank.shape[1:]:
            continue  # restore() will report it as missing
        if key.rpartition(".")[2] in SHARED:
            aligned[key] = known.copy()
            continue
        kept = [
            known[rows[name]] if name in rows else blank[i]
            for i, name in enumerate(after)
        ]
        aligned[key] = np.stack(kept)
    return aligned


def restore_for_arms(policy: Policy, state: State, before: Sequence[str]) -> None:
    """Restore a policy from the state of a policy over other arms.

    A new arm inherits what was learned of its parent, if the parent is among these arms.

    Args:
        policy: the policy to restore, which has learned nothing yet.
        state: state of a policy of the same name.
        before: names of that policy's arms.

    Raises:
        ValueError: see Policy.restore.
    """
    parents = {arm.name: arm.parent for arm in policy.arms}
    policy.restore(realign(state, before, list(parents), policy.state(), parents))
    for arm in policy.arms:
        if arm.name not in before and arm.parent in before:
            policy.discount(arm.name, arm.inherit)


class LearningBuffer:
    """Records the learning events of a policy, so that they can be replayed to another policy later."""

    def __init__(self) -> None:
        self._learned: list[
            tuple[Decision, Outcome] | tuple[Decision, float, float, bool, float | None]
        ] = []

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """See base.Policy."""
        self._learned.append((decision, outcome))

    def score(
        self,
        decision: Decision,
        score: float,
        weight: float = 1.0,
        again: bool = False,
        expected: float | None = None,
    ) -> None:
        """See base.Policy."""
        self._learned.append((decision, score, weight, again, expected))

    def play(self, policy: Policy) -> None:
        """Replay all recorded events to a policy."""
        for item in self._learned:
            if len(item) == 2:
                policy.learn(*item)
            else:
                policy.score(*item)
