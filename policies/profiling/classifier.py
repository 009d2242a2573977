"""What a text asks for, in any language: the kind of work, and accuracy or speed.

A linear model on the n-grams of the text (ngrams.py). The kind is the most probable one of a softmax; the other two
are logistic regressions (Bishop, Pattern Recognition and Machine Learning, 2006, sec. 4.3). The weights were trained by
assets/train_classifier.py.
"""

from math import sqrt

import numpy as np

from policies.profiling.features import KINDS, Reading
from policies.profiling.ngrams import BUCKETS, numbers_of
from policies.types import Vector

# [H] what the columns of the weights stand for
HEADS = (*KINDS, "care", "haste")
CARE, HASTE = range(len(KINDS), len(HEADS))
WISHED = -0.5  # log-odds from which a wish is read


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
        """[H] log-odds of the heads; those of the kinds up to a constant."""
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
        )
