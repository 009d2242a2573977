"""Builds requests and profiles for tests."""

from deployments.profiler.reader import load_classifier
from deployments.settings import ProfilerSettings
from policies.profiling import features
from policies.types import Objective, Request, TaskProfile, Vector


def read(text: str) -> features.Reading:
    """What the bundled classifier reads in a text."""
    return load_classifier(ProfilerSettings().classifier).read(text)


def make_profile(
    text: str = "What is 3 plus 5?",
    task: str = "chat",
    tokens: int = 20,
    limit: int = 0,
    embedding: Vector | None = None,
) -> TaskProfile:
    return features.profile(text, read(text), embedding, task, tokens, limit)


def make_request(
    text: str = "What is 3 plus 5?",
    objective: Objective | None = None,
    **options: object,
) -> Request:
    return Request("r", make_profile(text, **options), objective or Objective())  # type: ignore[arg-type]
