"""What every policy is: two verbs, and a state that can be carried away and brought back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.types import Arm, Decision, ModelState, Objective, Outcome, Request, TaskProfile, Vector

State = dict[str, NDArray[np.float64]]

SHARED = ("reference", "latest")  # last part of the names of arrays in a State that are of all arms together
SENSITIVITY = 3.0  # a text that asks for speed or care makes seconds (and money) weigh this much more or less
PRIOR = 0.5  # score
PRIOR_BY_DECADE = 0.1  # score for a price ten times higher


class Policy(Protocol):
    """Chooses an arm for each request, and learns from what came of it.

    Everything that a decision depends on is an argument or in `state()`: time, live load and random numbers are
    handed in, so that a restart, a replay and an offline evaluation are the same code.
    """

    @property
    def name(self) -> str:
        """As registry.py lists it."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Among which it chooses."""

    def decide(
        self, requests: Sequence[Request], states: Mapping[str, ModelState], rng: np.random.Generator, sequence: int
    ) -> list[Decision]:
        """Decide a batch; `sequence` is the number of decisions made before it.

        A decision's arm is "" if its limits leave none; its estimates then say what removed each.
        """

    def advance(self, sequence: int) -> None:
        """Let the clock of forgetting run on to this decision, as `decide` does; a replay must, or weights overflow."""

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        """Fold in what was measured. A forced decision teaches too: its latency is as true as any other."""

    def score(self, decision: Decision, score: float, weight: float = 1.0, again: bool = False) -> None:
        """Fold in a quality score in [0, 1] for the chosen arm; weight -1 takes an earlier one back exactly.

        `again`: it counted before, was held back (trust.py) or takes the place of one that its source has corrected, so
        it says nothing of how things have changed.
        """

    def state(self) -> State:
        """All that was learned, as named arrays of finite numbers."""

    def restore(self, state: State) -> None:
        """Take over what another policy of the same name and arms had learned.

        Raises:
            ValueError: an array is missing, has another shape, or is not finite.
        """


def as_meant(requests: Sequence[Request]) -> list[Request]:
    """The requests with their objectives moved by what their texts say about haste and care.

    Done once, before anybody decides, so that all policies are asked, and judged, by the same objective.
    """
    return [replace(r, objective=moved) if (moved := _moved(r)) is not r.objective else r for r in requests]


def _moved(request: Request) -> Objective:
    objective, profile = request.objective, request.profile
    haste, care = profile.time_sensitivity, profile.accuracy_sensitivity
    if not haste and not care:
        return objective
    return replace(
        objective,
        latency_weight=objective.latency_weight * SENSITIVITY ** (haste - care),
        cost_weight=objective.cost_weight * SENSITIVITY**-care,
    )


def rebased(state: State, sequence: int) -> State:
    """The same as if the decision of this number had been the first: for a clock that begins anew."""
    moved = {}
    for name, array in state.items():
        part = name.rpartition(".")[2]
        moved[name] = array - sequence if part in SHARED else array.copy()
        if part == "cuts":
            moved[name][..., 0] -= sequence
    return moved


def prior_quality(arms: Sequence[Arm]) -> Vector:
    """[K] scores to expect of arms of which nothing is known: what the operator says, or else what the price says.

    On the middle one of the recorded streams a price ten times higher goes with 0.1 more (benchmarks/LOG.md).
    Prices are those of a token in and one out, beside the geometric mean of all arms; without a price it is PRIOR.
    """
    prices = np.array([arm.prompt_price_usd + arm.output_price_usd for arm in arms])
    beyond, priced = np.zeros(len(arms)), prices > 0
    if priced.any():
        decades = np.log10(prices[priced])
        beyond[priced] = decades - decades.mean()
    by_price = np.clip(PRIOR + PRIOR_BY_DECADE * beyond, 0.1, 0.9)
    return np.array([by if arm.prior_quality is None else arm.prior_quality for arm, by in zip(arms, by_price)])


def removed_by(arm: Arm, profile: TaskProfile, objective: Objective, state: ModelState) -> str:
    """The hard limit that takes an arm out before any estimate is made, in words; "" if none does."""
    if objective.models and arm.name not in objective.models:
        return "not among the request's models"
    if objective.unavailable and (reason := dict(objective.unavailable).get(arm.name)):
        return reason
    if profile.task not in arm.tasks:
        return f"does not do the task '{profile.task}'"
    # inputs of an embedding request are read one by one; their model, which nobody chooses, knows which is too long
    if profile.task != "embed" and profile.prompt_tokens >= arm.context_tokens:
        return f"prompt of {profile.prompt_tokens} tokens does not fit its context of {arm.context_tokens}"
    if not state.healthy:
        return "no healthy replica"
    return ""


def removed(arms: Sequence[Arm], profile: TaskProfile, objective: Objective, states: Sequence[ModelState]) -> list[str]:
    """[K] `removed_by` of each arm; and where another has room for it, those without for the longest answer allowed.

    Only then: the prompt's tokens may be an estimate, and the engine, which knows them, refuses what is too long.
    """
    row = [removed_by(arm, profile, objective, state) for arm, state in zip(arms, states)]
    needed = profile.prompt_tokens + profile.max_output_tokens
    tight = [why or ("" if needed <= arm.context_tokens else _no_room(arm, profile)) for arm, why in zip(arms, row)]
    return row if all(tight) else tight


def _no_room(arm: Arm, profile: TaskProfile) -> str:
    asked = f"prompt of {profile.prompt_tokens} tokens, with {profile.max_output_tokens} for the answer,"
    return f"{asked} does not fit its context of {arm.context_tokens}"


def load(arm: Arm, states: Mapping[str, ModelState]) -> float:
    """Requests in flight per ready replica of an arm."""
    state = states.get(arm.name)
    return state.in_flight / max(1, state.replicas) if state else 0.0


def realign(
    state: State, before: Sequence[str], after: Sequence[str], fresh: State, parents: Mapping[str, str] | None = None
) -> State:
    """What was learned about some arms, laid out for others: known arms keep their rows, new ones start afresh.

    Args:
        state: arrays whose first axis is the arms `before`, but for those that all arms share (SHARED).
        before: names of the arms of `state`.
        after: names of the arms wanted.
        fresh: the state of a policy over `after` that knows nothing; gives the shapes.
        parents: of new arms, from which they take the rows.
    """
    rows = {name: i for i, name in enumerate(before)}
    rows |= {name: rows[parent] for name, parent in (parents or {}).items() if name not in rows and parent in rows}
    aligned: State = {}
    for key, blank in fresh.items():
        known = state.get(key)
        if known is None or known.shape[1:] != blank.shape[1:]:
            continue  # left out: restore() will say that it is missing
        if key.rpartition(".")[2] in SHARED:
            aligned[key] = known.copy()
            continue
        aligned[key] = np.stack([known[rows[name]] if name in rows else blank[i] for i, name in enumerate(after)])
    return aligned
