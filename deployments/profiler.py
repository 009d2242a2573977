"""The profiler deployment: text in, TaskProfile out, many at a time."""

from pathlib import Path
from typing import Any

from deployments.settings import ProfilerSettings
from policies import features
from policies.types import TaskProfile

CHARS_PER_TOKEN = 4  # where no tokenizer is given
TOKENS_PER_MESSAGE = 2  # the marks of a chat template around it


class Profiler:
    """Holds the static embedding and the tokenizer; the reading of the text is policies/features.py."""

    def __init__(self, settings: ProfilerSettings):
        from model2vec import StaticModel

        self._embedder = StaticModel.from_pretrained(settings.embedder)
        self._tokenizer = load_tokenizer(settings.tokenizer)

    async def profile(self, requests: list[dict[str, Any]]) -> list[TaskProfile]:
        """Profile a batch of requests, each with `text`, `context` (all the model will read), `messages` (their
        count), `task` and `max_output_tokens`.
        """
        embeddings = self._embedder.encode([r["text"][-2 * features.READ_CHARS :] for r in requests])
        return [
            features.profile(
                text=r["text"],
                embedding=embedding,
                task=r["task"],
                prompt_tokens=self._count(r["context"], r["messages"]),
                max_output_tokens=r["max_output_tokens"],
            )
            for r, embedding in zip(requests, embeddings, strict=True)
        ]

    def _count(self, text: str, messages: int) -> int:
        return count_tokens(self._tokenizer, text, messages)


def load_tokenizer(name: str | None) -> Any:
    """A `tokenizers` tokenizer from a tokenizer.json or a hub name; None for None."""
    from tokenizers import Tokenizer

    if name is None:
        return None
    return Tokenizer.from_file(name) if Path(name).is_file() else Tokenizer.from_pretrained(name)


def count_tokens(tokenizer: Any, text: str, messages: int) -> int:
    """Prompt tokens, counted or from the number of characters."""
    tokens = len(tokenizer.encode(text, add_special_tokens=False)) if tokenizer else len(text) // CHARS_PER_TOKEN
    return tokens + TOKENS_PER_MESSAGE * messages
