"""What a request needs of an arm, and which of its parameters says so."""

from collections.abc import Sequence
from dataclasses import dataclass

from policies.capabilities import Capability


@dataclass(frozen=True, slots=True)
class Need:
    """A capability that a request needs.

    Attributes:
        capability: which.
        parameter: path of the parameter that needs it.
    """

    capability: Capability
    parameter: str


def capability_names(needs: Sequence[Need]) -> tuple[str, ...]:
    """The capabilities, each once, as a profile has them."""
    return tuple(dict.fromkeys(need.capability.value for need in needs))
