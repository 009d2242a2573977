"""Features of a decision, from the text of a request, what a classifier read in it, and its embedding.

The caller provides the reading (classifier.py) and the embedding. Without an embedding, because the profiler was late,
its columns are zero; the kind and the numbers of the text still hold most of the information. All features are
bounded, so that no prompt can move a linear model far.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import log1p, log2

import numpy as np

from policies.types import TaskProfile, Vector

EMBEDDING_COLUMNS = 16
# Output tokens of a typical answer, by kind of work.
OUTPUT_TOKENS = {
    "code": 300.0,
    "writing": 350.0,
    "translation": 60.0,
    "extraction": 60.0,
    "arithmetic": 40.0,
    "strings": 20.0,
    "question": 120.0,
    "other": 100.0,
}
KINDS = tuple(OUTPUT_TOKENS)
TEXT_COLUMNS = (
    "length",
    "words",
    "numbers",
    "digits",
    "largest_number",
    "longest_word",
    "clauses",
    "question",
)
# [D] names of the features, in their order. A column of the learned embedding has a number and no meaning of its own.
NAMES = (
    "constant",
    *(f"text {column + 1}" for column in range(EMBEDDING_COLUMNS)),
    *(f"kind {kind}" for kind in KINDS),
    *(name.replace("_", " ") for name in TEXT_COLUMNS),
)
D = len(NAMES)
KIND_VALUE = (
    0.5  # of the column of a request's kind; the columns of the other kinds are 0
)
KIND_COLUMNS = {kind: NAMES.index(f"kind {kind}") for kind in KINDS}

# Characters read from the beginning and from the end of a long text; the middle rarely says what is asked.
READ_CHARS = 4000

_WORD = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r"\d+")
_QUESTION = re.compile(r"[?？؟]")
# Marks that end a clause wherever they stand; those of ASCII do so only where no letter or digit follows, as in 3.5.
_MARKS = "\n،؛؟۔।॥၊။።፣፤។、。，．：；？！｡､"
_CLAUSE = re.compile(rf"[,;:.!?{_MARKS}]+(?:(?!\w)|(?<=[{_MARKS}]))")
MANY_CLAUSES = 4  # are a reason for complexity
MOST_CLAUSES = 16  # are counted


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text asks for.

    kind: the kind of work, one of KINDS.
    care: whether the text asks for accuracy.
    haste: whether the text asks for speed.
    language: of the text, one of classifier.LANGUAGES; "" if that is not sure.
    """

    kind: str = "other"
    care: bool = False
    haste: bool = False
    language: str = ""


def profile(
    text: str,
    reading: Reading,
    embedding: Vector | None,
    task: str,
    prompt_tokens: int,
    max_output_tokens: int = 0,
) -> TaskProfile:
    """The profile of a request, from its text alone.

    Args:
        text: the whole prompt.
        reading: what the classifier read in it.
        embedding: [>= EMBEDDING_COLUMNS] unit vector, most informative directions first; or None.
        task: one of types.TASKS.
        prompt_tokens: counted or estimated.
        max_output_tokens: the client's own limit, or 0.
    """
    seen = text
    if len(text) > 2 * READ_CHARS:
        seen = text[:READ_CHARS] + " " + text[-READ_CHARS:]
    words = _WORD.findall(seen)
    numbers = _NUMBER.findall(seen)
    digits = sum(map(len, numbers))
    clauses = sum(1 for _ in islice(_CLAUSE.finditer(seen), MOST_CLAUSES))
    columns = (
        min(1.0, log1p(len(text)) / 10),
        min(1.0, len(words) / 40),
        min(1.0, len(numbers) / 8),
        min(1.0, digits / 16),
        min(1.0, max(map(len, numbers), default=0) / 6),
        min(1.0, max(map(len, words), default=0) / 16),
        clauses / MOST_CLAUSES,
        float(_QUESTION.search(seen) is not None),
    )
    complexity, reasons = _complexity(columns, reading.kind, len(numbers), clauses)
    if reading.care:
        reasons.append("asks for accuracy")
    if reading.haste:
        reasons.append("asks for speed")
    return TaskProfile(
        features=_features(columns, reading.kind, embedding),
        task=task,
        kind=reading.kind,
        prompt_tokens=prompt_tokens,
        max_output_tokens=max_output_tokens,
        output_tokens=OUTPUT_TOKENS[reading.kind],
        complexity=complexity,
        accuracy_sensitivity=float(reading.care),
        time_sensitivity=float(reading.haste),
        reasons=tuple(reasons),
        language=reading.language,
    )


def names_of(count: int) -> tuple[str, ...]:
    """The names of `count` features; numbers if an earlier release had other features than this one."""
    if count == D:
        return NAMES
    return tuple(f"feature {column + 1}" for column in range(count))


def _features(columns: Sequence[float], kind: str, embedding: Vector | None) -> Vector:
    seen = (
        [0.0] * EMBEDDING_COLUMNS
        if embedding is None
        else [2.0 * e for e in embedding[:EMBEDDING_COLUMNS].tolist()]
    )
    return np.array(
        [1.0, *seen, *(KIND_VALUE * (kind == known) for known in KINDS), *columns]
    )


def _complexity(
    columns: Sequence[float], kind: str, numbers: int, clauses: int
) -> tuple[float, list[str]]:
    """Estimated amount of work in [0, 1] by a rule of thumb, with the reasons in words."""
    length, _, _, digits, _, _, clauses_share, _ = columns
    parts = {
        "code": 0.3,
        "translation": 0.2,
        "writing": 0.2,
        "extraction": 0.1,
        "arithmetic": 0.1,
    }
    score = parts.get(kind, 0.0)
    reasons = [f"kind '{kind}'"]
    if length > 0.55:
        score += min(0.4, 0.2 * log2(length / 0.55) * 4)
        reasons.append("long text")
    if numbers >= 2 and digits >= 0.3:
        score += 0.25 * numbers / 2 + 0.2 * digits
        reasons.append(f"{numbers} numbers")
    score += 0.3 * clauses_share
    if clauses >= MANY_CLAUSES:
        more = " or more" * (clauses == MOST_CLAUSES)
        reasons.append(f"{clauses}{more} clauses")
    return min(1.0, round(score, 3)), reasons
