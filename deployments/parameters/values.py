"""Types of values in request bodies, with their bounds, and the checks that several parameters share."""

import json
from collections.abc import Callable
from math import isfinite
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

MAX_DEPTH = 16
MAX_VALUES = 5_000  # of one tool, schema or other value of free form
MAX_BIASES = 300
MAX_METADATA = 16
MAX_CHARS = 400_000  # of one text
MAX_TOKENS = 2**31 - 1  # a smaller limit is set by the models' contexts
MAX_TOKEN_IDS = 1_024  # in a list of tokens of a vocabulary
Item = TypeVar("Item")
DECISION_ID = r"^[^\x00-\x1f\x7f]{1,64}$"  # PostgreSQL takes no NUL


def small(value: Item, depth: int = MAX_DEPTH, values: int = MAX_VALUES) -> Item:
    """Refuse a value that is nested too deeply, has too many parts, or has numbers that are not finite."""
    layer: list[object] = [value]
    count = 0
    for _ in range(depth):
        inner: list[object] = []
        for item in layer:
            if isinstance(item, float) and not isfinite(item):
                raise ValueError("numbers must be finite")
            if isinstance(item, dict | list):
                inner += item.values() if isinstance(item, dict) else item
        layer = inner
        count = count + len(inner)
        if count > values:
            raise ValueError(f"has more than {values} values; send less")
    if layer:
        raise ValueError(f"is nested deeper than {depth}; make it flatter")
    return value


def short(value: Item, limit: int) -> Item:
    """Refuse a value that is longer than `limit` characters as JSON."""
    if len(json.dumps(value, ensure_ascii=False)) > limit:
        raise ValueError(f"is longer than {limit} characters as JSON; send less")
    return value


def at_most(count: int) -> Callable[[object], object]:
    """A check of an object's size before its members are validated; a repeated key counts once."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"has more than {count} keys; send fewer")
        return value

    return check


def _whole(value: object) -> object:
    """Refuse what pydantic would turn into a number: booleans, and texts with a number in them."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


class Unsupported:
    """A check of a parameter that is refused on purpose: null is as good as left out, and so is its default.

    Attributes:
        reason: why, and what to use instead.
        default: a value that changes nothing.
    """

    def __init__(self, reason: str, default: object = None):
        self.reason = reason
        self.default = default

    def __call__(self, value: object) -> None:
        """Validate a value.

        Raises:
            ValueError: the value would change something.
        """
        # 1 is 1.0, but `true` is no number
        same = isinstance(value, bool) is isinstance(self.default, bool)
        if value is not None and not (same and value == self.default):
            raise ValueError(f"is not supported here; {self.reason}")


# validation stops at the first wrong item of a list
Listed = Annotated[list[Item], Field(fail_fast=True)]
Text = Annotated[str, StringConstraints(max_length=MAX_CHARS)]
# `true` and "1" are no numbers, and 1 and "yes" are no booleans
Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Token = Annotated[Whole, Field(ge=0, lt=2**31)]
Tokens = Annotated[Listed[Token], Field(min_length=1, max_length=MAX_TOKEN_IDS)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,7}$")]
LogitBias = Annotated[
    dict[TokenKey, Number],
    Field(max_length=MAX_BIASES),
    BeforeValidator(at_most(MAX_BIASES)),
]
Name = Annotated[str, StringConstraints(max_length=256)]
Metadata = Annotated[
    dict[Name, Text],
    Field(max_length=MAX_METADATA),
    BeforeValidator(at_most(MAX_METADATA)),
]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Free = Annotated[dict[str, object], AfterValidator(small)]
