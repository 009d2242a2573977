"""The reference of the routes, from the OpenAPI schema of the gateway."""

from typing import Any
from unittest.mock import Mock

from deployments.access.middleware import (
    DECISIONS_PREFIX,
    OPERATE_PREFIX,
    PUBLIC_PATHS,
    SCOPE_OF,
)
from deployments.gateway.ingress import Ingress
from deployments.settings import GatewaySettings
from docs.reference.markdown import table

NONE = "not supported"  # a field whose only value is null
PURPOSES = {  # of the routes that have no docstring
    "POST /v1/chat/completions": "Answer a chat.",
    "POST /v1/completions": "Continue prompts.",
    "POST /v1/embeddings": "Embed texts.",
    "GET /v1/models": "List `auto`, its presets and the models.",
    "GET /v1/models/{model}": "Show one of them.",
    "GET /v1/router/versions": "List the policy versions.",
    "GET /v1/router/versions/{version}": "Show a policy version.",
}


def openapi() -> dict[str, Any]:
    """The OpenAPI schema of a gateway; nothing is started."""
    parts = Mock(_settings=GatewaySettings.model_validate({"models": {"large": {}}}))
    schema: dict[str, Any] = Ingress.__serve_build_asgi_app__(parts).openapi()
    return schema


def routes_page() -> str:
    """A table of all routes, and a table of the fields of each body."""
    schema = openapi()
    rows = []
    bodies: dict[str, list[str]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            name = f"{method.upper()} {path.replace('{model:path}', '{model}')}"
            # a summary that FastAPI made of the function's name says less than PURPOSES
            purpose = operation.get("description") or PURPOSES.get(name)
            if not purpose:
                raise ValueError(f"{name} has no docstring and is not in PURPOSES")
            rows.append((f"`{name}`", _scope(path), purpose.split("\n\n")[0]))
            for body in _schemas_of(operation.get("requestBody", {})):
                bodies.setdefault(body, []).append(name)
    parts = [table(("route", "scope of the API key", "purpose"), rows)]
    for body, users in bodies.items():
        parts.append(_fields(f"Body of {', '.join(users)}", body, schema))
    for inner in sorted(_reachable(list(bodies), schema) - set(bodies)):
        parts.append(_fields(f"{inner}, in bodies", inner, schema))
    return "\n".join(parts)


def _scope(path: str) -> str:
    if path in PUBLIC_PATHS:
        return "no key"
    if path.startswith(DECISIONS_PREFIX):
        return "`feedback` or `operate`"
    if path.startswith(OPERATE_PREFIX):
        return "`operate`"
    return f"`{SCOPE_OF[path]}`" if path in SCOPE_OF else "any"


def _schemas_of(part: Any) -> list[str]:
    """The names of the schemas to which a part of the document refers."""
    if isinstance(part, dict):
        own = [part["$ref"].rpartition("/")[2]] if "$ref" in part else []
        return own + [name for value in part.values() for name in _schemas_of(value)]
    if isinstance(part, list):
        return [name for value in part for name in _schemas_of(value)]
    return []


def _reachable(names: list[str], schema: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += _schemas_of(schema["components"]["schemas"][name])
    return found


def _fields(title: str, name: str, schema: dict[str, Any]) -> str:
    model = schema["components"]["schemas"][name]
    required = model.get("required", ())
    rows = [
        (
            f"`{field}`" + (" (required)" if field in required else ""),
            _words(content),
            content.get("description", ""),
        )
        for field, content in model.get("properties", {}).items()
    ]
    intro = (model.get("description") or "").split("\n\n")[0]
    return f"### {title}\n\n{intro}\n\n{table(('field', 'type', 'meaning'), rows)}"


def _words(content: dict[str, Any]) -> str:
    """The type of a field in a few words."""
    for key in ("anyOf", "oneOf", "allOf"):
        if key in content:
            kinds = [_words(part) for part in content[key]]
            return " or ".join(dict.fromkeys(k for k in kinds if k != "null")) or NONE
    if "$ref" in content:
        return content["$ref"].rpartition("/")[2]  # type: ignore[no-any-return]
    if "enum" in content:
        return " or ".join(f"`{value}`" for value in content["enum"])
    if "const" in content:
        return f"`{content['const']}`"
    kind = content.get("type", "any value")
    if kind == "null":
        return NONE
    if kind == "array":
        kind = f"list of {_words(content.get('items', {}))}"
    limits = [
        f"{words} {content[key]:g}"
        for key, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in content
    ]
    return ", ".join([kind, *limits])
