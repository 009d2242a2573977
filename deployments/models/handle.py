"""Types of the handle of a model's application, which offers the methods of ModelServer."""

from collections.abc import Awaitable, Mapping
from typing import Protocol

from deployments.models.report import ModelReport

Body = Mapping[str, object]  # a request in OpenAI's shape
# key of a body that is no parameter of the engine: the name of the model in the answer, where it is a variant's
ANSWERS_AS = "answers_as"
# the bytes for the client; and the report, which comes with the last item
Item = tuple[bytes, ModelReport | None]


class Cancellable(Protocol):
    """A call of a model."""

    def cancel(self) -> None:
        """Cancel the call, also in the replica that runs it."""


class ModelReply(Cancellable, Awaitable[Item], Protocol):
    """A call whose answer comes in one piece."""


class ModelStream(Cancellable, Protocol):
    """A call whose answer comes in several items."""

    async def __anext__(self) -> Item:
        """The next item."""


class CompleteMethod(Protocol):
    """See ModelServer.complete."""

    def remote(self, task: str, body: Body) -> ModelReply:
        """Start a call."""


class GenerateMethod(Protocol):
    """See ModelServer.generate."""

    def remote(self, task: str, body: Body) -> ModelStream:
        """Start a call."""


class ModelHandle(Protocol):
    """A handle of Ray Serve (`serve.get_app_handle`)."""

    complete: CompleteMethod
    generate: GenerateMethod

    def options(self, **options: object) -> "ModelHandle":
        """The handle with other options; see ray.serve.handle.DeploymentHandle.options."""
