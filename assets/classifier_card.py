"""The card of the profiler's classifier: its accuracy on requests that training does not have.

`python -m assets.classifier_card` measures the classifier as it stands and writes the card again.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from assets import talk, tasks
from assets.request_templates import (
    HELD_OUT,
    TRAIN,
    LabelledRequest,
    draw,
    natural,
    templates,
)
from policies.profiling.classifier import LANGUAGES, SURE, Classifier
from policies.profiling.features import KINDS, Reading

DRAWS = 6  # of each held-out template
SEED = 2
DEMO_DRAWS = 100  # of each kind of the demo
# the kinds of work to which the calculations of the demo belong
DEMO_KINDS = {
    **dict.fromkeys(
        ("add", "compare", "sum", "chain", "multiply", "story"), "arithmetic"
    ),
    **dict.fromkeys(("copy", "initial", "count", "reverse", "sort"), "strings"),
}
FOLDER = Path(__file__).parent / "classifier"
NAMES = {
    "ar": "Arabic",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ru": "Russian",
    "tr": "Turkish",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
TEXT = """# The profiler's classifier

It reads what a request asks for: the kind of work, and the wish for accuracy or speed; and the language of the request.
It is a linear model on hashed sequences of characters, words and shapes (policies/profiling/ngrams.py).
`make train-classifier` trained it on requests drawn from {templates} templates in {number} languages
(assets/templates). The templates were written for this project, so no other data are in it.

## Accuracy of the kinds

`python -m assets.classifier_card` measures it on {held_out} requests from {held_out_templates} held-out templates,
filled with held-out words, and on {whole} whole requests sharing no template with the training. The training got more
templates more than once after errors on the held-out templates had been looked at, and names of errors in code
after those on the whole requests. Of each language, of each kind, and of all:

| | held-out templates | whole requests |
|---|---:|---:|
{accuracy}

Languages that no template is in are read by what they share with these: letters, words, digits and signs.

The questions of the demo are not in the training, either. {calculations:.3f} of its calculations are read as the right
one of `arithmetic` and `strings`. {talk:.3f} of its questions for a language model are read as another kind than these.

## Wishes for accuracy (care) and speed (haste)

| requests | wish | found | read where there is none |
|---|---|---:|---:|
{wishes}

## The language

It is read where its probability is at least {sure}. Of a text in a language that no template is in, or in none, it is
rarely that sure.

| | held-out templates: read | right of these | whole requests: read | right of these |
|---|---:|---:|---:|---:|
{languages}
"""
Read = Callable[[str], Reading]


def held_out() -> list[LabelledRequest]:
    """Requests from the templates and words that training does not have."""
    rng = random.Random(SEED)
    return [
        draw(rng, language, kind, template, HELD_OUT)
        for language, kind, template in templates(HELD_OUT)
        for _ in range(DRAWS)
    ]


def demo() -> list[LabelledRequest]:
    """Questions of the demo, with its wishes for accuracy and speed; the kind is "" for those to a language model."""
    rng = random.Random(SEED)
    found = []
    for kind in tasks.KINDS:
        for _ in range(DEMO_DRAWS):
            text = tasks.make_task(rng, kind).question
            found.append(_of_the_demo(text, DEMO_KINDS[kind]))
    for kind in talk.KINDS:
        for _ in range(DEMO_DRAWS):
            found.append(_of_the_demo(talk.make_talk(rng, kind).question, ""))
    return found


def _of_the_demo(text: str, kind: str) -> LabelledRequest:
    care = text.startswith(("Please be exact", "This must be", "Take care"))
    haste = text.startswith(("Quick:", "As fast"))
    return LabelledRequest(text, "en", "", kind, care=care, haste=haste)


def right_kinds(read: Read, requests: Sequence[LabelledRequest]) -> float:
    """Share of the requests with a kind whose kind is read."""
    with_kind = [request for request in requests if request.kind]
    return sum(read(r.text).kind == r.kind for r in with_kind) / len(with_kind)


def found_and_false(
    read: Read, requests: Sequence[LabelledRequest], label: str
) -> tuple[float, float]:
    """Shares of the requests with this label, and of those without it, in which it is read."""
    counts = {True: [0, 0], False: [0, 0]}
    for request in requests:
        cell = counts[getattr(request, label)]
        cell[0] += getattr(read(request.text), label) > 0.5
        cell[1] += 1
    return counts[True][0] / counts[True][1], counts[False][0] / counts[False][1]


def write_card(classifier: Classifier, path: Path) -> None:
    """Measure the classifier, and write its card."""
    read = classifier.read
    unseen = held_out()
    whole = natural()
    asked = demo()
    calculates = ("arithmetic", "strings")
    talking = [read(request.text).kind for request in asked if not request.kind]
    to_model = sum(kind not in calculates for kind in talking) / len(talking)
    accuracy = [
        f"| {name} | {right_kinds(read, first):.2f} | {right_kinds(read, second):.2f} |"
        for name, first, second in _groups(unseen, whole)
    ]
    wishes = []
    sets = {"held-out templates": unseen, "whole requests": whole, "the demo": asked}
    for name, requests in sets.items():
        for label in ("care", "haste"):
            found, false = found_and_false(read, requests, label)
            wishes.append(f"| {name} | {label} | {found:.2f} | {false:.3f} |")
    text = TEXT.format(
        templates=f"{len(templates(TRAIN)):,}",
        number=len(LANGUAGES),
        held_out=f"{len(unseen):,}",
        held_out_templates=len(templates(HELD_OUT)),
        whole=sum(bool(request.kind) for request in whole),
        accuracy="\n".join(accuracy),
        wishes="\n".join(wishes),
        calculations=right_kinds(read, asked),
        talk=to_model,
        sure=SURE,
        languages="\n".join(_languages(read, unseen, whole)),
    )
    path.write_text(text)


def languages_read(
    read: Read, requests: Sequence[LabelledRequest]
) -> tuple[float, float]:
    """The share of the requests whose language is read, and the share of these in which it is right."""
    found = [(read(request.text).language, request.language) for request in requests]
    known = [language == right for language, right in found if language]
    return len(known) / len(found), sum(known) / max(1, len(known))


def _languages(
    read: Read, unseen: Sequence[LabelledRequest], whole: Sequence[LabelledRequest]
) -> Iterator[str]:
    """The rows of the table of languages; the last one has all."""
    for name, language in [*NAMES.items(), ("all", "")]:
        cells = []
        for requests in (unseen, whole):
            own = [r for r in requests if name in ("all", r.language)]
            cells += [f"{share:.2f}" for share in languages_read(read, own)]
        yield f"| {language or name} | {' | '.join(cells)} |"


def _groups(
    unseen: Sequence[LabelledRequest], whole: Sequence[LabelledRequest]
) -> Iterator[tuple[str, list[LabelledRequest], list[LabelledRequest]]]:
    """The requests of each language, of each kind, and all of them."""
    for language in LANGUAGES:
        first, second = (
            [request for request in requests if request.language == language]
            for requests in (unseen, whole)
        )
        yield NAMES[language], first, second
    for kind in KINDS:
        first, second = (
            [request for request in requests if request.kind == kind]
            for requests in (unseen, whole)
        )
        yield f"`{kind}`", first, second
    yield "all", list(unseen), list(whole)


if __name__ == "__main__":
    from deployments.profiler.reader import load_classifier

    write_card(load_classifier(str(FOLDER)), FOLDER / "README.md")
