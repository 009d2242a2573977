"""Text, and its embedding, to the features of a decision.

The embedding is made elsewhere and handed in; without one (the profiler was late) its columns are zero, and the
words and numbers of the text still tell most of it. Everything is bounded, so that no prompt can pull a linear model
far from where it has been.
"""

import re
from collections.abc import Sequence
from math import log1p, log2

import numpy as np

from policies.types import TaskProfile, Vector

EMBEDDING_COLUMNS = 16
OUTPUT_TOKENS = {  # of a typical answer, before anything is known
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
TEXT_COLUMNS = ("length", "words", "numbers", "digits", "largest_number", "longest_word", "steps", "question")
D = 1 + EMBEDDING_COLUMNS + len(KINDS) + len(TEXT_COLUMNS)

READ_CHARS = 4000  # from the beginning and from the end of a long text; the middle rarely tells what is asked

_KIND_PATTERNS = (  # the first that matches names the kind
    ("code", r"```|\bclass \w+[:({]|\b(def|function|sql|python|javascript|regex|bug)\b|\bcompil"),
    ("translation", r"\btranslat|\bin (french|german|spanish|chinese|english)\b"),
    ("extraction", r"\b(extract|json|list all|sentiment)\b|\bsummar|\bclassif"),
    ("strings", r"\b(sort|in order|arrange|letters?|spell|reverse|backwards|repeat after|word [a-z]+ again)\b|\bword:"),
    ("arithmetic", r"\d\s*[-+*/x×^=]\s*\d|\b(plus|minus|times|how many|add|solve|sum)\b|\bmultipl"),
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
_WORD, _NUMBER = re.compile(r"[^\W\d_]+"), re.compile(r"\d+")
_STEPS_RE, _CARE_RE, _HASTE_RE = re.compile(_STEPS), re.compile(_CARE), re.compile(_HASTE)


def profile(
    text: str, embedding: Vector | None, task: str, prompt_tokens: int, max_output_tokens: int = 0
) -> TaskProfile:
    """What a text tells before anybody answers it.

    Args:
        text: the whole prompt.
        embedding: [>= EMBEDDING_COLUMNS] unit vector, most telling directions first; or None.
        task: one of types.TASKS.
        prompt_tokens: counted or estimated.
        max_output_tokens: the client's own limit, or 0.
    """
    seen = (text if len(text) <= 2 * READ_CHARS else text[:READ_CHARS] + " " + text[-READ_CHARS:]).lower()
    kind = next((kind for kind, pattern in _COMPILED if pattern.search(seen)), "other")
    words, numbers = _WORD.findall(seen), _NUMBER.findall(seen)
    digits = sum(map(len, numbers))
    steps = len(_STEPS_RE.findall(seen))
    care, haste = _CARE_RE.search(seen), _HASTE_RE.search(seen)
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


def _features(columns: Sequence[float], kind: str, embedding: Vector | None) -> Vector:
    seen = [0.0] * EMBEDDING_COLUMNS if embedding is None else [2.0 * e for e in embedding[:EMBEDDING_COLUMNS].tolist()]
    return np.array([1.0, *seen, *(0.5 * (kind == known) for known in KINDS), *columns])


def _complexity(columns: Sequence[float], kind: str, numbers: int, steps: int) -> tuple[float, list[str]]:
    """How much work the text seems to ask for, in [0, 1]: a rule of thumb, with its reasons."""
    length, _, _, digits, _, _, _, _ = columns
    parts = {"code": 0.3, "translation": 0.2, "writing": 0.2, "extraction": 0.1, "arithmetic": 0.1}
    score, reasons = parts.get(kind, 0.0), [f"kind '{kind}'"]
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
