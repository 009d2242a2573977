"""EmbeddingServer reads each text to its end, and computes long requests outside of the event loop."""

import asyncio
import base64
import json
import threading
from typing import Any

import numpy as np
import pytest

from deployments.models.embedding_server import BATCH, SHORT, EmbeddingServer
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


def ask(embedder: EmbeddingServer, texts: Any, **options: Any) -> dict[str, Any]:
    payload, report = asyncio.run(
        embedder.complete("embed", {"input": texts, **options})
    )
    found = dict(json.loads(payload))
    assert found["usage"]["prompt_tokens"] == report.prompt_tokens
    return found


def vectors(found: dict[str, Any]) -> Any:
    assert [item["index"] for item in found["data"]] == list(range(len(found["data"])))
    return np.array([item["embedding"] for item in found["data"]])


def test_a_text_has_one_embedding_in_any_company(embedder: EmbeddingServer) -> None:
    """Alone, among many, and in base64."""
    many = vectors(ask(embedder, [f"text {i}" for i in range(3 * BATCH + 1)]))
    assert many.shape[0] == 3 * BATCH + 1
    for i in (0, BATCH, 3 * BATCH):
        alone = vectors(ask(embedder, f"text {i}"))
        assert np.allclose(many[i], alone[0], atol=1e-6)
        assert np.isclose(np.linalg.norm(many[i]), 1.0, atol=1e-5)
        (item,) = ask(embedder, f"text {i}", encoding_format="base64")["data"]
        raw = np.frombuffer(base64.b64decode(item["embedding"]), np.float32)
        assert np.allclose(raw, alone[0], atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "in_loop"),
    [
        ("a", True),
        (["a"] * BATCH, True),
        (["a"] * (BATCH + 1), False),
        ("a " * SHORT, False),
        (["a " * 1_000] * 3, False),
    ],
)
def test_long_requests_are_embedded_in_a_thread(
    embedder: EmbeddingServer,
    texts: Any,
    in_loop: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A megabyte takes a second, and the event loop goes on meanwhile."""
    threads = []
    answer = embedder._answer

    def noting(*given: Any) -> Any:
        threads.append(threading.current_thread())
        return answer(*given)

    monkeypatch.setattr(embedder, "_answer", noting)
    ask(embedder, texts)
    assert [thread is threading.main_thread() for thread in threads] == [in_loop]
