"""Builds requests and profiles for tests."""

from policies.profiling import features
from policies.types import Objective, Request, TaskProfile


def make_profile(
    text: str = "What is 3 plus 5?", task: str = "chat", tokens: int = 20
) -> TaskProfile:
    return features.profile(text, None, task, tokens)


def make_request(
    text: str = "What is 3 plus 5?",
    objective: Objective | None = None,
    **options: object,
) -> Request:
    return Request("r", make_profile(text, **options), objective or Objective())  # type: ignore[arg-type]
