"""The size of a schema's grammar: which schemas are accepted, and what the check itself costs."""

import json
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.grammars.bounds import (
    MAX_SIZE,
    check_schema,
    grammar_size,
    is_constrained,
    pattern_size,
)
from deployments.parameters.chat import ChatRequest


def text(pattern: str) -> dict[str, Any]:
    """The schema of a string of this pattern."""
    return {"type": "string", "pattern": pattern}


def record(count: int, **bounds: Any) -> dict[str, Any]:
    """The schema of an object with so many properties."""
    return {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(count)},
        **bounds,
    }


REFUSED = {
    # of the list of findings
    "nested counts": text("^((a?){1,128}){1,128}$"),
    "nested counts of classes": text("^(([a-z]{0,128})[0-9]{0,128}){0,128}$"),
    "600 properties of which 300 to 400": record(
        600, minProperties=300, maxProperties=400
    ),
    # neighbours
    "three times fifty": text("^((((a|b){1,50}){1,50}){1,50})$"),
    "counts in a chain": text("^a{100}{100}$"),
    "an optional part in a star in a count": text("^((a*)?b*){1,128}$"),
    "an open count in a count": text("^((ab?){100,}){2,}$"),
    "lazy counts": text("^((a?){1,60}?){1,60}?$"),
    "in the name of a property": {"patternProperties": {"^((a?){1,64}){1,64}$": {}}},
    "in a definition": {
        "$ref": "#/$defs/x",
        "$defs": {"x": text("^((a?){1,64}){1,64}$")},
    },
    "200 patterns of 30": record(
        0, properties={f"p{i}": text("[a]{30}") for i in range(99)}
    ),
    "no properties, but 2,000 of them": {"type": "object", "minProperties": 2_000},
    "properties in each of ten objects": {"anyOf": [record(40, maxProperties=20)] * 10},
    "a count of 129": text("a{129}"),
    "a count of 30 digits": text("a{" + "9" * 30 + "}"),
    "a count behind blanks": text("a{   " + " " * 200 + "500}"),
    "a text of a billion": {"type": "string", "minLength": 10**9},
    "a list of 1e300": {"type": "array", "maxItems": 1e300},
    "a bound of 300 digits": {"type": "integer", "minimum": -(10**300)},
    "150 numbers between bounds of 17 digits": record(
        0,
        properties={
            f"p{i}": {"type": "integer", "minimum": -(10**16), "maximum": 10**16}
            for i in range(150)
        },
    ),
    "a pattern with NUL": text("a\x00b"),
    "patterns of 2,000 characters": {"anyOf": [text("a" * 500)] * 4},
}
ACCEPTED = {
    "an address": text(r"^(\d{1,3}\.){3}\d{1,3}$"),
    "a UUID": text("^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$"),
    "a MAC address": text("^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$"),
    "a path": text("^(/[A-Za-z0-9_.-]+)*$"),
    "a name of 64": text("^[A-Za-z_][A-Za-z0-9_]{0,63}$"),
    "a phone number": text(r"^(\([0-9]{3}\))?[0-9]{3}-[0-9]{4}$"),
    "braces that are no counts": text("^{a}{{b}}{,}{ }$"),
    "brackets that do not close": text("[((("),
    "brackets that were not opened": text(")))]}"),
    "100 properties": record(100, required=[f"p{i}" for i in range(100)]),
    "at least one of 20": record(20, minProperties=1),
    "50 numbers between 0 and 100": record(
        0,
        properties={
            f"p{i}": {"type": "number", "minimum": 0, "maximum": 100} for i in range(50)
        },
    ),
    "a text of 4,000": {"type": "string", "maxLength": 4_000},
    "50 items": {"type": "array", "items": record(5), "maxItems": 50},
    "500 values": {"enum": [f"value {i}" for i in range(500)]},
    "formats": record(
        0,
        properties={f"p{i}": {"type": "string", "format": "email"} for i in range(20)},
    ),
    "a tree": {
        "$ref": "#/$defs/t",
        "$defs": {"t": {"properties": {"l": {"$ref": "#/$defs/t"}}}},
    },
    "keywords as names": {
        "properties": {"pattern": {"type": "string"}, "minLength": {"type": "integer"}}
    },
}
HOSTILE_PATTERNS = {
    "blanks in a brace": "{" + " " * 999,
    "blanks in many braces": "{   " * 250,
    "digits in a brace": "{" + "1" * 999,
    "commas in a brace": "{1,1" + ",1" * 498,
    "groups": "(" * 500 + ")" * 500,
    "open groups": "(" * 1_000,
    "open classes": "[" * 1_000,
    "escapes": "\\" * 1_000,
    "escapes in a class": "[" + "\\]" * 499,
    "counts in a chain": "a" + "{1}" * 333,
    "alternatives": "|" * 1_000,
}


def chat(**change: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": "x"}], **change}


def with_schema(schema: Any) -> dict[str, Any]:
    return chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema},
        }
    )


def tool(schema: Any, **change: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": "f", "parameters": schema, **change},
    }


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED)
def test_a_schema_that_takes_an_engine_long_is_refused(schema: dict[str, Any]) -> None:
    """It is refused as the format of the answer, and as the parameters of a tool that is compiled."""
    with pytest.raises(ValidationError, match=r"grammar|pattern|beyond|digits"):
        ChatRequest.model_validate_json(json.dumps(with_schema(schema)))
    forced = chat(tools=[tool(schema)], tool_choice="required")
    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json(json.dumps(forced))
    strict = chat(tools=[tool(schema, strict=True)])
    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json(json.dumps(strict))


@pytest.mark.parametrize("schema", ACCEPTED.values(), ids=ACCEPTED)
def test_an_ordinary_schema_is_accepted(schema: dict[str, Any]) -> None:
    """Its size is far below the limit."""
    assert (
        ChatRequest.model_validate_json(json.dumps(with_schema(schema))).response_format
        is not None
    )
    assert grammar_size(schema) <= MAX_SIZE / 1.5


def test_tools_are_bounded_together() -> None:
    """Small tools may be too large together; tools that are not compiled may be many."""
    many = [tool(record(60)) for _ in range(40)]
    with pytest.raises(ValidationError, match="together"):
        ChatRequest.model_validate(chat(tools=many, tool_choice="required"))
    assert ChatRequest.model_validate(chat(tools=many)).tools is not None
    assert (
        ChatRequest.model_validate(chat(tools=many, tool_choice="none")).tools
        is not None
    )


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS.values(), ids=HOSTILE_PATTERNS)
def test_the_check_reads_a_pattern_once(pattern: str) -> None:
    """The test counts steps of the interpreter: a pattern of twice the length takes at most 2.5 times the steps."""

    def steps(given: str) -> int:
        count = 0

        def tick(*_: Any) -> Any:
            nonlocal count
            count += 1
            return tick

        before = sys.gettrace()
        sys.settrace(tick)
        try:
            pattern_size(given)
        except ValueError:
            pass
        finally:
            sys.settrace(before)
        return count

    assert steps(pattern + pattern) <= 2.5 * steps(pattern) + 200
    assert steps(pattern) <= 40 * len(pattern) + 200


def test_a_larger_count_is_never_cheaper() -> None:
    """This holds for a count alone and for a count inside another."""
    for form in ("a{0,%d}", "(a{0,3}){0,%d}", "((ab){%d}c)*"):
        sizes = [pattern_size(form % count) for count in (1, 2, 8, 32, 128)]
        assert sizes == sorted(sizes) and sizes[-1] > sizes[0]


def test_which_schemas_are_compiled() -> None:
    """Schemas, tools that must be called, and strict tools are compiled; other tools are only in the prompt."""
    assert is_constrained(with_schema({}))
    assert is_constrained(chat(tools=[tool({})], tool_choice="required"))
    assert is_constrained(
        chat(
            tools=[tool({})],
            tool_choice={"type": "function", "function": {"name": "f"}},
        )
    )
    assert is_constrained(chat(tools=[tool({}, strict=True)]))
    for free in (
        chat(),
        chat(tools=[tool({})]),
        chat(response_format={"type": "json_object"}),
        {"input": "x"},
    ):
        assert not is_constrained(free)
    assert not is_constrained(chat(tools=[tool({}, strict=True)], tool_choice="none"))


@pytest.mark.parametrize("schema", ACCEPTED.values(), ids=ACCEPTED)
def test_xgrammar_compiles_accepted_schemas(schema: dict[str, Any]) -> None:
    """The compiler compiles them or refuses them at once; none of them hangs."""
    import xgrammar

    check_schema(schema)
    tokens = xgrammar.TokenizerInfo([chr(32 + i) for i in range(95)])
    compiler = xgrammar.GrammarCompiler(tokens, cache_enabled=False)
    try:
        compiled = compiler.compile_json_schema(json.dumps(schema))
    except RuntimeError:
        return
    assert compiled.memory_size_bytes < 20 * 2**20
