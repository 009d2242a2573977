"""HEAD, the scope of priorities, and long words of clients in errors, through the whole gateway."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from deployments.access.api_keys import add
from tests.deployments.access.test_api_keys import ASK, Locked
from tests.support.gateway import Gateway
from tests.support.hostile_input import openai_shape

CHAT = "/v1/chat/completions"


def get_routes(gateway: Gateway) -> list[str]:
    """The paths of all routes that answer GET."""
    app: Any = gateway.client.app
    inner = app.router.default
    found = [
        route.path
        for route in inner.routes
        if isinstance(route, APIRoute) and "GET" in (route.methods or ())
    ]
    return [*found, "/openapi.json"]


def test_head_is_get_without_a_body_on_every_route(gateway: Gateway) -> None:
    """Status and headers are those of GET. Monitors check health in this way."""
    decision_id = gateway.chat().headers["x-router-decision-id"]
    paths = get_routes(gateway)
    assert {"/healthz", "/readyz", "/v1/models", "/v1/router/state"} <= set(paths)
    for template in paths:
        path = template.replace("{decision_id}", decision_id)
        path = path.replace("{model}", "auto").replace("{version}", "1")
        got = gateway.client.get(path)
        head = gateway.client.head(path)
        assert head.status_code == got.status_code, path
        assert head.content == b"" and got.content
        names = {"content-type", "content-length", "retry-after"}
        # the state's own figures may grow by a digit between the two
        if template in ("/v1/router/state", "/v1/router/decisions/{decision_id}"):
            names -= {"content-length"}
        for name in names:
            assert head.headers.get(name) == got.headers.get(name), (path, name)


def test_head_of_other_routes_is_refused_without_a_body(gateway: Gateway) -> None:
    """As GET is; an unknown path is a 404."""
    for path, status in ((CHAT, 405), ("/v1/feedback", 405), ("/nothing", 404)):
        answer = gateway.client.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
        assert answer.headers["content-type"] == "application/json"


def test_a_refused_method_names_the_allowed_ones(gateway: Gateway) -> None:
    """HEAD is among them where GET is."""
    for method, path, allowed in (
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
        ("GET", CHAT, "POST"),
        ("HEAD", "/v1/feedback", "POST"),
    ):
        answer = gateway.client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_head_needs_the_key_that_get_needs(tmp_path: Path) -> None:
    """A refusal has no body, either, and counts as a request."""
    locked = Locked(tmp_path)
    with locked.client:
        for name, path, status in (
            ("", "/v1/models", 401),
            ("ann", "/v1/models", 200),
            ("ann", "/v1/router/state", 403),
            ("op", "/v1/router/state", 200),
        ):
            answer = locked.call(name, "HEAD", path)
            assert (answer.status_code, answer.content) == (status, b"")


HIGH: list[tuple[dict[str, Any], str]] = [
    ({"router": {"priority": "high"}}, "router.priority"),
    ({"service_tier": "priority"}, "service_tier"),
    (
        {"service_tier": "flex", "router": {"priority": "high"}},
        "router.priority",
    ),
]
OTHERS: list[dict[str, Any]] = [
    {},
    {"router": {"priority": "normal"}},
    {"router": {"priority": "batch"}},
    {"service_tier": "flex"},
    {"service_tier": "auto"},
    {"service_tier": "priority", "router": {"priority": "batch"}},
]


def test_a_high_priority_needs_a_scope(tmp_path: Path) -> None:
    """It may fill the part of each queue that others may not. Completions and embeddings have the same rule."""
    locked = Locked(tmp_path)
    file = tmp_path / "keys.json"
    locked.keys["first"] = add(file, "first", ("infer", "priority"))
    locked.keys["alone"] = add(file, "alone", ("priority",))
    with locked.client:
        for extra, param in HIGH:
            refused = locked.call("ann", "POST", CHAT, json={**ASK, **extra})
            error = refused.json()["error"]
            assert refused.status_code == 403 and openai_shape(refused.json())
            assert (error["param"], error["code"]) == (param, "insufficient_scope")
            assert (
                locked.call("op", "POST", CHAT, json={**ASK, **extra}).status_code
                == 403
            )
            answer = locked.call("first", "POST", CHAT, json={**ASK, **extra})
            assert answer.status_code == 200
            # the scope alone allows no request
            alone = locked.call("alone", "POST", CHAT, json={**ASK, **extra})
            assert alone.status_code == 403
        wish = {"router": {"priority": "high"}}
        for path, body in (
            ("/v1/completions", {"model": "auto", "prompt": "a", **wish}),
            ("/v1/embeddings", {"model": "auto", "input": "a", **wish}),
        ):
            assert locked.call("ann", "POST", path, json=body).status_code == 403
            assert locked.call("first", "POST", path, json=body).status_code == 200
        for extra in OTHERS:
            answer = locked.call("ann", "POST", CHAT, json={**ASK, **extra})
            assert answer.status_code == 200, extra


def test_without_keys_every_priority_is_allowed(gateway: Gateway) -> None:
    """Only this machine can ask."""
    for extra, _ in HIGH:
        assert gateway.chat(**extra).status_code == 200


@pytest.mark.parametrize(
    "extra",
    [
        {"x" * 900_000: 1},
        {"router": {"y" * 900_000: 1}},
        {"metadata": {"z" * 300: 1}},
        {"logit_bias": {"9" * 900_000: 1}},
        {"model": "m" * 900},
        {"router": {"models": ["m" * 200]}},
    ],
)
def test_an_error_repeats_little_of_what_a_client_sent(
    gateway: Gateway, extra: dict[str, Any]
) -> None:
    """It once had the whole of an unknown key twice."""
    answer = gateway.chat(**extra)
    assert answer.status_code in (400, 404) and openai_shape(answer.json())
    assert len(answer.content) < 6_000


def test_the_state_shows_a_model_that_this_ingress_does_not_know_yet(
    gateway: Gateway,
) -> None:
    """During a reload the router has the new settings before the old ingress ends."""
    settings = gateway.settings.model_dump()
    settings["models"]["added"] = settings["models"]["small"]
    changed = type(gateway.settings).model_validate(settings)
    assert gateway.client.portal is not None
    gateway.client.portal.call(gateway.router.thing.configure, changed)
    answer = gateway.client.get("/v1/router/state")
    assert answer.status_code == 200
    assert answer.json()["models"]["added"]["wait_s"] == 0
    assert gateway.chat().status_code == 200
    gateway.tune(snapshot_max_age_s=0.0)
    for _ in range(
        20
    ):  # the router may choose the new arm; the ingress then decides by itself
        assert gateway.chat().status_code == 200
