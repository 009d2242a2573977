"""The reference of the settings, from deployments/settings.py.

Types, bounds and defaults come from the pydantic models, the meanings from their docstrings: a paragraph
`name: meaning`, or `name, other: meaning` for several settings. A setting without a meaning is an error.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from deployments.settings import GatewaySettings, Tuning
from docs.reference.markdown import table

ROOTS = {"args of the gateway": GatewaySettings, "user_config of the Ingress": Tuning}
ENTRY = re.compile(r"([a-z_]+(?:, [a-z_]+)*): (.*)")
SIMPLE = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    object: "any value",
}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def settings_page() -> str:
    """The reference of all settings."""
    parts = []
    for path, model in sections():
        parts.append(f"## {path}\n\n{introduction(model)}\n\n{_table(model)}")
    return "\n".join(parts)


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every model of settings, with the path at which it is written."""
    todo: list[tuple[str, type[BaseModel]]] = list(ROOTS.items())
    seen: set[type[BaseModel]] = set()
    while todo:
        path, model = todo.pop(0)
        if model in seen:
            continue
        seen.add(model)
        yield path, model
        inner = [
            (f"{name}, in {path}", part)
            for name, field in model.model_fields.items()
            for part in _models_of(field.annotation)
        ]
        todo = inner + todo


def introduction(model: type[BaseModel]) -> str:
    """The first paragraph of a model's docstring."""
    return " ".join(inspect.getdoc(model).split("\n\n")[0].split())  # type: ignore[union-attr]


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The meaning of each setting that the docstring explains."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in (inspect.getdoc(model) or "").split("\n"):
        entry = ENTRY.fullmatch(line)
        if entry and all(name in model.model_fields for name in entry[1].split(", ")):
            names = entry[1].split(", ")
            for name in names:
                found[name] = [entry[2]]
        elif line.startswith("    "):
            for name in names:
                found[name].append(line.strip())
        else:
            names = []
    return {name: " ".join(lines) for name, lines in found.items()}


def _table(model: type[BaseModel]) -> str:
    known = meanings(model)
    missing = [name for name in model.model_fields if name not in known]
    if missing:
        raise ValueError(
            f"{model.__name__} does not explain: {', '.join(missing)}; add `name: meaning` to its docstring in "
            "deployments/settings.py"
        )
    return table(
        ("setting", "type", "default", "meaning"),
        (
            (f"`{name}`", _type(field), _default(field), _capitalised(known[name]))
            for name, field in model.model_fields.items()
        ),
    )


def _capitalised(text: str) -> str:
    return text if text.startswith("`") else text[:1].upper() + text[1:]


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_of(part)]


def _type(field: FieldInfo) -> str:
    text = _named(field.annotation)
    bounds = [
        f"{words} {value:g}"
        for limit in field.metadata
        for key, words in BOUNDS.items()
        if (value := getattr(limit, key, None)) is not None
    ]
    return f"{text}, {', '.join(bounds)}" if bounds else text


def _named(annotation: Any) -> str:
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin in (UnionType, Union):
        return " or ".join(_named(part) for part in parts if part is not NoneType)
    if origin is tuple:
        return f"list of: {_named(parts[0])}"
    if origin in (dict, Mapping):
        return f"by name: {_named(parts[1])}"
    raise TypeError(f"the reference has no words for {annotation}; add them")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None:
        return "none"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{json.dumps(value)}`"
