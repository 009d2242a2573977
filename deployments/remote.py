"""Type of the methods of components in other processes: Ray's own handles are untyped.

A module that calls such a component declares what it needs of the handle as a Protocol of `Method`s.
"""

from collections.abc import Awaitable
from typing import ParamSpec, Protocol, TypeVar

Arguments = ParamSpec("Arguments")
Result_co = TypeVar("Result_co", covariant=True)


class Method(Protocol[Arguments, Result_co]):
    """A method of an actor or of a deployment."""

    def remote(
        self, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Awaitable[Result_co]:
        """Start a call. Awaiting the returned object gives the method's result, or raises its exception."""
