"""The profiler's reading of texts."""

from pathlib import Path

import numpy as np
import pytest
from model2vec import StaticModel

from deployments import profiler
from deployments.profiler import Embedding

SOURCE = Path(__file__).resolve().parent.parent / "assets/embedder"
TEXTS = ["What is 347 plus 586?", "", " \n", "x " * 9000, "a" * 5000, "Grüße aus Köln, 你好 日本"]


@pytest.fixture(scope="module")
def model() -> StaticModel:
    return StaticModel.from_pretrained(str(SOURCE))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_embedded_as_by_the_library(model: StaticModel, text: str) -> None:
    embed = Embedding(model)
    for _ in range(2):  # by the tokenizer, and from memory
        np.testing.assert_allclose(embed([text]), model.encode([text]), atol=1e-6)


def test_many_texts_are_embedded_as_one_by_one(model: StaticModel) -> None:
    embed = Embedding(model)
    np.testing.assert_allclose(embed(TEXTS), np.concatenate([embed([text]) for text in TEXTS]))


def test_it_remembers_so_many_words_and_no_long_ones(model: StaticModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "WORDS", 5)
    embed, words = Embedding(model), [f"word{i}" for i in range(13)]
    for text in ("a" * 5000, *words):
        np.testing.assert_allclose(embed([text]), model.encode([text]), atol=1e-6)
    assert set(embed._known) == set(words[10:])


def test_a_model_that_weighs_its_tokens_is_left_to_the_library(model: StaticModel) -> None:
    weights = np.linspace(0.1, 2.0, len(model.embedding))
    weighed = StaticModel(model.embedding, model.tokenizer, model.config, model.normalize, weights=weights)
    np.testing.assert_allclose(Embedding(weighed)(TEXTS[:1]), weighed.encode(TEXTS[:1]), atol=1e-6)
    assert not np.allclose(Embedding(weighed)(TEXTS[:1]), Embedding(model)(TEXTS[:1]))
