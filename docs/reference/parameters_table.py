"""The tables of capabilities and of vLLM's parameters, from deployments/parameters and deployments/settings.py."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from deployments.model_settings import CapabilitySettings
from deployments.parameters.structured_outputs import StructuredOutputs
from deployments.parameters.values import Unsupported
from deployments.parameters.vllm import (
    EngineChatParameters,
    EngineParameters,
    RefusedChatParameters,
    RefusedCompletionParameters,
)
from docs.reference.markdown import table
from docs.reference.settings_tables import meanings

BOUNDS = {
    "ge": "at least",
    "le": "at most",
    "minimum": "at least",
    "maximum": "at most",
    "maxLength": "characters at most",
    "maxItems": "items at most",
}
WORDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "array": "list",
    "object": "object",
}


def capabilities_page() -> str:
    """What each capability means, and when a model has it."""
    known = meanings(CapabilitySettings)
    return table(
        ("capability", "meaning"),
        ((f"`{name}`", known[name]) for name in CapabilitySettings.model_fields),
    )


def parameters_page() -> str:
    """The parameters that are passed on, with type and bounds."""
    schemas = EngineChatParameters.model_json_schema()
    both = EngineParameters.model_fields
    return table(
        ("parameter", "in", "values"),
        (
            (
                f"`{name}`",
                "chats, completions" if name in both else "chats",
                _values(schema, schemas["$defs"]),
            )
            for name, schema in schemas["properties"].items()
        ),
    )


def refused_page() -> str:
    """The parameters that are refused, with the reason."""
    rows: dict[str, tuple[str, str]] = {}
    for kind, where in (
        (RefusedChatParameters, ""),
        (RefusedCompletionParameters, ""),
        (StructuredOutputs, "structured_outputs."),
    ):
        for name, check in refusals(kind):
            default = "" if check.default is None else f"`{check.default}`".lower()
            rows[where + name] = (default, check.reason)
    return table(
        ("parameter", "harmless value", "reason"),
        ((f"`{name}`", *row) for name, row in rows.items()),
    )


def refusals(kind: type[BaseModel]) -> Iterator[tuple[str, Unsupported]]:
    """The refused parameters of a model, each with its check."""
    for name, field in kind.model_fields.items():
        for item in field.metadata:
            if isinstance(getattr(item, "func", None), Unsupported):
                yield name, item.func


def _values(schema: dict[str, Any], named: dict[str, Any]) -> str:
    """The values of a parameter in words."""
    kinds = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    words = " or ".join(_kind(part, named) for part in kinds or [schema])
    more = schema.get("description")
    return f"{words}. {more}" if more else words


def _kind(part: dict[str, Any], named: dict[str, Any]) -> str:
    if "$ref" in part:
        keys = named[part["$ref"].rpartition("/")[2]]["properties"]
        shown = [name for name in keys if keys[name].get("type") != "null"]
        return "object with " + ", ".join(f"`{name}`" for name in shown)
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"])
    bounds = [f"{words} {part[key]:,}" for key, words in BOUNDS.items() if key in part]
    return ", ".join([WORDS[part["type"]], *bounds])
