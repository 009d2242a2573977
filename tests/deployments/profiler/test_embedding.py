"""The static embedding is that of model2vec."""

from pathlib import Path

import numpy as np
import pytest
from model2vec import StaticModel

from deployments.profiler import embedding
from deployments.profiler.embedding import Embedding

SOURCE = Path(__file__).resolve().parents[3] / "assets/embedder"
TEXTS = [
    "What is 347 plus 586?",
    "",
    " \n",
    "x " * 9000,
    "a" * 5000,
    "Grüße aus Köln, 你好 日本",
]


@pytest.fixture(scope="module")
def model() -> StaticModel:
    return StaticModel.from_pretrained(str(SOURCE))


@pytest.mark.parametrize("text", TEXTS)
def test_embedding_equals_that_of_model2vec(model: StaticModel, text: str) -> None:
    embed = Embedding(model)
    for _ in range(2):  # by the tokenizer, and from the cache
        np.testing.assert_allclose(embed([text]), model.encode([text]), atol=1e-6)


def test_embedding_of_a_batch_equals_that_of_single_texts(model: StaticModel) -> None:
    embed = Embedding(model)
    np.testing.assert_allclose(
        embed(TEXTS), np.concatenate([embed([text]) for text in TEXTS])
    )


def test_embedding_caches_a_bounded_number_of_short_words(
    model: StaticModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "WORDS", 5)
    embed = Embedding(model)
    words = [f"word{i}" for i in range(13)]
    for text in ("a" * 5000, *words):
        np.testing.assert_allclose(embed([text]), model.encode([text]), atol=1e-6)
    assert set(embed._ids_of_word) == set(words[10:])


def test_embedding_uses_model2vec_for_a_model_with_token_weights(
    model: StaticModel,
) -> None:
    weights = np.linspace(0.1, 2.0, len(model.embedding))
    weighed = StaticModel(
        model.embedding, model.tokenizer, model.config, model.normalize, weights=weights
    )
    np.testing.assert_allclose(
        Embedding(weighed)(TEXTS[:1]), weighed.encode(TEXTS[:1]), atol=1e-6
    )
    assert not np.allclose(Embedding(weighed)(TEXTS[:1]), Embedding(model)(TEXTS[:1]))
