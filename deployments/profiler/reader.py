"""Profiles a text: tokens, what it asks for, features and embedding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from deployments.paths import bundled
from deployments.profiler.embedding import Embedding
from deployments.settings import ProfilerSettings
from policies.profiling import features
from policies.profiling.classifier import Classifier
from policies.types import TaskProfile, Vector

CHARS_PER_TOKEN = 4  # where no tokenizer is given
# of a longer text the tokens of its beginning and its end are counted, and the rest is estimated from them; to count
# 400,000 characters took 0.4 s
MAX_COUNTED = 40_000
TOKENS_PER_MESSAGE = 2  # the marks of a chat template around a message


@dataclass(frozen=True, slots=True)
class ProfileItem:
    """A request to be profiled.

    Attributes:
        text: what the client asks; features and embedding are made from it.
        context: everything the model will read, including `text`; its tokens are counted.
        messages: number of messages in `context`.
        task: "chat", "completion" or "embed".
        max_output_tokens: limit set by the client; 0 if there is none.
        parts: the prompts, where the model answers each by itself; empty for a single text.
        token_counts: lengths of the prompts, where they are token ids.
    """

    text: str
    context: str
    messages: int
    task: str
    max_output_tokens: int
    parts: tuple[str, ...] = ()
    token_counts: tuple[int, ...] = ()


class TextProfiler:
    """Profiles texts with a classifier, a static embedding and a tokenizer.

    The features of the text itself are computed in policies/profiling/features.py.
    """

    def __init__(self, settings: ProfilerSettings):
        self._embed = Embedding(load_embedder(settings.embedder))
        self._classifier = load_classifier(settings.classifier)
        self._tokenizer = load_tokenizer(settings.tokenizer)

    def profile(self, items: Sequence[ProfileItem]) -> list[TaskProfile]:
        """Profiles without forecasts, in the order of `items`."""
        # only the end of a long text is embedded
        ends = [item.text[-2 * features.READ_CHARS :] for item in items]
        embeddings = self._embed(ends)
        return [
            self._make(item, embedding, self._tokenizer)
            for item, embedding in zip(items, embeddings, strict=True)
        ]

    def profile_quickly(self, item: ProfileItem) -> TaskProfile:
        """The profile without embedding and with an estimated number of tokens, so that a long text takes no longer."""
        return self._make(item, None, None)

    def _make(
        self, item: ProfileItem, embedding: Vector | None, tokenizer: Any
    ) -> TaskProfile:
        counts = list(item.token_counts)
        if not counts:
            texts = item.parts or (item.context,)
            counts = [count_tokens(tokenizer, text, item.messages) for text in texts]
        profile = features.profile(
            text=item.text,
            reading=self._classifier.read(item.text),
            embedding=embedding,
            task=item.task,
            prompt_tokens=sum(counts),
            max_output_tokens=item.max_output_tokens,
        )
        if len(counts) > 1:
            profile = replace(profile, longest_prompt_tokens=max(counts))
        return profile


@lru_cache(maxsize=4)
def load_embedder(folder: str) -> Any:
    """The model2vec StaticModel of a folder. It is shared, because loading it takes 0.1 s."""
    from model2vec import StaticModel

    return StaticModel.from_pretrained(bundled(folder))


@lru_cache(maxsize=4)
def load_classifier(folder: str) -> Classifier:
    """The classifier of a folder that assets/train_classifier.py wrote.

    Raises:
        ValueError: its arrays are those of another release.
    """
    from safetensors.numpy import load_file

    arrays = load_file(Path(bundled(folder), "model.safetensors"))
    return Classifier(arrays["weights"], arrays["bias"])


def load_tokenizer(name: str | None) -> Any:
    """A `tokenizers` tokenizer from a tokenizer.json or a hub name; None for None."""
    from tokenizers import Tokenizer

    if name is None:
        return None
    path = bundled(name)
    if Path(path).is_file():
        return Tokenizer.from_file(path)
    return Tokenizer.from_pretrained(name)


def count_tokens(tokenizer: Any, text: str, messages: int) -> int:
    """Number of prompt tokens; estimated of a very long text, and wherever `tokenizer` is None."""
    tokens = len(text) // CHARS_PER_TOKEN
    if tokenizer:
        counted = text
        if len(text) > MAX_COUNTED:
            counted = text[: MAX_COUNTED // 2] + text[-MAX_COUNTED // 2 :]
        # not by encode_batch_fast: it releases the interpreter's lock and waits to get it back
        tokens = len(tokenizer.encode(counted, add_special_tokens=False))
        tokens = tokens * len(text) // max(1, len(counted))
    return tokens + TOKENS_PER_MESSAGE * messages
