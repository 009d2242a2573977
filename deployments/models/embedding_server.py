"""Serves the profiler's static embedding as a model of its own, on any CPU."""

import base64
import json

import numpy as np

from deployments import runtime
from deployments.models.handle import Body
from deployments.models.report import ModelReport, failure


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
        # each text is read to its end: a mean of word vectors has no context that could be exceeded
        self._model = StaticModel.from_pretrained(source, max_length=None)

    async def complete(self, task: str, body: Body) -> tuple[bytes, ModelReport]:
        """Embed `input`, a text or a list of texts; see ModelServer.complete."""
        if body.get("dimensions") not in (None, self._model.dim):
            dimensions = self._model.dim
            message = (
                f"dimensions: this model's embeddings have {dimensions}; leave it out"
            )
            return b"", failure(message, 400, "dimensions")
        given = body["input"]
        texts = given if isinstance(given, list) else [given]
        vectors = self._model.encode(texts).astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        tokens = sum(len(ids) for ids in self._model.tokenize(texts))
        as_base64 = body.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if as_base64
                else vector.tolist(),
            }
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {"object": "list", "model": self._id, "data": data, "usage": usage}
        return json.dumps(answer).encode(), ModelReport(prompt_tokens=tokens)
