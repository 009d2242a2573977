"""Cross-origin requests: off by default, and for the listed origins where they are switched on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.access.cors import EXPOSED
from deployments.settings import GatewaySettings
from tests.deployments.access.test_api_keys import ASK, Locked
from tests.support.gateway import Gateway
from tests.support.hostile_input import openai_shape

PAGE = "https://chat.example.com"
CHAT = "/v1/chat/completions"
ROUTES = [CHAT, "/v1/models", "/v1/feedback", "/v1/router/state", "/readyz", "/nothing"]


class Paged(Locked):
    """A gateway with keys that a page may use."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.settings = self.settings.model_copy(update={"cors_origins": (PAGE,)})


@pytest.fixture
def paged(tmp_path: Path) -> Iterator[Locked]:
    made = Paged(tmp_path)
    with made.client:
        yield made


def preflight(
    made: Gateway, path: str, origin: str = PAGE, method: str = "POST"
) -> Any:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization, content-type, x-stainless-os",
    }
    return made.client.options(path, headers=headers)


@pytest.mark.parametrize("path", ROUTES)
def test_a_preflight_needs_no_key(paged: Locked, path: str) -> None:
    """A browser sends it without one, before every request with JSON or with a key."""
    answer = preflight(paged, path)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = answer.headers["access-control-allow-headers"]
    assert {"authorization", "content-type", "x-stainless-os"} <= set(
        allowed.replace(" ", "").split(",")
    )
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("path", ROUTES)
def test_a_page_that_is_not_listed_gets_nothing(paged: Locked, path: str) -> None:
    """Its preflight is refused, and an answer carries no permission to read it."""
    refused = preflight(paged, path, "https://evil.com")
    assert refused.status_code == 400 and openai_shape(refused.json())
    assert "access-control-allow-origin" not in refused.headers
    answer = paged.client.get(path, headers={"origin": "https://evil.com"})
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_reads_answers_and_errors(paged: Locked) -> None:
    """With their headers: the decision, the request's id and the limits. A key is needed as ever."""
    for name, status in (("ann", 200), ("", 401), ("tight", 200)):
        headers = {"origin": PAGE}
        if name:
            headers["authorization"] = f"Bearer {paged.keys[name]}"
        answer = paged.client.post(CHAT, json=ASK, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "Origin" in answer.headers["vary"]
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert set(exposed) == set(EXPOSED)
        ours = [
            h for h in answer.headers if h.startswith(("x-router-", "x-ratelimit-"))
        ]
        assert set(ours) <= set(EXPOSED) and (status != 200 or len(ours) == 7)


def test_by_default_no_page_may_read_anything(gateway: Gateway) -> None:
    """A preflight is a method that the route does not have, with an error in OpenAI's shape."""
    for path in ROUTES[:5]:
        answer = preflight(gateway, path)
        assert answer.status_code == 405 and openai_shape(answer.json())
        assert not any(h.startswith("access-control") for h in answer.headers)
    answer = gateway.client.get("/v1/models", headers={"origin": PAGE})
    assert not any(h.startswith("access-control") for h in answer.headers)


@pytest.mark.parametrize(
    "origin",
    [
        "chat.example.com",
        f"{PAGE}/",
        f"{PAGE}/a",
        "ftp://a",
        "https://A.com",
        "",
        "null",
    ],
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    """It would never equal the browser's header, or equal that of every sandboxed page."""
    with pytest.raises(ValidationError, match="is no origin"):
        GatewaySettings.model_validate({"models": {"a": {}}, "cors_origins": [origin]})


def test_all_pages_may_be_allowed_only_with_keys() -> None:
    given = {"models": {"a": {}}, "cors_origins": ["*"]}
    with pytest.raises(ValidationError, match="without keys"):
        GatewaySettings.model_validate(given)
    assert GatewaySettings.model_validate({**given, "keys": {}}).cors_origins == ("*",)
