"""Bounds on the shape of a JSON body, checked before anything validates it.

Pydantic reports every error in a body. A body of one megabyte with 350,000 errors took 5 s and 1.2 GB.
"""

from pydantic_core import from_json

MAX_CONTAINERS = 20_000  # objects and lists of one body
MAX_KEYS = 100  # of the body itself; the API has some forty fields
MAX_MEMBERS = 5_000  # of each object in the body


def check_shape(raw: bytes) -> None:
    """Refuse a body that has too many parts for its validation to be cheap.

    The check takes time linear in the length of the body, and stops at the first excess.

    Raises:
        ValueError: the body is not JSON, or has too many parts of a kind that the message names.
    """
    try:
        body = from_json(raw, allow_inf_nan=True, cache_strings="none")
    except ValueError as error:
        raise ValueError(f"the body is not valid JSON: {str(error)[:200]}") from None
    if isinstance(body, dict) and len(body) > MAX_KEYS:
        raise ValueError(
            f"the body has more than {MAX_KEYS} keys; remove those that are not in the API"
        )
    pending = [body] if isinstance(body, dict | list) else []
    containers = 0
    while pending:
        item = pending.pop()
        if isinstance(item, dict) and len(item) > MAX_MEMBERS:
            raise ValueError(
                f"the body has an object of more than {MAX_MEMBERS} keys; send fewer"
            )
        values = item.values() if isinstance(item, dict) else item
        inner = [value for value in values if isinstance(value, dict | list)]
        containers += len(inner)
        if containers > MAX_CONTAINERS:
            raise ValueError(
                f"the body has more than {MAX_CONTAINERS} objects and lists; send fewer"
            )
        pending += inner
