"""The templates that the profiler's classifier learns from, and what it has learned."""

import random
import re

import pytest

from assets import talk, tasks
from assets.classifier_card import (
    demo,
    found_and_false,
    held_out,
    languages_read,
    right_kinds,
)
from assets.request_templates import (
    FOLDER,
    HELD_OUT,
    TRAIN,
    draw,
    lines,
    natural,
    templates,
)
from policies.profiling.classifier import LANGUAGES
from policies.profiling.features import KINDS
from tests.support.requests import read

VOCABULARY = ("topic", "word", "text", "to", "care", "haste", "hello")


def plain(text: str) -> str:
    """A template or question without numbers, case and what fills a slot."""
    return re.sub(r"\{\w*\}|\d+|\W+", " ", text.lower()).strip()


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_templates_and_words_are_not_in_the_training(language: str) -> None:
    """Every kind has templates in both parts, and no line is in both."""
    trained, other = lines(language, TRAIN), lines(language, HELD_OUT)
    for name in (*KINDS, *VOCABULARY):
        assert trained[name] and other[name], name
        assert not set(trained[name]) & set(other[name]), name
    whole = {plain(request.text) for request in natural()}
    allowed = set(map(plain, trained["other"] + trained["hello"]))
    assert not whole & {plain(t) for kind in KINDS for t in trained[kind]} - allowed


def test_no_phrase_of_the_demo_is_in_the_training() -> None:
    """The demo's questions are a third held-out set."""
    rng = random.Random(0)
    asked = {
        plain(make(rng, kind).question.replace(word, " "))
        for make, kinds in (
            (tasks.make_task, tasks.KINDS),
            (talk.make_talk, talk.KINDS),
        )
        for kind in kinds
        for _ in range(60)
        for word in (make(rng, kind).text or "no word",)
    }
    trained = {plain(template) for _, _, template in templates(TRAIN)}
    assert not {text for text in asked if len(text) > 3} & trained
    wishes = {plain(wish) for wish in tasks.WISHES if wish and wish != "Hello! "}
    own = lines("en", TRAIN)
    assert not wishes & {plain(wish) for wish in own["care"] + own["haste"]}


def test_a_drawn_request_has_the_labels_of_its_template() -> None:
    """Its slots are filled, and the same generator draws the same requests."""
    for language, kind, template in templates(TRAIN)[::7]:
        found = draw(random.Random(1), language, kind, template, TRAIN)
        assert found == draw(random.Random(1), language, kind, template, TRAIN)
        assert found.kind == kind and found.language == language
        assert not re.search(r"\{(topic|word|text|to|n|letters|passage)\}", found.text)


def test_the_kinds_are_read_in_every_language() -> None:
    """On held-out templates in at least two thirds, of all languages together in four fifths."""
    requests = held_out()
    by_language = {
        language: right_kinds(read, [r for r in requests if r.language == language])
        for language in LANGUAGES
    }
    assert min(by_language.values()) > 0.66, by_language
    assert right_kinds(read, requests) > 0.8


def test_languages_are_read_only_if_sure() -> None:
    """Of the held-out templates in two thirds, and 98 % of these are right; the demo is English, or not sure."""
    for requests in (held_out(), natural()):
        share, right = languages_read(read, requests)
        assert share > 0.66 and right > 0.98, (share, right)
    assert {read(request.text).language for request in demo()} <= {"en", ""}


def test_every_language_of_the_classifier_has_templates() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(LANGUAGES)


def test_the_demo_is_read() -> None:
    """Its wishes are found, and calculations differ from questions for a language model."""
    requests = demo()
    calculates = {"arithmetic", "strings"}
    wrong = [
        r.text for r in requests if (read(r.text).kind in calculates) != bool(r.kind)
    ]
    assert len(wrong) < 0.02 * len(requests), wrong[:9]
    for label in ("care", "haste"):
        found, false = found_and_false(read, requests, label)
        assert found > 0.9 and false < 0.02, (label, found, false)
