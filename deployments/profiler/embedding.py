"""The static embedding of a text."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from policies.types import Vector

WORDS = 50_000  # that are cached
LONGEST_CACHED_WORD = 32  # characters


class Embedding:
    """Gives the same embedding as a model2vec model's `encode`, faster for one or two texts.

    BERT's tokenizers split a text into words and tokenize each word by itself, so the token ids of known words are
    cached. A tokenizer that was idle needs half a millisecond for its next call.

    Args:
        model: a model2vec StaticModel. One with another tokenizer or with weights is used by its own `encode`.
    """

    def __init__(self, model: Any):
        self._model = model
        is_plain = (
            model.normalize
            and model.max_length
            and model.weights is None
            and model.token_mapping is None
        )
        splits_words = type(model.tokenizer.pre_tokenizer).__name__ == (
            "BertPreTokenizer"
        )
        self._by_word = is_plain and splits_words
        self._ids_of_word: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Vector:
        """[B, E] of B texts; zeros for a text without a known word."""
        model = self._model
        if not self._by_word:
            return np.asarray(model.encode(texts), np.float64)
        max_chars = model.max_length * model.median_token_length
        embeddings = np.zeros((len(texts), model.dim))
        for row, text in zip(embeddings, texts, strict=True):
            ids: list[int] = []
            for word in text[:max_chars].split():
                ids += self._ids_of_word.get(word) or self._tokenize(word)
            if ids:
                # the sum, normalised: the same direction as the mean
                vectors = model.embedding.take(ids[: model.max_length], axis=0)
                np.add.reduce(vectors, axis=0, out=row)
                row /= sqrt(float(row @ row)) + 1e-32
        return embeddings

    def _tokenize(self, word: str) -> list[int]:
        tokens = self._model.tokenizer.encode(word, add_special_tokens=False).ids
        ids = [token for token in tokens if token != self._model.unk_token_id]
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self._ids_of_word) >= WORDS:
                self._ids_of_word.clear()
            self._ids_of_word[word] = ids
        return ids
