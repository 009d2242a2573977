"""The size of the grammar that an engine compiles for a client's JSON schema, and the limits on it.

vLLM compiles a schema in one of the engine's threads, and nothing can interrupt it: a schema of 55 bytes can take
minutes. Two things multiply in a grammar: the counts of nested repetitions in a regular expression, and the number of
an object's properties with the number of those that may be chosen. Their products are bounded here, before an engine
sees the schema. Every function takes time linear in the schema's length.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_PATTERN_CHARS = 1_000  # of all patterns of one schema
MAX_COUNT = 128  # xgrammar fails on a pattern that repeats a part more often
MAX_LENGTH = 100_000  # of texts and lists, as a schema may ask for
MAX_SIZE = 1_000  # compiled within 0.3 s of CPU for a vocabulary of 102, benchmarks/LOG.md 2026-11-29
MAX_TOOLS_SIZE = 2_000  # of all tools of one request together
MAX_DIGITS = 20  # of a bound on a number, which becomes a pattern over its digits
FORMAT_SIZE = 10  # of a named format such as "email", which is a pattern, too
LENGTHS = ("minLength", "maxLength", "minItems", "maxItems")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@dataclass
class _Part:
    """A part of a pattern.

    size: states that it becomes. varies: whether it matches texts of several lengths.
    """

    size: int = 0
    varies: bool = False

    def add(self, other: "_Part") -> None:
        """Append a part."""
        self.size += other.size
        self.varies |= other.varies

    def repeat(self, least: int, most: int) -> None:
        """Apply a quantifier to the whole.

        A repetition inside a repetition is ambiguous: the compiler follows every way to divide a text among the two,
        and the cost grows with the square of the outer count.
        """
        self.size *= most * most if self.varies else most
        self.varies |= least != most


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse a schema that an engine would compile for long, or fail to compile.

    Args:
        schema: nested no deeper than Python's recursion limit allows.

    Raises:
        ValueError: says which limit is passed, and what to change.
    """
    if grammar_size(schema) > MAX_SIZE:
        raise ValueError(
            "is too large a grammar; use fewer properties, smaller or fewer nested repetition counts in patterns, "
            "or leave out minProperties and maxProperties"
        )


def is_constrained(body: Mapping[str, Any]) -> bool:
    """Whether the engine compiles a grammar of the client's for this request in OpenAI's shape."""
    if (body.get("response_format") or {}).get("type") == "json_schema":
        return True
    return bool(compiled_tools(body.get("tools") or [], body.get("tool_choice")))


def compiled_tools(tools: Sequence[Mapping[str, Any]], choice: Any) -> list[Mapping[str, Any]]:
    """The tools that become a grammar: all where one must be called, else those that are strict."""
    if choice == "none":
        return []
    if choice not in (None, "auto"):
        return list(tools)
    return [tool for tool in tools if isinstance(f := tool.get("function"), dict) and f.get("strict") is True]


def check_tools(schemas: Sequence[Mapping[str, Any]]) -> None:
    """Refuse tools that the engine has to compile into one grammar that is too large.

    Raises:
        ValueError: as of check_schema, or all together are too large.
    """
    total = 0
    for schema in schemas:
        check_schema(schema)
        total += grammar_size(schema)
    if total > MAX_TOOLS_SIZE:
        raise ValueError("are too large a grammar together; send fewer tools, or tools with fewer parameters")


def grammar_size(schema: Mapping[str, Any]) -> int:
    """About the number of states of the grammar that a schema becomes.

    Raises:
        ValueError: a count, a length, a number or the patterns' text is beyond its own limit.
    """
    size = 0
    characters = 0
    for node in _objects(schema):
        size += 1 + _properties_size(node)
        for pattern in _patterns(node):
            characters += len(pattern)
            if characters > MAX_PATTERN_CHARS:
                raise ValueError(f"has patterns of more than {MAX_PATTERN_CHARS} characters; shorten them")
            size += pattern_size(pattern)
        if isinstance(node.get("format"), str):
            size += FORMAT_SIZE
        for name in LENGTHS:
            if _number(node.get(name)) > MAX_LENGTH:
                raise ValueError(f"has a {name} beyond {MAX_LENGTH}; lower it or leave it out")
        for name in BOUNDS:
            bound = node.get(name)
            if isinstance(bound, int | float) and abs(bound) >= 10**MAX_DIGITS:
                raise ValueError(f"has a {name} of more than {MAX_DIGITS} digits; lower it or leave it out")
    return size


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """All JSON objects in a value, itself included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _properties_size(node: Mapping[str, Any]) -> int:
    """The share of an object's properties: with a bound on how many are chosen, each is tried at each place."""
    properties = node.get("properties")
    count = len(properties) if isinstance(properties, dict) else 0
    chosen = max(_number(node.get("minProperties")), _number(node.get("maxProperties")), 1)
    return (count + 1) * chosen


def _number(value: Any) -> int:
    """A count in a schema; 0 for anything that is none."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _patterns(node: Mapping[str, Any]) -> Iterator[str]:
    """The regular expressions of one object of a schema, not of those in it."""
    if isinstance(pattern := node.get("pattern"), str):
        yield pattern
    if isinstance(named := node.get("patternProperties"), dict):
        yield from named


def pattern_size(pattern: str) -> int:
    """About the number of states of a regular expression with its counts written out.

    Reads the expression once, from left to right, and takes one that is not well formed as well as it can: the engine
    refuses it.

    Raises:
        ValueError: it repeats a part more than MAX_COUNT times, or has a NUL.
    """
    if "\x00" in pattern:
        raise ValueError("has a pattern with a NUL character; leave it out")
    open_groups = [_Part()]
    last = _Part()
    at = 0
    while at < len(pattern):
        character = pattern[at]
        quantifier = _quantifier(pattern, at)
        if quantifier is not None:
            least, most, at = quantifier
            last.repeat(least, most)
            continue
        if character == ")" and len(open_groups) > 1:
            open_groups[-1].add(last)
            last = open_groups.pop()
        else:
            open_groups[-1].add(last)
            last = _Part(1)
        if character == "(":
            open_groups.append(_Part())
            last = _Part()
        elif character == "\\":
            at += 1
        elif character == "[":
            at = _end_of_class(pattern, at)
        at += 1
    open_groups[-1].add(last)
    return sum(part.size for part in open_groups)


def _end_of_class(pattern: str, at: int) -> int:
    """Where the character class that begins here ends; the pattern's end if it does not."""
    at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at


def _quantifier(pattern: str, at: int) -> tuple[int, int, int] | None:
    """The quantifier that begins here: its least count, its most, and where it ends; None if there is none.

    An open count has the cost of its least one.
    """
    character = pattern[at]
    if character == "?":
        return 0, 1, at + 1
    if character in "*+":
        return 0, 1, at + 1
    if character != "{":
        return None
    end = at + 1
    while end < len(pattern) and pattern[end] in "0123456789, ":
        end += 1
    least, comma, most = pattern[at + 1 : end].replace(" ", "").partition(",")
    if end == len(pattern) or pattern[end] != "}" or "," in most or not (least or most):
        return None
    if max(len(least), len(most)) > 6 or max(int(least or 0), int(most or 0)) > MAX_COUNT:
        raise ValueError(f"has a pattern that counts beyond {MAX_COUNT}; bound the text with minLength and maxLength")
    low = int(least or 0)
    high = low + 1 if comma and not most else int(most or low)
    return low, max(high, 1), end + 1
