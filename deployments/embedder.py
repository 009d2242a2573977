"""A model that only embeds: the profiler's static embedding, served like any other arm, on any CPU."""

import base64
import json
from typing import Any

import numpy as np

from deployments import dataplane


class EmbeddingServer:
    """Has the `complete` of ModelServer for the task `embed`.

    Args:
        model_id: what clients call it.
        source: folder of a model2vec model.
    """

    def __init__(self, model_id: str, source: str):
        from model2vec import StaticModel

        dataplane.on_loopback()
        self._id, self._model = model_id, StaticModel.from_pretrained(source)

    async def complete(self, task: str, body: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Embed `input`, a text or a list of texts; see ModelServer.complete."""
        if body.get("dimensions") not in (None, self._model.dim):
            message = f"dimensions: this model's embeddings have {self._model.dim}; leave it out"
            error = {"message": message, "type": "invalid_request_error", "param": "dimensions", "code": None}
            return b"", {"error": error, "status": 400}
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        vectors = self._model.encode(texts).astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        tokens = sum(len(ids) for ids in self._model.tokenize(texts))
        as_base64 = body.get("encoding_format") == "base64"
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist(),
            }
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {"object": "list", "model": self._id, "data": data, "usage": usage}
        return json.dumps(answer).encode(), {"prompt_tokens": tokens, "output_tokens": 0, "finish_reason": ""}
