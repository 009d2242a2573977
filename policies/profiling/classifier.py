"""What a text asks for, in any language, and which language it is in.

A linear model on the n-grams of the text (ngrams.py). The kind and the language are the most probable ones of a
softmax each; accuracy and speed are logistic regressions (Bishop, Pattern Recognition and Machine Learning, 2006,
sec. 4.3). The weights were trained by assets/train_classifier.py.
"""

from collections.abc import Sequence
from math import exp, sqrt

import numpy as np

from policies.profiling.features import KINDS, Reading
from policies.profiling.ngrams import BUCKETS, numbers_of
from policies.types import Vector

# ISO 639-1; a text in another language, or in none, is rarely read as one of these
LANGUAGES = (
    "ar",
    "de",
    "en",
    "es",
    "fr",
    "hi",
    "it",
    "ja",
    "ko",
    "nl",
    "pl",
    "pt",
    "ru",
    "tr",
    "vi",
    "zh",
)
# [H] what the columns of the weights stand for
HEADS = (*KINDS, "care", "haste", *LANGUAGES)
CARE, HASTE, LANGUAGE = range(len(KINDS), len(KINDS) + 3)  # the first of the languages
WISHED = -0.5  # log-odds from which a wish is read
SURE = 0.7  # probability from which a language is read; 99 % of the languages that are read are right then


class Classifier:
    """Reads texts; it has no state but its weights, so the same text has the same reading in every process.

    Args:
        weights: [BUCKETS, H] of the n-grams, in the order of HEADS.
        bias: [H].

    Raises:
        ValueError: an array has another shape, or is not finite.
    """

    def __init__(self, weights: Vector, bias: Vector):
        for name, array, shape in (
            ("weights", weights, (BUCKETS, len(HEADS))),
            ("bias", bias, (len(HEADS),)),
        ):
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(
                    f"classifier: '{name}' must have shape {shape} and be finite, got shape {array.shape}"
                )
        self._weights = np.ascontiguousarray(weights, np.float32)
        self._bias = bias.astype(np.float64)

    def logits(self, text: str) -> Vector:
        """[H] log-odds of the heads; those of the kinds and those of the languages up to a constant each."""
        numbers = numbers_of(text)
        total = self._weights.take(numbers, axis=0).sum(axis=0, dtype=np.float64)
        return np.asarray(total / sqrt(len(numbers)) + self._bias)

    def read(self, text: str) -> Reading:
        """What a text asks for; an empty text asks for nothing."""
        if not text or text.isspace():
            return Reading()
        logits = self.logits(text).tolist()
        kinds = logits[:CARE]
        return Reading(
            KINDS[kinds.index(max(kinds))],
            logits[CARE] > WISHED,
            logits[HASTE] > WISHED,
            _language(logits[LANGUAGE:]),
        )


def _language(logits: Sequence[float]) -> str:
    """The language whose probability is at least SURE; "" if none is that probable."""
    most = max(logits)
    if sum(exp(logit - most) for logit in logits) > 1 / SURE:
        return ""
    return LANGUAGES[logits.index(most)]
