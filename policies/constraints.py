"""The hard limits that exclude an arm before the draw, and the sentences that say which limit it was."""

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from policies.capabilities import Capability
from policies.types import Arm, ModelState, Objective, TaskProfile


class Exclusion(StrEnum):
    """The reasons why an arm cannot be chosen for a request.

    A decision record stores the reason as a sentence (`ArmEstimate.removed_by`). `sentence` writes that sentence and
    `of` reads the reason back from it.
    """

    NOT_ALLOWED = "not_allowed"
    QUEUE_FULL = "queue_full"
    CIRCUIT_OPEN = "circuit_open"
    TASK = "task"
    CONTEXT = "context"
    NO_REPLICA = "no_replica"
    LATENCY = "latency"
    COST = "cost"
    ANSWERED = "answered"
    NOT_IDLE = "not_idle"
    CAPABILITY = "capability"
    VARIANT = "variant"
    LANGUAGE = "language"

    def sentence(self, *details: object) -> str:
        """The sentence for this reason; `details` fill the gaps of its template, in their order."""
        return _TEMPLATES[self].format(*details)

    @staticmethod
    def of(sentence: str) -> "Exclusion | None":
        """The reason that a sentence states; None for "" and for a sentence that `sentence` did not write."""
        for reason, beginning in _BEGINNINGS.items():
            if sentence.startswith(beginning):
                return reason
        return None


# Journals hold these sentences: a changed one could no longer be read back from an older journal.
_TEMPLATES = {
    Exclusion.NOT_ALLOWED: "not among the request's models",
    Exclusion.QUEUE_FULL: "its line is full",
    Exclusion.CIRCUIT_OPEN: "its circuit breaker is open after failures in a row",
    Exclusion.TASK: "does not do the task '{}'",
    Exclusion.CONTEXT: "prompt of {} does not fit its context of {}",
    Exclusion.NO_REPLICA: "no healthy replica",
    Exclusion.LATENCY: "expected latency {:.3g} s is over the limit of {:g} s",
    Exclusion.COST: "expected cost {:.3g} USD is over the limit of {:g} USD",
    Exclusion.ANSWERED: "it gave the first answer",
    Exclusion.NOT_IDLE: "it was not idle",
    Exclusion.CAPABILITY: "cannot {}",
    Exclusion.VARIANT: "answers another way than {} asks",
    Exclusion.LANGUAGE: "is not for texts in '{}'",
}
_BEGINNINGS = {
    reason: template.partition("{")[0] for reason, template in _TEMPLATES.items()
}


def candidates(arms: Iterable[Arm], task: str, objective: Objective) -> list[Arm]:
    """The arms that do a task and that a request allows, whether or not they can be asked now."""
    others = {
        name
        for name, why in objective.unavailable
        if Exclusion.of(why) is Exclusion.VARIANT
    }
    return [
        arm
        for arm in arms
        if task in arm.tasks
        and arm.name not in others
        and (not objective.models or arm.name in objective.models)
    ]


def removed(
    arms: Sequence[Arm],
    profile: TaskProfile,
    objective: Objective,
    states: Sequence[ModelState],
) -> list[str]:
    """[K] the sentence for the hard limit that excludes an arm before any estimate is made; "" if none does.

    An arm that is for other languages than the text's, or that has no room for the longest answer allowed, is excluded
    only if another arm remains. The language is read from the text and may be wrong. The number of prompt tokens may be
    an estimate; the engine knows the exact number and refuses what is too long.
    """
    allowed = objective.models
    unavailable = dict(objective.unavailable)
    task = profile.task
    prompt = profile.longest_prompt_tokens or profile.prompt_tokens
    # An embedding request may hold several inputs, which the model reads one by one. There is no other model to
    # choose, and the engine refuses an input that is too long.
    bounded = task != "embed"
    answer = max(profile.max_output_tokens, profile.min_output_tokens)
    needed = prompt + answer
    needs = profile.needs
    tight = False  # whether some arm has no room for the longest answer
    row = []
    for arm, state in zip(arms, states):
        reason = ""
        if allowed and arm.name not in allowed:
            reason = Exclusion.NOT_ALLOWED.sentence()
        elif unavailable and unavailable.get(arm.name):
            reason = unavailable[arm.name]
        elif task not in arm.tasks:
            reason = Exclusion.TASK.sentence(task)
        elif needs and (lacking := [need for need in needs if need in state.lacks]):
            reason = Exclusion.CAPABILITY.sentence(Capability(lacking[0]).words)
        elif bounded and prompt >= arm.context_tokens:
            reason = Exclusion.CONTEXT.sentence(f"{prompt} tokens", arm.context_tokens)
        elif not state.healthy:
            reason = Exclusion.NO_REPLICA.sentence()
        row.append(reason)
        if needed > arm.context_tokens:
            tight = True
    language = profile.language
    if language:
        wrong = [arm.languages and language not in arm.languages for arm in arms]
        if any(wrong):
            sentence = Exclusion.LANGUAGE.sentence(language)
            row = _unless_all(row, [sentence if is_wrong else "" for is_wrong in wrong])
    if tight:
        asked = f"{prompt} tokens, with {answer} for the answer,"
        no_room = [
            Exclusion.CONTEXT.sentence(asked, arm.context_tokens)
            if needed > arm.context_tokens
            else ""
            for arm in arms
        ]
        row = _unless_all(row, no_room)
    return row


def _unless_all(row: list[str], more: Sequence[str]) -> list[str]:
    """[K] the sentences with those of a further limit, unless that would leave no arm."""
    both = [sentence or further for sentence, further in zip(row, more)]
    return row if all(both) else both


def total_load(arms: Sequence[Arm], states: Mapping[str, ModelState]) -> float:
    """Requests in flight over all arms. Those of an application count once, however many arms it serves."""
    total = sum([state.in_flight for state in states.values()])
    for arm in arms:
        if arm.variant_of and arm.name in states:
            total -= states[arm.name].in_flight
    return float(total)


def load(arm: Arm, states: Mapping[str, ModelState]) -> float:
    """Requests in flight per ready replica of an arm."""
    state = states.get(arm.name)
    if state is None:
        return 0.0
    return state.in_flight / max(1, state.replicas)
