"""Tests of the questions for a language model, and of the rules that judge its replies."""

import random

import pytest

from assets import talk
from assets.talk import KINDS, make_talk
from assets.tasks import KINDS as CALCULATIONS
from assets.tasks import Task, check, is_reserved, reply
from deployments.demonstration.run import level_of, make_stream, stream_for
from tests.support.requests import read

RIGHT = {
    "capital": "The capital of Japan is Tokyo.",
    "continent": "Japan is a country in Asia, and it has many islands.",
    "opposite": 'The opposite of "hot" is "cold".',
    "plural": "The plural of mouse is mice.",
    "sentence": "The old tree stands beside the river.",
}
WRONG = {
    "capital": "The capital of Japan is Kyoto.",
    "continent": "Japan is a country in Europe.",
    "opposite": "The opposite of hot is coldness",
    "plural": "The plural of mouse is mouses.",
    "sentence": "tree",
}
ASKED = {"capital": "Japan", "continent": "Japan", "opposite": "hot", "plural": "mouse"}


def task_of(kind: str, asked: str) -> Task:
    """A question of this kind about this word."""
    rng = random.Random(0)
    while (task := make_talk(rng, kind)).text != asked:
        pass
    return task


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_accepts_right_replies_and_no_wrong_ones(kind: str) -> None:
    """Whatever the case, and with spaces around; what the models that calculate say is wrong."""
    task = task_of(kind, ASKED.get(kind, "tree"))
    assert check(task, RIGHT[kind]) and check(task, f"\n{RIGHT[kind].upper()} ")
    assert not check(task, WRONG[kind])
    rng = random.Random(1)
    for size in ("nano", "small", "large"):
        for other in make_stream(2, 200):
            assert not check(make_talk(rng, kind), reply(other, size))


def test_the_answer_itself_is_right_where_a_fact_is_asked_for() -> None:
    """Every pair of a question and its answer."""
    rng = random.Random(0)
    for kind in ("capital", "continent", "opposite", "plural"):
        for _ in range(300):
            task = make_talk(rng, kind)
            assert check(task, f"It is {task.answer}."), task
            assert not check(task, task.question) or task.answer in task.question, task


def test_every_kind_has_enough_questions() -> None:
    """At least ten reserved ones for the calibration, and ten times as many for the demo."""
    for kind in KINDS:
        drawn = {
            reserved: {
                make_talk(random.Random(seed), kind, reserved).question
                for seed in range(800)
            }
            for reserved in (True, False)
        }
        assert len(drawn[True]) >= 10 and len(drawn[False]) >= 100
        assert all(map(is_reserved, drawn[True]))
        assert not any(map(is_reserved, drawn[False]))


def test_hardly_any_question_looks_like_a_calculation() -> None:
    """So the prior by kind of the default configuration sends 99 of 100 to the language model."""
    rng = random.Random(0)
    texts = [make_talk(rng, kind).question for kind in KINDS for _ in range(200)]
    wrong = [text for text in texts if read(text).kind in ("arithmetic", "strings")]
    assert len(wrong) <= len(texts) / 100, set(wrong)


def test_the_demo_talks_if_the_language_model_is_served() -> None:
    """Every kind about equally often with it; without it the stream is that of the calculations alone."""
    names = ["nano", "small", "large"]
    assert stream_for(names, 3, 50) == make_stream(3, 50)
    stream = stream_for([*names, talk.MODEL], 3, 3200)
    kinds = [task.kind for task in stream]
    for kind in (*KINDS, *CALCULATIONS):
        assert 150 < kinds.count(kind) < 250
    assert {level_of(kind) for kind in KINDS} == {"talk"}
    assert {level_of(kind) for kind in CALCULATIONS} == {"easy", "medium", "hard"}
    assert stream == stream_for([*names, talk.MODEL], 3, 3200)
