"""The reasons why an arm cannot be chosen, and the sentences that decision records store for them."""

from dataclasses import replace

import pytest

from policies.capabilities import Capability
from policies.constraints import (
    Exclusion,
    candidates,
    load,
    removed,
    total_load,
)
from policies.types import Arm, ModelState, Objective
from tests.support.requests import make_profile

STORED = {
    "not among the request's models": (Exclusion.NOT_ALLOWED, ()),
    "its line is full": (Exclusion.QUEUE_FULL, ()),
    "its circuit breaker is open after failures in a row": (Exclusion.CIRCUIT_OPEN, ()),
    "does not do the task 'embed'": (Exclusion.TASK, ("embed",)),
    "prompt of 500 tokens does not fit its context of 300": (
        Exclusion.CONTEXT,
        ("500 tokens", 300),
    ),
    "no healthy replica": (Exclusion.NO_REPLICA, ()),
    "expected latency 1.23 s is over the limit of 0.5 s": (
        Exclusion.LATENCY,
        (1.2345, 0.5),
    ),
    "expected cost 0.00123 USD is over the limit of 0.001 USD": (
        Exclusion.COST,
        (0.0012345, 0.001),
    ),
    "cannot call tools": (Exclusion.CAPABILITY, (Capability.TOOLS.words,)),
    "it gave the first answer": (Exclusion.ANSWERED, ()),
    "it was not idle": (Exclusion.NOT_IDLE, ()),
    "answers another way than reasoning_effort asks": (
        Exclusion.VARIANT,
        ("reasoning_effort",),
    ),
    "is not for texts in 'de'": (Exclusion.LANGUAGE, ("de",)),
}


@pytest.mark.parametrize("sentence", STORED)
def test_stored_sentences_of_exclusions_do_not_change(sentence: str) -> None:
    """Journals hold them, so each is written byte for byte as before and is read back as its reason."""
    reason, details = STORED[sentence]
    assert reason.sentence(*details) == sentence
    assert Exclusion.of(sentence) is reason


def test_every_exclusion_has_a_stored_sentence() -> None:
    """A new reason needs a sentence that no other reason's sentence begins with."""
    assert {reason for reason, _ in STORED.values()} == set(Exclusion)


@pytest.mark.parametrize("sentence", ["", "it cannot do chat"])
def test_an_unknown_sentence_states_no_exclusion(sentence: str) -> None:
    """An arm that was eligible has an empty sentence."""
    assert Exclusion.of(sentence) is None


def test_an_arm_that_lacks_a_need_is_excluded() -> None:
    """Every capability has words for the sentence, which is read back; an arm without the need stays."""
    arms = (Arm("small"), Arm("large"))
    for capability in Capability:
        profile = replace(make_profile(), needs=(capability.value,))
        states = (ModelState(lacks=frozenset({capability.value})), ModelState())
        without, able = removed(arms, profile, Objective(), states)
        assert without == f"cannot {capability.words}" and able == ""
        assert Exclusion.of(without) is Exclusion.CAPABILITY
        assert removed(arms, make_profile(), Objective(), states) == ["", ""]


def test_an_arm_for_other_languages_is_excluded_if_another_remains() -> None:
    """An arm that names no language is for all; a text whose language is not sure may go anywhere."""
    arms = (Arm("english", languages=("en",)), Arm("both", languages=("en", "de")))
    everything = Arm("all")
    states = (ModelState(), ModelState(), ModelState())
    german = replace(make_profile(), language="de")
    other = Exclusion.LANGUAGE.sentence("de")
    assert removed(arms, german, Objective(), states) == [other, ""]
    assert removed((*arms, everything), german, Objective(), states) == [other, "", ""]
    assert removed(arms, make_profile(), Objective(), states) == ["", ""]
    # no arm is for Polish, the only one for German is ill, and the client names the English one
    polish = replace(german, language="pl")
    assert removed(arms, polish, Objective(), states) == ["", ""]
    ill = (ModelState(), ModelState(healthy=False))
    assert removed(arms, german, Objective(), ill)[0] == ""
    named = Objective(models=("english",))
    assert removed(arms, german, named, states)[0] == ""


def test_language_and_room_together_leave_an_arm() -> None:
    """The language counts first: the arm for it stays without room for the longest answer, and the engine cuts it."""
    profile = replace(make_profile(), language="de", max_output_tokens=600)
    roomy = Arm("roomy", context_tokens=5_000, languages=("en",))
    german = Arm("german", context_tokens=600, languages=("de",))
    states = (ModelState(), ModelState())
    reasons = removed((roomy, german), profile, Objective(), states)
    assert reasons == [Exclusion.LANGUAGE.sentence("de"), ""]


def test_the_load_of_an_application_counts_once() -> None:
    """A variant has the requests in flight of its model."""
    arms = (Arm("small"), Arm("large"), Arm("direct", variant_of="large"))
    busy = ModelState(in_flight=5)
    states = {"small": ModelState(in_flight=2), "large": busy, "direct": busy}
    assert total_load(arms, states) == 7.0
    assert total_load(arms, {}) == 0.0
    assert load(arms[2], states) == load(arms[1], states) == 5.0


def test_candidates_leave_out_what_can_never_answer() -> None:
    """Another task, another model than those allowed, and a variant that answers another way; not what is only busy."""
    arms = (
        Arm("small"),
        Arm("large"),
        Arm("direct", ("chat",), variant_of="large"),
        Arm("embedder", ("embed",)),
    )
    why = (
        ("small", Exclusion.QUEUE_FULL.sentence()),
        ("large", Exclusion.VARIANT.sentence("reasoning_effort")),
    )
    objective = Objective(unavailable=why)
    names = [arm.name for arm in candidates(arms, "chat", objective)]
    assert names == ["small", "direct"]
    only = replace(objective, models=("large", "direct"))
    assert [arm.name for arm in candidates(arms, "chat", only)] == ["direct"]
