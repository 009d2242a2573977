"""The embedding model reads each text to its end."""

import asyncio
import json
from typing import Any

import pytest

from deployments.models.embedding_server import EmbeddingServer
from tests.support.gateway import ROOT


@pytest.fixture(scope="module")
def embedder() -> EmbeddingServer:
    return EmbeddingServer("minilm", str(ROOT / "assets/embedder"))


def embed(embedder: EmbeddingServer, *texts: str) -> tuple[list[Any], int]:
    """The vectors, and the number of tokens of the usage."""
    payload, report = asyncio.run(embedder.complete("embed", {"input": list(texts)}))
    answer = json.loads(payload)
    assert report.prompt_tokens == answer["usage"]["prompt_tokens"]
    return [item["embedding"] for item in answer["data"]], report.prompt_tokens


@pytest.mark.parametrize(
    "beginning",
    ["a " * 512, "a " * 5_000, "wonderfulness " * 300, " " * 4_000],
    ids=["512 words", "5000 words", "long words", "blanks"],
)
def test_texts_that_differ_at_their_end_have_different_vectors(
    embedder: EmbeddingServer, beginning: str
) -> None:
    """In one batch and alone; the vectors of a batch are those of the texts alone."""
    texts = [beginning + "zebra", beginning + "quantum"]
    together, _ = embed(embedder, *texts)
    assert together[0] != together[1]
    for vector, text in zip(together, texts, strict=True):
        (alone,), _ = embed(embedder, text)
        assert alone == pytest.approx(vector, abs=1e-6)
        assert any(alone)


def test_usage_counts_what_was_read(embedder: EmbeddingServer) -> None:
    """It grows with the length of the text, beyond any context."""
    counts = [embed(embedder, "zebra " * n)[1] for n in (1, 512, 1_024, 10_240)]
    assert counts == [counts[0] * n for n in (1, 512, 1_024, 10_240)]
