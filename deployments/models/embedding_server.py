"""Serves the profiler's static embedding as a model of its own, on any CPU."""

import asyncio
import base64

import msgspec
import numpy as np

from deployments import runtime
from deployments.models.handle import Body
from deployments.models.report import ModelReport, failure
from deployments.paths import bundled

SHORT = (
    4_000  # characters of all texts of a request that are embedded in the event loop
)
BATCH = 32  # texts


class EmbeddingServer:
    """A model that only embeds; it has the method `complete` of ModelServer for the task `embed`.

    Args:
        model_id: what clients call it.
        source: folder of a model2vec model.
    """

    def __init__(self, model_id: str, source: str):
        from model2vec import StaticModel

        runtime.bind_to_loopback()
        self._id = model_id
        self._turn = asyncio.Lock()  # of requests with long texts
        # each text is read to its end: a mean of word vectors has no context that could be exceeded
        self._model = StaticModel.from_pretrained(bundled(source), max_length=None)

    async def complete(self, task: str, body: Body) -> tuple[bytes, ModelReport]:
        """Embed `input`, a text or a list of texts; see ModelServer.complete."""
        if body.get("dimensions") not in (None, self._model.dim):
            dimensions = self._model.dim
            message = (
                f"dimensions: this model's embeddings have {dimensions}; leave it out"
            )
            return b"", failure(message, 400, "dimensions")
        given = body["input"]
        texts: list[str] = list(given) if isinstance(given, list) else [str(given)]
        as_base64 = body.get("encoding_format") == "base64"
        if len(texts) <= BATCH and sum(map(len, texts)) <= SHORT:
            return self._answer(texts, as_base64)
        # in a thread, where a megabyte takes a second; short texts of others go on meanwhile
        async with self._turn:
            return await asyncio.to_thread(self._answer, texts, as_base64)

    def _answer(self, texts: list[str], as_base64: bool) -> tuple[bytes, ModelReport]:
        data: list[dict[str, object]] = []
        tokens = 0
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            vectors = self._model.encode(batch).astype(np.float32)
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            tokens += sum(len(ids) for ids in self._model.tokenize(batch))
            for vector in vectors:
                embedding = (
                    base64.b64encode(vector.tobytes()).decode()
                    if as_base64
                    else vector.tolist()
                )
                data.append(
                    {
                        "object": "embedding",
                        "index": len(data),
                        "embedding": embedding,
                    }
                )
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {"object": "list", "model": self._id, "data": data, "usage": usage}
        return msgspec.json.encode(answer), ModelReport(prompt_tokens=tokens)
