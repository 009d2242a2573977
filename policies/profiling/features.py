"""Features of a decision, from the text of a request and its embedding.

The caller provides the embedding. Without one, because the profiler was late, its columns are zero; the words and
numbers of the text still hold most of the information. All features are bounded, so that no prompt can move a linear
model far.
"""

import re
from collections.abc import Sequence
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
    "steps",
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

# The first pattern that matches gives the kind.
_KIND_PATTERNS = (
    (
        "code",
        r"```|\bclass \w+[:({]|\b(def|function|sql|python|javascript|regex|bug)\b|\bcompil",
    ),
    ("translation", r"\btranslat|\bin (french|german|spanish|chinese|english)\b"),
    ("extraction", r"\b(extract|json|list all|sentiment)\b|\bsummar|\bclassif"),
    (
        "strings",
        r"\b(sort|in order|arrange|letters?|spell|reverse|backwards|repeat after|word [a-z]+ again)\b|\bword:",
    ),
    (
        "arithmetic",
        # two numbers with a short word of any language between them: 570 or 718, 347 más 586
        r"\d\s*[-+*/x×^=]\s*\d|\b\d+ [^\W\d_]{1,5} \d+\b|\b(plus|minus|times|how many|add|solve|sum)\b|\bmultipl",
    ),
    ("writing", r"\b(write|essay|poem|email|story about|rewrite|draft)\b"),
    ("question", r"\?|\b(who|what|which|when|where|why|how)\b"),
)
_STEPS = r"\b(then|and|after|each|every|prove|explain|step|because|derive|plan)\b"
_CARE = (
    r"\b(exact(ly)?|precise(ly)?|careful(ly)?|take care|must be (right|correct)|double.check|accurate(ly)?|check it"
    r"|critical)\b"
)
_HASTE = r"\b(quick(ly)?|fast|urgent(ly)?|at once|asap|hurry|immediately|right now|in a rush)\b"
_COMPILED = [(kind, re.compile(pattern)) for kind, pattern in _KIND_PATTERNS]
_WORD = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r"\d+")
_STEPS_RE = re.compile(_STEPS)
_CARE_RE = re.compile(_CARE)
_HASTE_RE = re.compile(_HASTE)


def profile(
    text: str,
    embedding: Vector | None,
    task: str,
    prompt_tokens: int,
    max_output_tokens: int = 0,
) -> TaskProfile:
    """The profile of a request, from its text alone.

    Args:
        text: the whole prompt.
        embedding: [>= EMBEDDING_COLUMNS] unit vector, most informative directions first; or None.
        task: one of types.TASKS.
        prompt_tokens: counted or estimated.
        max_output_tokens: the client's own limit, or 0.
    """
    seen = text
    if len(text) > 2 * READ_CHARS:
        seen = text[:READ_CHARS] + " " + text[-READ_CHARS:]
    seen = seen.lower()
    kind = next((kind for kind, pattern in _COMPILED if pattern.search(seen)), "other")
    words = _WORD.findall(seen)
    numbers = _NUMBER.findall(seen)
    digits = sum(map(len, numbers))
    steps = len(_STEPS_RE.findall(seen))
    care = _CARE_RE.search(seen)
    haste = _HASTE_RE.search(seen)
    columns = (
        min(1.0, log1p(len(text)) / 10),
        min(1.0, len(words) / 40),
        min(1.0, len(numbers) / 8),
        min(1.0, digits / 16),
        min(1.0, max(map(len, numbers), default=0) / 6),
        min(1.0, max(map(len, words), default=0) / 16),
        min(1.0, steps / 4),
        float("?" in seen),
    )
    complexity, reasons = _complexity(columns, kind, len(numbers), steps)
    if care:
        reasons.append(f"asks for accuracy ('{care.group()}')")
    if haste:
        reasons.append(f"asks for speed ('{haste.group()}')")
    return TaskProfile(
        features=_features(columns, kind, embedding),
        task=task,
        kind=kind,
        prompt_tokens=prompt_tokens,
        max_output_tokens=max_output_tokens,
        output_tokens=OUTPUT_TOKENS[kind],
        complexity=complexity,
        accuracy_sensitivity=1.0 if care else 0.0,
        time_sensitivity=1.0 if haste else 0.0,
        reasons=tuple(reasons),
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
    columns: Sequence[float], kind: str, numbers: int, steps: int
) -> tuple[float, list[str]]:
    """Estimated amount of work in [0, 1] by a rule of thumb, with the reasons in words."""
    length, _, _, digits, _, _, _, _ = columns
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
    if steps >= 2:
        score += min(0.3, 0.1 * steps)
        reasons.append(f"{steps} words of several steps")
    return min(1.0, round(score, 3)), reasons
