"""EmbeddingServer: the same answer for short and long requests, and long ones outside of the event loop."""

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
