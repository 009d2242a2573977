"""Estimates and limits the size of the grammar that an engine compiles for a client's JSON schema.

vLLM compiles a schema in one of the engine's threads, and nothing can interrupt the compilation: a schema of 55 bytes
can take minutes. Two products make a grammar large: the counts of nested repetitions in a regular expression, and the
number of an object's properties times the number that may be chosen. The gateway bounds these products before an engine
sees the schema. Every function takes time linear in the schema's length.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

MAX_PATTERN_CHARS = 1_000  # of all patterns of one schema
MAX_COUNT = 128  # xgrammar fails on a pattern that repeats a part more often
MAX_LENGTH = 100_000  # of strings and lists, in a schema's minLength, maxItems, …
MAX_SIZE = 1_000  # random schemas within it took at most 0.42 s of CPU (benchmarks/LOG.md, 2026-11-29)
MAX_TOOLS_SIZE = 2_000  # of all tools of one request together
MAX_DIGITS = 20  # of a bound on a number; the bound becomes a pattern over its digits
MAX_CHOICES = 1_000  # texts among which an answer is chosen
MAX_CHOICE_CHARS = 32_000  # of all of them
FORMAT_SIZE = 10  # of a named format such as "email", which becomes a pattern
OUTPUTS = ("json", "regex", "choice")  # kinds of `structured_outputs`
LENGTHS = ("minLength", "maxLength", "minItems", "maxItems")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@dataclass
class _Part:
    """A part of a pattern.

    size: number of states of the grammar. varies: whether the part matches texts of different lengths.
    """

    size: int = 0
    varies: bool = False

    def add(self, other: "_Part") -> None:
        """Append a part."""
        self.size += other.size
        self.varies |= other.varies

    def repeat(self, least: int, most: int) -> None:
        """Apply a quantifier to this part.

        A repetition inside a repetition is ambiguous: the compiler follows every way to divide a text among the two,
        and the cost grows with the square of the outer count.
        """
        self.size *= most * most if self.varies else most
        self.varies |= least != most


def check_schema(schema: Mapping[str, object]) -> None:
    """Refuse a schema that an engine would compile for long, or fail to compile.

    Args:
        schema: nested no deeper than Python's recursion limit allows.

    Raises:
        ValueError: the schema exceeds a limit; the message says which, and what to change.
    """
    if grammar_size(schema) > MAX_SIZE:
        raise ValueError(
            "is too large a grammar; use fewer properties, smaller or fewer nested repetition counts in patterns, "
            "or leave out minProperties and maxProperties"
        )


def check_regex(pattern: str) -> None:
    """Refuse a regular expression for an answer that an engine would compile for long.

    Raises:
        ValueError: the expression is too long or its counts are too large.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"has more than {MAX_PATTERN_CHARS} characters; shorten it")
    if pattern_size(pattern) > MAX_SIZE:
        raise ValueError(
            "is too large a grammar; use smaller or fewer nested repetition counts"
        )


def check_choices(choices: Sequence[str]) -> None:
    """Refuse choices for an answer that are too many, too long, or that a grammar in EBNF cannot hold.

    Raises:
        ValueError: the same, in words.
    """
    if len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICE_CHARS:
        raise ValueError(
            f"has more than {MAX_CHOICES} texts or {MAX_CHOICE_CHARS} characters; send fewer"
        )
    if any(not choice or not choice.isprintable() for choice in choices):
        raise ValueError("has a text that is empty or has control characters")


def is_constrained(body: Mapping[str, object]) -> bool:
    """Whether the engine compiles a schema of the client for this request in OpenAI's shape."""
    return constraint_path(body) is not None


def constraint_path(body: Mapping[str, object]) -> str | None:
    """The path of what the engine compiles for this request; None if it compiles nothing of the client's.

    Tools that must be called replace the format.
    """
    tools = body.get("tools")
    if isinstance(tools, list) and compiled_tools(tools, body.get("tool_choice")):
        return "tools"
    wanted = body.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        return "response_format.json_schema.schema"
    outputs = body.get("structured_outputs")
    if not isinstance(outputs, dict):
        return None
    kinds = [kind for kind in OUTPUTS if kind in outputs]
    return f"structured_outputs.{kinds[0]}" if kinds else None


def compiled_tools(
    tools: Sequence[Mapping[str, object]], choice: object
) -> list[Mapping[str, object]]:
    """The tools that become a grammar: all if a tool must be called, otherwise the strict ones."""
    if choice == "none":
        return []
    if choice not in (None, "auto"):
        return list(tools)
    compiled = []
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict) and function.get("strict") is True:
            compiled.append(tool)
    return compiled


def check_tools(schemas: Sequence[Mapping[str, object]]) -> None:
    """Refuse tools whose common grammar would be too large.

    Raises:
        ValueError: a tool exceeds a limit of check_schema, or all tools together are too large.
    """
    total = 0
    for schema in schemas:
        check_schema(schema)
        total += grammar_size(schema)
    if total > MAX_TOOLS_SIZE:
        raise ValueError(
            "are too large a grammar together; send fewer tools, or tools with fewer parameters"
        )


def grammar_size(schema: Mapping[str, object]) -> int:
    """Estimate the number of states of a schema's grammar.

    Raises:
        ValueError: a count, a length, a number or the text of the patterns exceeds its own limit.
    """
    size = 0
    characters = 0
    for node in _objects(schema):
        size += 1 + _chosen_size(node)
        for pattern in _patterns(node):
            characters += len(pattern)
            if characters > MAX_PATTERN_CHARS:
                raise ValueError(
                    f"has patterns of more than {MAX_PATTERN_CHARS} characters; shorten them"
                )
            size += pattern_size(pattern)
        if isinstance(node.get("format"), str):
            size += FORMAT_SIZE
        for name in LENGTHS:
            if _number(node.get(name)) > MAX_LENGTH:
                raise ValueError(
                    f"has a {name} beyond {MAX_LENGTH}; lower it or leave it out"
                )
        for name in BOUNDS:
            bound = node.get(name)
            if not isinstance(bound, int | float):
                continue
            if abs(bound) >= 10**MAX_DIGITS:
                raise ValueError(
                    f"has a {name} of more than {MAX_DIGITS} digits; lower it or leave it out"
                )
            size += len(str(abs(int(bound))))
    return size


def _objects(value: object) -> Iterator[Mapping[str, object]]:
    """All JSON objects in a value, including the value itself."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _chosen_size(node: Mapping[str, object]) -> int:
    """The share of a bound on the number of properties: each property is tried at each place."""
    chosen = max(_number(node.get("minProperties")), _number(node.get("maxProperties")))
    properties = node.get("properties")
    count = len(properties) if isinstance(properties, dict) else 0
    return max(count, 1) * chosen


def _number(value: object) -> int:
    """A count in a schema; 0 for a value that is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int(value)


def _patterns(node: Mapping[str, object]) -> Iterator[str]:
    """The regular expressions of one object of a schema, without the objects inside it."""
    if isinstance(pattern := node.get("pattern"), str):
        yield pattern
    if isinstance(named := node.get("patternProperties"), dict):
        yield from named


def pattern_size(pattern: str) -> int:
    """Estimate the number of states of a regular expression with its counts written out.

    The expression is read once, from left to right. The size of an expression that is not well formed does not matter,
    because the engine refuses it.

    Raises:
        ValueError: the expression repeats a part more than MAX_COUNT times, or has a NUL.
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
    """The end of the character class that begins here; the end of the pattern if the class does not end."""
    at += 1
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at


def _quantifier(pattern: str, at: int) -> tuple[int, int, int] | None:
    """The quantifier that begins here: its least count, its largest count, and its end; None if there is none.

    A quantifier without a largest count costs as much as its least count.
    """
    character = pattern[at]
    if character in "?*+":
        return 0, 1, at + 1
    if character != "{":
        return None
    end = at + 1
    while end < len(pattern) and pattern[end] in "0123456789, ":
        end += 1
    least, comma, most = pattern[at + 1 : end].replace(" ", "").partition(",")
    if end == len(pattern) or pattern[end] != "}" or "," in most or not (least or most):
        return None
    too_long = max(len(least), len(most)) > 6
    if too_long or max(int(least or 0), int(most or 0)) > MAX_COUNT:
        raise ValueError(
            f"has a pattern that counts beyond {MAX_COUNT}; bound the text with minLength and maxLength"
        )
    low = int(least or 0)
    high = low + 1 if comma and not most else int(most or low)
    return low, max(high, 1), end + 1
