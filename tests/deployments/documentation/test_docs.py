"""The page /docs and the API's description: complete, without foreign files, and with examples that run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fastapi.openapi.utils import get_openapi
from jsonschema.validators import Draft202012Validator

from deployments.access.middleware import DOCS_PATHS, OPEN_PATHS, PUBLIC_PATHS
from deployments.documentation import examples, operations, page
from deployments.documentation.openapi import (
    BOUNDS,
    SAFE_INTEGER,
    SCHEME,
    operations_of,
)
from policies.events import REPEATED
from tests.deployments.access.test_api_keys import Locked
from tests.support.gateway import Gateway, eventually

MODELS = {
    "nano": {"context_tokens": 512, "output_price_usd_per_million": 0.1},
    "small": {"context_tokens": 512, "output_price_usd_per_million": 0.3},
    "large": {"context_tokens": 512, "output_price_usd_per_million": 1.0},
    "minilm": {"tasks": ["embed"], "context_tokens": 100_000},
}
Operation = tuple[str, str, dict[str, Any]]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with the default models."""
    made = Gateway(tmp_path_factory.mktemp("docs"), models=MODELS)
    with made.client:
        yield made


@pytest.fixture(scope="module")
def document(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = gateway.client.get("/openapi.json").json()
    return found


@pytest.fixture(scope="module")
def described(document: dict[str, Any]) -> list[Operation]:
    return list(operations_of(document))


def refused_by_files(page: str) -> list[str]:
    """The addresses in a page, a style or a script tag that another server would have to answer."""
    return re.findall(
        r"""(?:src|href|url\()\s*=?\s*["']?((?:https?:)?//[^"') ]+)""", page
    )


def test_the_page_and_its_files_come_from_the_gateway(gateway: Gateway) -> None:
    """No address of another server is loaded, and the policy of the page forbids it as well."""
    got = gateway.client.get("/docs")
    assert got.status_code == 200
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert refused_by_files(got.text) == []
    loaded = re.findall(r"""(?:src|href)="([^"]+)\"""", got.text)
    assert len(loaded) == 5
    kinds = {"js": "text/javascript", "css": "text/css", "png": "image/png"}
    for name in loaded:
        answer = gateway.client.get(f"/{name}")
        assert answer.status_code == 200 and answer.content, name
        wanted = kinds.get(name.rpartition(".")[2], "application/json")
        assert answer.headers["content-type"].startswith(wanted), name
    policy = got.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy
    assert "http" not in policy
    assert "<script>" not in got.text and "onload" not in got.text
    style = gateway.client.get("/docs/swagger-ui.css").text
    assert refused_by_files(style) == []
    script = gateway.client.get("/docs/swagger-ui-bundle.js").text
    assert "SwaggerUIBundle" in script and len(script) > 500_000


def test_without_the_package_the_gateway_serves_all_the_same(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node on which it was not installed answers requests; the page's script says what is missing."""
    monkeypatch.setattr(page, "SWAGGER", "no_such_package.resources")
    answer = gateway.client.get("/docs/swagger-ui-bundle.js")
    assert answer.status_code == 503
    assert "fastapi-swagger is not installed" in answer.json()["error"]["message"]
    assert gateway.client.get("/docs").status_code == 200
    assert "is not installed" in gateway.client.get("/docs/start.js").text
    assert gateway.chat().status_code == 200


def test_the_files_are_those_of_the_page(gateway: Gateway) -> None:
    """DOCS_PATHS, which need no key, are the routes outside of the API's description; no other route is among them."""
    app: Any = gateway.client.app
    hidden = {
        route.path
        for route in app.router.default.routes
        if not getattr(route, "include_in_schema", True)
    }
    assert hidden == set(DOCS_PATHS)


def test_the_page_opens_without_a_key(tmp_path: Path) -> None:
    """And the favicon and the description. The routes that the page calls need the key as always."""
    locked = Locked(tmp_path)
    with locked.client:
        for path in OPEN_PATHS:
            got = locked.client.get(path, follow_redirects=False)
            assert got.status_code in (200, 307), path
        described = locked.client.get("/openapi.json").json()
        for method, path, operation in operations_of(described):
            open_route = operation["security"] == []
            assert open_route == (path in PUBLIC_PATHS), path
            if not open_route:
                assert operation["security"] == [{SCHEME: []}]
                filled = re.sub(r"\{\w+\}", "1", path)
                answer = locked.client.request(method, filled)
                assert answer.status_code == 401, path


def test_a_body_for_an_open_path_is_not_awaited(tmp_path: Path) -> None:
    """A client without a key cannot make the gateway wait for a body there."""
    locked = Locked(tmp_path)
    with locked.client:
        for path in DOCS_PATHS:
            answer = locked.client.post(path, content=b"x" * 100)
            assert answer.status_code == 405, path


@pytest.mark.parametrize(
    ("accept", "status"),
    [
        ("text/html,application/xhtml+xml,*/*;q=0.8", 307),
        ("*/*", 200),
        ("application/json", 200),
        ("", 200),
    ],
)
def test_the_root_leads_on(gateway: Gateway, accept: str, status: int) -> None:
    """A browser is sent to /docs, a program gets links, each of which exists."""
    answer = gateway.client.get("/", headers={"accept": accept}, follow_redirects=False)
    assert answer.status_code == status and answer.headers["vary"] == "accept"
    if status == 307:
        assert answer.headers["location"] == "docs"
        followed = gateway.client.get("/", headers={"accept": accept})
        assert "swagger-ui" in followed.text
        return
    for value in answer.json().values():
        for path in [value] if isinstance(value, str) else value:
            if path.startswith("/"):
                assert gateway.client.get(path).status_code != 404, path


def test_every_route_has_words(
    document: dict[str, Any], described: list[Operation]
) -> None:
    """A known group, a summary that is no function's name, a description; no group is empty."""
    groups = [tag["name"] for tag in document["tags"]]
    assert groups == list(operations.TAGS)
    assert {operation["tags"][0] for _, _, operation in described} == set(groups)
    for method, path, operation in described:
        assert len(operation["tags"]) == 1
        assert " " in operation["summary"], (method, path)
        assert operation.get("description"), (method, path)
    for table in (operations.SUMMARIES, operations.DESCRIPTIONS, examples.BODIES):
        known = {(method, path) for method, path, _ in described}
        assert set(table) <= known, set(table) - known
    assert document["info"]["description"] == operations.DESCRIPTION
    scheme = document["components"]["securitySchemes"][SCHEME]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


def test_every_field_of_router_has_a_unit_or_a_meaning(
    document: dict[str, Any],
) -> None:
    properties = document["components"]["schemas"]["Wishes"]["properties"]
    assert len(properties) == 6
    for name, schema in properties.items():
        assert len(schema["description"]) > 20, name
    assert "in seconds" in properties["max_latency_s"]["description"]
    assert "in US dollars" in properties["max_cost"]["description"]


def test_errors_have_openais_shape(
    document: dict[str, Any], described: list[Operation]
) -> None:
    """Each documented error; FastAPI's own 422, which cannot occur, is not there."""
    text = str(document)
    assert "HTTPValidationError" not in text
    statuses = set()
    for _, path, operation in described:
        assert "200" in operation["responses"] or "202" in operation["responses"]
        for status, response in operation["responses"].items():
            if int(status) < 400:
                continue
            statuses.add(int(status))
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}, (path, status)
    assert statuses >= {400, 401, 403, 404, 409, 413, 422, 429, 503}
    refs = set(re.findall(r"'#/components/schemas/([^']+)'", text))
    assert refs <= set(document["components"]["schemas"])


def test_errors_that_occur_are_documented(
    gateway: Gateway, document: dict[str, Any]
) -> None:
    """One of each kind, with the shape that the description gives."""
    error = {**document["components"]["schemas"]["Error"]}
    for method, path, template, body, status in (
        ("POST", "/v1/chat/completions", None, {"model": "auto"}, 400),
        (
            "POST",
            "/v1/chat/completions",
            None,
            {"model": "x", "messages": [{"role": "user", "content": "a"}]},
            404,
        ),
        ("GET", "/v1/models/x", "/v1/models/{model}", None, 404),
        ("POST", "/v1/feedback", None, {"decision_id": "x", "score": 1}, 404),
        ("GET", "/v1/router/versions", None, None, 409),
        (
            "GET",
            "/v1/router/versions/0",
            "/v1/router/versions/{version}",
            None,
            400,
        ),
    ):
        answer = gateway.client.request(method, path, json=body)
        assert answer.status_code == status, path
        jsonschema.validate(answer.json(), error)
        operation = document["paths"][template or path][method.lower()]
        assert str(status) in operation["responses"], (path, status)


def test_the_statuses_of_a_score_are_documented(
    gateway: Gateway, document: dict[str, Any]
) -> None:
    """Each that the gateway answers with 200 or 202, and no other."""
    reply = document["components"]["schemas"]["FeedbackReply"]
    asked = gateway.chat().headers["x-router-decision-id"]
    early = gateway.ingress.router_client.new_id()
    statuses = []
    for decision_id, score, code in (
        (asked, 1.0, 200),
        (asked, 1.0, 200),
        (early, 1.0, 202),
    ):
        body = {"decision_id": decision_id, "score": score}
        answer = gateway.client.post("/v1/feedback", json=body)
        assert answer.status_code == code, answer.text
        jsonschema.validate(answer.json(), reply)
        statuses.append(answer.json()["status"])
    assert {*statuses, REPEATED} == set(reply["properties"]["status"]["enum"])


def test_integers_have_bounds_that_javascript_can_read(
    document: dict[str, Any],
) -> None:
    """A larger one would be rounded, and the rounded one refused. The gateway itself accepts larger seeds."""
    found = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(
                value[name]
                for name in BOUNDS.values()
                if isinstance(value.get(name), int | float)
            )
            assert not value.keys() & BOUNDS.keys(), "no word of JSON Schema"
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)
    assert len(found) > 50 and max(map(abs, found)) == SAFE_INTEGER


def in_words_of_json_schema(value: Any) -> Any:
    """A schema with the names of its bounds translated."""
    if isinstance(value, list):
        return [in_words_of_json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        BOUNDS.get(key, key): in_words_of_json_schema(item)
        for key, item in value.items()
    }


def test_requests_are_accepted_as_by_the_models_alone(
    gateway: Gateway, document: dict[str, Any]
) -> None:
    """The bodies of the description are FastAPI's own, but for the bounds that JavaScript cannot read."""
    app: Any = gateway.client.app
    inner = app.router.default
    plain = get_openapi(title="", version="", routes=inner.routes)
    for path, item in plain["paths"].items():
        for method, operation in item.items():
            ours = document["paths"][path][method]
            body = operation.get("requestBody", {}).get("content", {})
            for kind, content in body.items():
                own = ours["requestBody"]["content"][kind]["schema"]
                assert own == content["schema"], path
            names = [p["name"] for p in operation.get("parameters", ())]
            assert names == [p["name"] for p in ours.get("parameters", ())]
    changed = []
    for name, schema in plain["components"]["schemas"].items():
        if name in ("HTTPValidationError", "ValidationError"):
            continue
        ours = document["components"]["schemas"][name]
        assert schema.keys() == ours.keys()
        for field, own in schema.get("properties", {}).items():
            if in_words_of_json_schema(own) != ours["properties"][field]:
                changed.append((name, field))
    assert changed == [("ChatRequest", "seed"), ("CompletionRequest", "seed")]
    for seed in (2**63 - 1, -(2**63)):
        assert gateway.chat(seed=seed).status_code == 200
    assert gateway.chat(seed=2**63).status_code == 400


def with_decision(gateway: Gateway, value: Any) -> Any:
    """A value of an example in which the page would have put the id of its last answer."""
    if isinstance(value, dict):
        return {key: with_decision(gateway, item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_decision(gateway, item) for item in value]
    if value != examples.LAST_DECISION:
        return value
    answer = gateway.chat()
    return answer.headers["x-router-decision-id"]


# without MLflow, and while no version has a role, these say so; their bodies are accepted
NEEDS_MORE = ("/v1/router/versions", "/v1/router/rollout/advance")
EXAMPLES = [
    (path, name) for (_, path), bodies in examples.BODIES.items() for name in bodies
]


@pytest.mark.parametrize(("path", "name"), EXAMPLES)
def test_an_example_runs_as_it_stands(
    gateway: Gateway, document: dict[str, Any], path: str, name: str
) -> None:
    """It fits its schema, and the gateway accepts it."""
    operation = document["paths"][path]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    body = content["examples"][name]["value"]
    schema = {**content["schema"], "components": document["components"]}
    Draft202012Validator(schema).validate(body)
    filled = path.replace("{version}", str(examples.PARAMETERS["version"]))
    body = with_decision(gateway, body)
    if path == "/v1/feedback":
        decision = body["decision_id"]
        where = f"/v1/router/decisions/{decision}"
        eventually(lambda: gateway.client.get(where).json()["outcome"] is not None)
        explained = document["components"]["schemas"]
        Draft202012Validator(
            {**explained["Explanation"], "components": {"schemas": explained}}
        ).validate(gateway.client.get(where).json())
    answer = gateway.client.post(filled, json=body)
    if path.startswith(NEEDS_MORE):
        assert answer.status_code == 409, answer.text
        return
    wanted = 202 if path == "/v1/router/calibrations" else 200
    assert answer.status_code == wanted, answer.text
    if answer.headers["content-type"] == "application/json":
        answered = operation["responses"][str(wanted)]["content"]["application/json"]
        Draft202012Validator(
            {**answered["schema"], "components": document["components"]}
        ).validate(answer.json())


def test_every_body_has_an_example(described: list[Operation]) -> None:
    """And every parameter in a path; otherwise the page would fill in all fields with made-up values."""
    for method, path, operation in described:
        if "requestBody" in operation:
            assert (method, path) in examples.BODIES, path
            content = operation["requestBody"]["content"]["application/json"]
            assert content["examples"] == examples.BODIES[method, path]
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "path":
                assert "example" in parameter, path


def test_the_placeholder_of_the_examples_is_that_of_the_page(gateway: Gateway) -> None:
    """The page's script puts the id of its last answer in its place; the description says so."""
    script = gateway.client.get("/docs/start.js").text
    assert f'const PLACEHOLDER = "{examples.LAST_DECISION}";' in script
    assert examples.LAST_DECISION in operations.DESCRIPTION
    unknown = gateway.client.get(f"/v1/router/decisions/{examples.LAST_DECISION}")
    assert unknown.status_code == 404
    assert "use the x-router-decision-id" in unknown.json()["error"]["message"]
