"""Completes the OpenAPI document that FastAPI makes of the routes, and bounds it to what JavaScript can read.

FastAPI knows the paths and the bodies. The groups, the words, the examples, the answers and the errors are added here,
in one place for all routes. Which requests are accepted does not depend on it.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from deployments.access.middleware import OPEN_PATHS
from deployments.documentation import answers, examples, operations

SAFE_INTEGER = 2**53 - 1  # larger ones are rounded by JavaScript
BOUNDS = {  # of JSON Schema, by the words that pydantic leaves in a schema if a validator comes first
    "ge": "minimum",
    "le": "maximum",
    "gt": "exclusiveMinimum",
    "lt": "exclusiveMaximum",
}
NUMBERS = ("integer", "number")
# of FastAPI's own errors, which no client gets here
FOREIGN_SCHEMAS = ("HTTPValidationError", "ValidationError")
SCHEME = "HTTPBearer"
METHODS = ("get", "post", "put", "patch", "delete")
JSON = "application/json"
Document = dict[str, Any]


def install(app: FastAPI, keyed: bool) -> None:
    """Make `app.openapi()`, and so /openapi.json, return the completed document.

    Args:
        app: with all its routes.
        keyed: whether requests need an API key.
    """

    def openapi() -> Document:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = completed(made, keyed)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def completed(document: Document, keyed: bool) -> Document:
    """The document with groups, words, examples, answers and errors; it is changed in place."""
    document["info"]["description"] = operations.DESCRIPTION
    document["tags"] = [
        {"name": name, "description": words} for name, words in operations.TAGS.items()
    ]
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in FOREIGN_SCHEMAS:
        schemas.pop(name, None)
    schemas.update(answers.SCHEMAS)
    components["securitySchemes"] = {
        SCHEME: {"type": "http", "scheme": "bearer", "description": operations.KEY}
    }
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                _complete(item[method], method, path, keyed)
    _bound(document)
    return document


def operations_of(document: Document) -> Iterator[tuple[str, str, Document]]:
    """Method, path and operation of each route in a document."""
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                yield method, path, item[method]


def _complete(operation: Document, method: str, path: str, keyed: bool) -> None:
    """Add what FastAPI does not know of a route."""
    at = (method, path)
    is_open = path in OPEN_PATHS
    operation["tags"] = [operations.group_of(path)]
    words = operation.get("description", "")
    operation["summary"] = operations.SUMMARIES.get(
        at,
        words.partition("\n")[0].partition(". ")[0].rstrip(".") or operation["summary"],
    )
    if at in operations.DESCRIPTIONS:
        operation["description"] = operations.DESCRIPTIONS[at]
    # without keys the header may be left out
    optional: list[dict[str, list[str]]] = [] if keyed else [{}]
    operation["security"] = [] if is_open else [*optional, {SCHEME: []}]
    _add_examples(operation, at)
    _add_answer(operation, at)
    _add_errors(operation, at, is_open)


def _add_examples(operation: Document, at: tuple[str, str]) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and parameter["name"] in examples.PARAMETERS:
            parameter["example"] = examples.PARAMETERS[parameter["name"]]
    if at in examples.BODIES and "requestBody" in operation:
        content = operation["requestBody"]["content"][JSON]
        content["examples"] = {
            name: dict(example) for name, example in examples.BODIES[at].items()
        }


def _add_answer(operation: Document, at: tuple[str, str]) -> None:
    """Describe the answer, and its headers where a model gave it."""
    method, path = at
    if path == "/readyz":
        operation["responses"]["200"] = {
            "description": "Ready.",
            "content": {"text/plain": {"schema": answers.TEXT}},
        }
    if at not in answers.ANSWERS:
        return
    name, words = answers.ANSWERS[at]
    content: Document = {JSON: {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    if path in answers.STREAMED:
        content["text/event-stream"] = {"schema": answers.TEXT}
    operation["responses"]["200"] = {"description": words, "content": content}
    if path == "/v1/feedback":
        operation["responses"]["202"] = {
            "description": "The score counts when its decision reaches the router.",
            "content": content,
        }
    if operations.group_of(path) == "OpenAI" and method == "post":
        operation["responses"]["200"]["headers"] = {
            header: {"description": words, "schema": answers.TEXT}
            for header, words in answers.ANSWER_HEADERS.items()
        }


def _add_errors(operation: Document, at: tuple[str, str], is_open: bool) -> None:
    """Describe the errors that can occur, in OpenAI's shape."""
    found = operation["responses"]
    found.pop("422", None)  # FastAPI's own
    statuses = set(answers.OWN_ERRORS.get(at, ()))
    if not is_open:
        statuses |= set(answers.OF_KEYS)
    if "requestBody" in operation:
        statuses |= set(answers.OF_BODIES)
    if operation.get("parameters"):
        statuses.add(400)
    group = operation["tags"][0]
    if group in ("versions", "calibrations"):
        statuses |= {409, 503}
    if "{version}" in at[1]:
        statuses.add(404)
    for status in sorted(statuses):
        found[str(status)] = {
            "description": answers.ERRORS[status],
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        if status in (429, 503):
            found[str(status)]["headers"] = {
                "retry-after": {
                    "description": "Seconds after which another try is worthwhile.",
                    "schema": {"type": "integer"},
                }
            }


def _bound(value: Any) -> None:
    """Write the bounds of numbers in the words of JSON Schema, and replace those that JavaScript would round."""
    if isinstance(value, list):
        for item in value:
            _bound(item)
    elif isinstance(value, dict):
        if value.get("type") in NUMBERS:
            for word, name in BOUNDS.items():
                if word in value:
                    value[name] = value.pop(word)
            _limit(value)
        for item in value.values():
            _bound(item)


def _limit(schema: Document) -> None:
    """Replace bounds of an integer that JavaScript would round."""
    for name in BOUNDS.values():
        bound = schema.get(name)
        if isinstance(bound, int | float) and abs(bound) > SAFE_INTEGER:
            del schema[name]
            schema["minimum" if bound < 0 else "maximum"] = (
                -SAFE_INTEGER if bound < 0 else SAFE_INTEGER
            )
