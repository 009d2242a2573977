"""A gateway without API keys: the hosts that it answers to, and web pages of other sites."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments.access.test_api_keys import ASK, Locked
from tests.support.gateway import Gateway
from tests.support.hostile_input import openai_shape

LOCAL = [
    "127.0.0.1",
    "127.0.0.1:8000",
    "localhost",
    "LOCALHOST:18000",
    "[::1]",
    "[::1]:8000",
]
FOREIGN = [
    "evil.com",
    "evil.com:8000",
    "127.0.0.1.evil.com",
    "localhost.evil.com",
    "evil.com@127.0.0.1",
    "127.0.0.1:x",
    "127.0.0.1/evil.com",
    "10.0.0.1",
    "0.0.0.0:8000",
    "[::2]:8000",
    "",
    "é.com",
]
# every route that changes something, and what it gets; without keys all of them are open to programs
CHANGES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/feedback"),
    ("POST", "/v1/router/versions"),
    ("POST", "/v1/router/versions/1/evaluate"),
    ("POST", "/v1/router/versions/1/promote"),
    ("POST", "/v1/router/rollout/rollback"),
    ("POST", "/v1/router/calibrations"),
    ("DELETE", "/v1/router/calibrations"),
    ("PUT", "/v1/models"),
]
READS = ["/v1/models", "/v1/router/state", "/v1/router/versions", "/docs"]


def refused(answer: httpx.Response, code: str) -> bool:
    error = answer.json()["error"]
    return (
        answer.status_code == 403
        and openai_shape(answer.json())
        and error["code"] == code
    )


@pytest.mark.parametrize("host", LOCAL)
def test_loopback_hosts_are_served(gateway: Gateway, host: str) -> None:
    """With any port, which may be a forwarded one."""
    headers = {"host": host}
    assert gateway.client.get("/v1/models", headers=headers).status_code == 200
    answer = gateway.client.post("/v1/chat/completions", json=ASK, headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_other_hosts_are_refused_on_every_route(gateway: Gateway, host: str) -> None:
    """A page whose name was rebound to 127.0.0.1 sends its own name. Health checks show nothing and are answered."""
    headers = [(b"host", host.encode())]
    for path in READS:
        assert refused(gateway.client.get(path, headers=headers), "host_not_allowed")
    for method, path in CHANGES:
        answer = gateway.client.request(method, path, headers=headers)
        assert refused(answer, "host_not_allowed"), path
    assert gateway.client.get("/healthz", headers=headers).status_code == 200


def test_two_hosts_must_both_be_loopback(gateway: Gateway) -> None:
    headers = [("host", "localhost"), ("host", "evil.com")]
    assert refused(
        gateway.client.get("/v1/models", headers=headers), "host_not_allowed"
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.com"},
        {"origin": "http://evil.com:8000"},
        {"origin": "null"},
        {"origin": "http://localhost.evil.com"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://localhost:3000"},
    ],
)
def test_pages_of_other_sites_change_nothing(
    gateway: Gateway, headers: dict[str, str]
) -> None:
    """A browser sends such a request without a preflight if it has no body, or one that is no JSON."""
    for method, path in CHANGES:
        answer = gateway.client.request(method, path, headers=headers)
        assert refused(answer, "cross_site"), path
    assert not any(model.calls for model in gateway.models.values())
    for path in READS:  # a page cannot read the answer
        answer = gateway.client.get(path, headers=headers)
        assert answer.status_code != 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://localhost:3000"},
        {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"origin": "http://[::1]:5173", "sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
    ],
)
def test_programs_and_pages_of_this_machine_are_served(
    gateway: Gateway, headers: dict[str, str]
) -> None:
    answer = gateway.client.post("/v1/chat/completions", json=ASK, headers=headers)
    assert answer.status_code == 200


def test_a_gateway_with_keys_is_served_under_any_name(tmp_path: Path) -> None:
    """A browser adds no key by itself, so a page has none."""
    locked = Locked(tmp_path)
    headers = {"host": "router.example.com", "origin": "https://evil.com"}
    headers["authorization"] = f"Bearer {locked.keys['ann']}"
    with locked.client:
        answer: Any = locked.client.post(
            "/v1/chat/completions", json=ASK, headers=headers
        )
    assert answer.status_code == 200


def test_a_listed_page_may_use_a_gateway_without_keys(tmp_path: Path) -> None:
    """Others may still not; the listed page must come to a loopback host, too."""
    made = Gateway(tmp_path, cors_origins=["https://chat.example.com"])
    own = {"origin": "https://chat.example.com", "sec-fetch-site": "cross-site"}
    with made.client:
        assert made.client.post(
            "/v1/chat/completions", json=ASK, headers=own
        ).is_success
        foreign = {"origin": "https://evil.com"}
        answer = made.client.post("/v1/chat/completions", json=ASK, headers=foreign)
        assert refused(answer, "cross_site")
        answer = made.client.get("/v1/models", headers={**own, "host": "evil.com"})
        assert refused(answer, "host_not_allowed")
