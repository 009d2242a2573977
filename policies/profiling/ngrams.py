"""The n-grams and shapes of a text as numbers of a fixed range, for texts in any language.

A hashed n-gram needs no vocabulary, so every script is read alike (Weinberger et al., Feature Hashing for Large Scale
Multitask Learning, ICML 2009). The numbers depend on the text alone: every process finds the same ones.
"""

import re
import unicodedata
from itertools import pairwise
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1 << 15
# Characters read from the beginning and from the end of a text: they say what is asked, and the work is bounded.
EDGE_CHARS = 256
LONGEST = 5  # characters of an n-gram
LONGEST_NUMBER = 4  # digits that count
SHAPES = 64  # numbers at the end of the range that stand for shapes
HASHED = BUCKETS - SHAPES

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\w+")
# Exact syntax, which is the same in every language. The order is that of the numbers of the shapes. A pattern whose
# alternatives begin with a letter or sign is found several times as fast as one that begins with a class or a boundary.
_SYNTAX = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"```|~~~",  # a fence
        r"c(?<=\bc)lass \w+ ?[:({]|d(?<=\bd)ef \w+\(|\) ?[;{]|=>|->|\{$|\}$|;$",  # code
        r"^[ \t]*(?:import|from|#include|using|return|for|if|while) .*[;:)>]$",
        r"\d ?[-+*/×÷·^] ?\d",  # a formula
        r"= ?\??$",
        r"\"\w+\" ?:",  # a key of JSON
        r"^[ \t]*\(?[A-Da-d][.):] ",  # the options of a question
        r"E(?<=\wE)(?:rror|xception)\b",
        r"___",  # a gap
        r"://|@(?<=\w@)\w",
    )
)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(31)


def numbers_of(text: str) -> NDArray[np.int64]:
    """The distinct numbers below BUCKETS of what a text contains, ascending; never empty, and any `str` has some.

    They stand for the sequences of 1 to LONGEST characters, the words, the pairs of neighbouring words, and the shapes:
    exact syntax, scripts, and how many characters, lines and numbers there are. Upper and lower case, the digits of a
    number and the forms of a character that Unicode calls compatible are not told apart.
    """
    seen = text
    if len(text) > 2 * EDGE_CHARS:
        seen = f"{text[:EDGE_CHARS]}\n{text[-EDGE_CHARS:]}"
    seen = unicodedata.normalize("NFKC", seen)
    plain = _NUMBER.sub(
        lambda found: "0" * min(len(found.group()), LONGEST_NUMBER), seen.lower()
    )
    words = [crc32(_bytes(word)) for word in _WORD.findall(plain)]
    pairs = [first * 31 + second for first, second in pairwise(words)]
    # what a text begins with says more than the same words later
    first = [word + 1 for word in words[:2]]
    hashes = [np.array(words + pairs + first, np.uint64), *_grams(plain)]
    hashed = np.concatenate(hashes)
    hashed *= _MULTIPLIER
    hashed ^= hashed >> _SHIFT
    hashed *= _MULTIPLIER
    present = np.zeros(BUCKETS, np.bool_)
    present[(hashed >> np.uint64(40)) % np.uint64(HASHED)] = True
    present[_shapes(text, seen)] = True
    return np.flatnonzero(present)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _grams(text: str) -> list[NDArray[np.uint64]]:
    """A hash of each sequence of 1 to LONGEST characters; white space is one space, and a space is at both ends."""
    spaced = f" {' '.join(text.split())} "
    codes = np.frombuffer(
        spaced.encode("utf-32-le", "surrogatepass"), np.uint32
    ).astype(np.uint64)
    found = [codes + np.uint64(1 << 33)]
    for length in range(2, min(LONGEST, len(codes)) + 1):
        shorter = found[-1][: len(codes) - length + 1]
        found.append(
            (shorter ^ (shorter >> _SHIFT)) * _MULTIPLIER + codes[length - 1 :]
        )
    # the blocks of Unicode that the characters are in: the scripts
    found.append((codes >> np.uint64(7)) + np.uint64(1 << 34))
    return found


def _shapes(text: str, seen: str) -> list[int]:
    """The numbers of the shapes of a text, whose beginning and end is `seen`."""
    numbers = min(len(_NUMBER.findall(seen)), 7)
    lines = min(seen.count("\n"), 7)
    size = min(len(text).bit_length(), 15)
    shapes = [HASHED + numbers, HASHED + 8 + lines, HASHED + 16 + size]
    shapes += [
        HASHED + 32 + row
        for row, pattern in enumerate(_SYNTAX)
        if pattern.search(seen) is not None
    ]
    return shapes
