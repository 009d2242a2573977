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
MAX_PATTERN = 500  # characters of a regular expression
# of a regular expression; with each group inside another, of the form `(…){2}`, the work of the compiler doubles
MAX_GROUPS = 6
_NUMBER = regex.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_ESCAPE = regex.compile(r"(?s)\\.")
_FENCE_LANGUAGE = regex.compile(r"\w*")


def check_reference(rule: str, reference: str) -> None:
    """Refuse a reference that its rule cannot use. A regular expression is not compiled; see check_pattern.

    Raises:
        ValueError: the message says what to change.
    """
    if rule not in RULES:
        raise ValueError(f"unknown grade '{rule}'; choose one of: {', '.join(RULES)}")
    try:
        if rule == "regex":
            _check_shape(reference)
        elif rule == "number" and not isfinite(_as_number(reference)):
            raise ValueError("not finite")
        elif rule == "json":
            json.loads(reference)
    except (ValueError, RecursionError) as error:
        raise _wrong_reference(rule, error) from None


def check_pattern(reference: str) -> None:
    """Refuse a reference that is no regular expression. A thread should do it: the worst take 20 ms.

    Raises:
        ValueError: the message says what to change.
    """
    try:
        _check_shape(reference)
        regex.compile(reference, cache_pattern=False)
    except (ValueError, RecursionError, regex.error) as error:
        raise _wrong_reference("regex", error) from None


def _wrong_reference(rule: str, error: Exception) -> ValueError:
    what = {"regex": "a regular expression", "number": "a number", "json": "JSON"}
    why = "nested too deeply" if isinstance(error, RecursionError) else error
    return ValueError(
        f"the reference is not {what[rule]} ({why}); correct it, or choose another grade"
    )


def _check_shape(pattern: str) -> None:
    """Refuse a regular expression whose compilation could take long."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"longer than {MAX_PATTERN} characters")
    if len(_ESCAPE.sub("", pattern).split("(")) > MAX_GROUPS + 1:
        raise ValueError(f"more than {MAX_GROUPS} groups")


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
        try:
            given = json.loads(_without_fence(answer))
            return float(_same(given, json.loads(reference)))
        except (ValueError, RecursionError):
            return 0.0
    return float(answer == reference)


def _without_fence(answer: str) -> str:
    """The text inside a code fence that surrounds the whole answer; without one, the answer."""
    inner = answer.removeprefix("```").removesuffix("```")
    if len(inner) != len(answer) - 6:
        return answer
    language = _FENCE_LANGUAGE.match(inner)
    return inner[language.end() :] if language else inner


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
