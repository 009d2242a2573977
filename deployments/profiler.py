"""The profiler deployment: text in, TaskProfile out, many at a time."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from deployments import dataplane, logs
from deployments.settings import GatewaySettings, ProfilerSettings
from policies import features
from policies.forecast import Forecaster
from policies.types import TaskProfile, Vector

REFRESH_S = 2.0
PATIENCE_S = 5.0
CHARS_PER_TOKEN = 4  # where no tokenizer is given
WORDS, LONG_WORD = 50_000, 32  # whose tokens are remembered, and the most letters of one
TOKENS_PER_MESSAGE = 2  # the marks of a chat template around it
log = logging.getLogger(__name__)


class Reader:
    """Holds the static embedding and the tokenizer; the reading of the text is policies/features.py."""

    def __init__(self, settings: ProfilerSettings):
        from model2vec import StaticModel

        self._embed = Embedding(StaticModel.from_pretrained(settings.embedder))
        self._tokenizer = load_tokenizer(settings.tokenizer)

    def read(self, requests: list[dict[str, Any]]) -> list[TaskProfile]:
        """Profiles without forecasts of requests as Profiler.profile takes them."""
        embeddings = self._embed([r["text"][-2 * features.READ_CHARS :] for r in requests])
        return [
            features.profile(
                text=r["text"],
                embedding=embedding,
                task=r["task"],
                prompt_tokens=count_tokens(self._tokenizer, r["context"], r["messages"]),
                max_output_tokens=r["max_output_tokens"],
            )
            for r, embedding in zip(requests, embeddings, strict=True)
        ]


class Profiler:
    """Reads texts, and says what to expect of the answers.

    That (policies/forecast.py) is learned by the router, asked for every other second, and swapped in between two
    batches. Short texts are read by the ingress itself, sooner than they could be sent; here come the long ones.

    Args:
        settings: of the gateway.
        connect: gives a handle of the router actor.
    """

    def __init__(self, settings: GatewaySettings, connect: Callable[[GatewaySettings], Any]):
        dataplane.on_loopback()
        logs.configure("profiler")
        self._settings, self._connect = settings, connect
        self._reader = Reader(settings.profiler)
        self._forecaster = Forecaster.prior(settings.arms())
        self._refreshing: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Serve asks from the start on and every few seconds; a constructor has no event loop to refresh in yet."""
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_fresh())

    async def _keep_fresh(self) -> None:
        router: Any = None
        while True:
            try:
                router = router or await asyncio.to_thread(self._connect, self._settings)
                newer = await asyncio.wait_for(router.forecaster.remote(self._forecaster.version), PATIENCE_S)
                self._forecaster = newer or self._forecaster
            except Exception as error:
                log.warning("no forecasts from the router (%s); going on with the last", type(error).__name__)
                router = None
            await asyncio.sleep(REFRESH_S)

    async def profile(self, requests: list[dict[str, Any]]) -> list[TaskProfile]:
        """Profile a batch of requests, each with `text`, `context` (all the model will read), `messages` (their
        count), `task` and `max_output_tokens`.
        """
        await self.check_health()
        return self._forecaster.complete(self._reader.read(requests))


class Embedding:
    """What a model2vec model's `encode` gives, in a fraction of its time for a text or two.

    BERT's tokenizers take each word by itself, so the ids of a word that was met before are looked up: after a pause a
    tokenizer takes half a millisecond to get going again.

    Args:
        model: a model2vec StaticModel.
    """

    def __init__(self, model: Any):
        self._model = model
        plain = model.normalize and model.max_length and model.weights is None and model.token_mapping is None
        self._by_word = plain and type(model.tokenizer.pre_tokenizer).__name__ == "BertPreTokenizer"
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Vector:
        """[B, E] of B texts; zeros for one without a known word."""
        model = self._model
        if not self._by_word:
            return np.asarray(model.encode(texts), np.float64)
        most, embeddings = model.max_length * model.median_token_length, np.zeros((len(texts), model.dim))
        for row, text in zip(embeddings, texts, strict=True):
            ids = [i for word in text[:most].split() for i in self._known.get(word) or self._tokens(word)]
            if ids:
                # the mean, but for its length
                np.add.reduce(model.embedding.take(ids[: model.max_length], axis=0), axis=0, out=row)
                row /= sqrt(float(row @ row)) + 1e-32
        return embeddings

    def _tokens(self, word: str) -> list[int]:
        found = self._model.tokenizer.encode(word, add_special_tokens=False).ids
        ids = [i for i in found if i != self._model.unk_token_id]
        if len(word) <= LONG_WORD:
            if len(self._known) >= WORDS:
                self._known.clear()
            self._known[word] = ids
        return ids


def load_tokenizer(name: str | None) -> Any:
    """A `tokenizers` tokenizer from a tokenizer.json or a hub name; None for None."""
    from tokenizers import Tokenizer

    if name is None:
        return None
    return Tokenizer.from_file(name) if Path(name).is_file() else Tokenizer.from_pretrained(name)


def count_tokens(tokenizer: Any, text: str, messages: int) -> int:
    """Prompt tokens, counted or from the number of characters."""
    # not by encode_batch_fast: it lets go of the interpreter's lock, and waits to get it back
    tokens = len(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else len(text) // CHARS_PER_TOKEN
    return tokens + TOKENS_PER_MESSAGE * messages
