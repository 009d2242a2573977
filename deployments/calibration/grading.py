"""Grades an answer by its reference: 1.0 if it is right, else 0.0.

Spaces around answer and reference do not count.

    exact    the answer is the reference
    regex    the whole answer matches the reference, a regular expression
    number   the last number of the answer equals the reference
    json     the answer is JSON that equals the reference; a code fence around it does not count
"""

import json
from math import isclose, isfinite

import regex

from deployments.calibration.records import Prompt

RULES = ("exact", "regex", "number", "json")
MATCH_TIMEOUT_S = 0.5  # for a pattern that backtracks
MAX_ANSWER = 100_000  # characters that are graded
_NUMBER = regex.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = regex.compile(r"(?s)\s*```\w*\n(.*?)\n?\s*```\s*")


def check_reference(rule: str, reference: str) -> None:
    """Refuse a reference that its rule cannot use.

    Raises:
        ValueError: the message says what to change.
    """
    if rule not in RULES:
        raise ValueError(f"unknown grade '{rule}'; choose one of: {', '.join(RULES)}")
    try:
        if rule == "regex":
            regex.compile(reference)
        elif rule == "number" and not isfinite(_as_number(reference)):
            raise ValueError("not finite")
        elif rule == "json":
            json.loads(reference)
    except (ValueError, regex.error) as error:
        what = {"regex": "a regular expression", "number": "a number", "json": "JSON"}
        raise ValueError(
            f"the reference is not {what[rule]} ({error}); correct it, or choose another grade"
        ) from None


def grade(prompt: Prompt, answer: str) -> float:
    """The score of an answer to a prompt that has a reference. A match that takes too long is no match."""
    answer = answer.strip()[:MAX_ANSWER]
    reference = prompt.reference.strip()
    if prompt.rule == "regex":
        try:
            # concurrent: other threads go on meanwhile
            found = regex.fullmatch(
                reference, answer, timeout=MATCH_TIMEOUT_S, concurrent=True
            )
        except TimeoutError:
            return 0.0
        return float(found is not None)
    if prompt.rule == "number":
        numbers = _NUMBER.findall(answer)
        return float(
            bool(numbers)
            and isclose(_as_number(numbers[-1]), _as_number(reference), rel_tol=1e-9)
        )
    if prompt.rule == "json":
        fenced = _FENCE.fullmatch(answer)
        try:
            given = json.loads(fenced[1] if fenced else answer)
            return float(_same(given, json.loads(reference)))
        except (ValueError, RecursionError):
            return 0.0
    return float(answer == reference)


def _same(one: object, other: object) -> bool:
    """Whether two values of JSON are equal; in Python alone, true would equal 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            _same(value, other[key]) for key, value in one.items()
        )
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _as_number(text: str) -> float:
    return float(text.replace(",", ""))
