"""What the classifier reads in texts of any language, and in texts that are none."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies.profiling import ngrams
from policies.profiling.classifier import HEADS, Classifier
from policies.profiling.features import KINDS, Reading
from policies.profiling.ngrams import BUCKETS, EDGE_CHARS, numbers_of
from tests.support.requests import read

ROOT = Path(__file__).resolve().parents[3]
ANY_TEXT = st.text(st.characters(), max_size=200)
MIXED = "Übersetze „good morning“ 对 मुझे مرحبا 😀 347+586 def f(x):"


@given(ANY_TEXT)
@example("\ud800")
@example("😀👍🏽")
@example("\x00\n\t ")
@example("ﷺ" * 100)
@settings(max_examples=150, deadline=None)
def test_any_text_is_read(text: str) -> None:
    """Invalid surrogates, control characters and letters that Unicode spreads to many are read, too."""
    numbers = numbers_of(text)
    assert len(numbers) and numbers[0] >= 0 and numbers[-1] < BUCKETS
    assert (np.diff(numbers) > 0).all()
    assert read(text).kind in KINDS


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text_asks_for_nothing(text: str) -> None:
    """It has no kind, and no wishes."""
    assert read(text) == Reading("other", False, False)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Please explain how a heat pump works.", "en"),
        ("Erkläre mir bitte, wie eine Wärmepumpe funktioniert.", "de"),
        ("Explique-moi comment fonctionne une pompe à chaleur.", "fr"),
        ("请解释一下热泵是怎么工作的。", "zh"),
        ("ヒートポンプの仕組みを説明してください。", "ja"),
        ("اشرح لي كيف تعمل المضخة الحرارية", "ar"),
        ("Объясни, пожалуйста, как работает тепловой насос.", "ru"),
    ],
)
def test_the_language_of_a_sentence_is_read(text: str, language: str) -> None:
    """These sentences share no template with the training."""
    assert read(text).language == language


@pytest.mark.parametrize(
    "text", ["", "2+2", "x", "😀", "def f(x): return x", "Jag vill boka ett bord"]
)
def test_a_language_that_is_not_sure_is_none(text: str) -> None:
    """Of texts in no language, and in one that the training does not have."""
    assert read(text).language == ""


def test_the_middle_of_a_long_text_costs_nothing() -> None:
    """Only its length is read of it, so the work is bounded."""
    begin = "a b " * EDGE_CHARS
    one, other = (begin + middle * 2000 + begin for middle in ("x", "y"))
    assert (numbers_of(one) == numbers_of(other)).all()
    asked = "Translate the following text into French:\n" + "The sun rises. " * 3000
    assert read(asked).kind == "translation"


def test_every_process_finds_the_same_numbers() -> None:
    """Whatever the seed of the interpreter's own hashes."""
    code = "import sys; from policies.profiling.ngrams import numbers_of; print(numbers_of(sys.argv[1]).tolist())"
    for seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", code, MIXED],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert printed.strip() == str(numbers_of(MIXED).tolist())


def test_the_numbers_are_those_that_the_weights_were_trained_for() -> None:
    """A change of the numbers needs new weights: `make train-classifier`."""
    assert numbers_of("Hi").tolist() == [
        813,
        4432,
        6758,
        9110,
        10343,
        10699,
        15538,
        17686,
        26121,
        30217,
        31944,
        32197,
        32704,
        32712,
        32722,
    ]


def test_case_and_the_digits_of_a_number_do_not_matter() -> None:
    """Nor do wide forms of Latin letters, and how long the spaces are."""
    assert (numbers_of("ADD 12 + 34") == numbers_of("add 99 + 11")).all()
    assert (numbers_of("ADD 12 + 34") == numbers_of("Add １２ + 34")).all()
    assert set(numbers_of("add 1")) != set(numbers_of("add 1234"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("```python\n# 计算总和\nprint(sum(x))\n```\n这段代码有什么问题?", "code"),
        ("Translate to German: Où est la gare ?", "translation"),
        ("把下面的句子翻译成英语:Das Wetter ist schön.", "translation"),
        ("😀😀", "other"),
        ("347+586", "arithmetic"),
        ("写一首关于海的诗", "writing"),
        ("WHO INVENTED THE RADIO", "question"),
    ],
)
def test_mixed_texts(text: str, kind: str) -> None:
    """Several languages in one text, code with comments, no spaces, no words."""
    assert read(text).kind == kind


@pytest.mark.parametrize(
    ("weights", "bias"),
    [
        (np.zeros((BUCKETS, 3)), np.zeros(len(HEADS))),
        (np.zeros((BUCKETS, len(HEADS))), np.zeros(2)),
        (np.full((BUCKETS, len(HEADS)), np.nan), np.zeros(len(HEADS))),
    ],
)
def test_weights_of_another_release_are_refused(
    weights: np.ndarray, bias: np.ndarray
) -> None:
    """The message names the array and the shape that it must have."""
    with pytest.raises(ValueError, match=r"classifier: '(weights|bias)' must have"):
        Classifier(weights, bias)


def test_shapes_and_grams_do_not_share_numbers() -> None:
    """The highest number of a shape is in the range, and grams stay below the shapes."""
    assert ngrams.HASHED + 32 + len(ngrams._SYNTAX) <= BUCKETS
