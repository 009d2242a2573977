"""The profiler's reading of texts."""

from pathlib import Path

import numpy as np
import pytest
from model2vec import StaticModel

from deployments.profiler import embed

SOURCE = Path(__file__).resolve().parent.parent / "assets/embedder"
TEXTS = ["What is 347 plus 586?", "", " \n", "x " * 9000, "a" * 5000, "Grüße aus Köln, 你好 日本"]


@pytest.fixture(scope="module")
def model() -> StaticModel:
    return StaticModel.from_pretrained(str(SOURCE))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_embedded_as_by_the_library(model: StaticModel, text: str) -> None:
    np.testing.assert_allclose(embed(model, [text]), model.encode([text]), atol=1e-6)


def test_many_texts_are_embedded_as_one_by_one(model: StaticModel) -> None:
    np.testing.assert_allclose(embed(model, TEXTS), np.concatenate([embed(model, [text]) for text in TEXTS]))


def test_a_model_that_weighs_its_tokens_is_left_to_the_library(model: StaticModel) -> None:
    weights = np.linspace(0.1, 2.0, len(model.embedding))
    weighed = StaticModel(model.embedding, model.tokenizer, model.config, model.normalize, weights=weights)
    np.testing.assert_allclose(embed(weighed, TEXTS[:1]), weighed.encode(TEXTS[:1]), atol=1e-6)
    assert not np.allclose(embed(weighed, TEXTS[:1]), embed(model, TEXTS[:1]))
