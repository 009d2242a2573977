"""API keys end to end: authentication, scopes, rate limits, and the file of keys."""

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from deployments import app
from deployments.access import api_keys
from deployments.access.api_keys import ApiKeyStore, add
from deployments.access.middleware import OPEN_PATHS
from deployments.operations.config_check import check_config
from deployments.operations.launcher import load
from policies.events import MAX_SOURCES
from tests.deployments.dispatch.test_admission import takes
from tests.support.gateway import ROOT, Gateway, eventually

ALL = ("infer", "feedback", "operate")
ASK = {"model": "auto", "messages": [{"role": "user", "content": "What is 3 plus 5?"}]}


class Locked(Gateway):
    """A gateway that requires keys; `keys` has them by name."""

    def __init__(self, folder: Path, **settings: Any):
        file = folder / "keys.json"
        self.keys = {
            name: add(file, name, ("infer", "feedback")) for name in ("ann", "ben")
        }
        self.keys["op"] = add(file, "op", ALL)
        self.keys["asks"] = add(file, "asks", ("infer",))
        self.keys["tight"] = add(
            file, "tight", ("infer",), requests_per_minute=3, concurrency=1
        )
        super().__init__(folder, keys={"file": str(file), **settings})

    def call(self, name: str, method: str, path: str, **options: Any) -> Any:
        headers = {"authorization": f"Bearer {self.keys[name]}"} if name else {}
        return self.client.request(method, path, headers=headers, **options)

    def ask(self, name: str) -> Any:
        return self.call(name, "POST", "/v1/chat/completions", json=ASK)

    def score(
        self, name: str, decision_id: str, score: float = 1.0, source: str = "user"
    ) -> Any:
        body = {"decision_id": decision_id, "score": score, "source": source}
        return self.call(name, "POST", "/v1/feedback", json=body)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    made = Locked(tmp_path)
    with made.client:
        yield made


def test_only_the_hash_is_kept_and_only_its_owner_may_read_the_file(
    tmp_path: Path,
) -> None:
    """The file does not have the secret, and its mode is 600."""
    file = tmp_path / "var" / "keys.json"
    key = add(file, "ann", ("infer",))
    text = file.read_text()
    assert key.split("-", 2)[2] not in text and '"sha256"' in text
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert ApiKeyStore(file).find(key) is not None
    assert ApiKeyStore(file).find(key[:-1] + ("A" if key[-1] != "A" else "B")) is None


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": [{"name": "a"}]}', '{"keys": 3}', "\x00"]
)
def test_a_broken_file_is_refused_at_the_start_and_keeps_the_old_keys_later(
    tmp_path: Path, text: str
) -> None:
    """A running gateway keeps its keys if the file is damaged."""
    file = tmp_path / "keys.json"
    key = add(file, "ann", ("infer",))
    ring = ApiKeyStore(file)
    file.write_text(text)
    ring._checked_s -= api_keys.CHECK_EVERY_S
    assert ring.find(key) is not None
    with pytest.raises(ValueError, match="no file of API keys"):
        ApiKeyStore(file)


def test_without_a_key_the_start_says_how_to_make_one(tmp_path: Path) -> None:
    """A missing file and an empty file give the same hint."""
    for ready in (False, True):
        if ready:
            api_keys.write(tmp_path / "keys.json", {})
        with pytest.raises(ValueError, match="router keys add NAME"):
            ApiKeyStore(tmp_path / "keys.json")


def test_a_new_key_works_and_a_removed_one_does_not_without_a_restart(
    locked: Locked,
) -> None:
    """The gateway checks the file every other second."""
    file = Path(locked.settings.keys.file)  # type: ignore[union-attr]
    locked.keys["new"] = add(file, "new", ("infer",))
    eventually(lambda: time.sleep(0.05) or locked.ask("new").status_code == 200)
    api_keys.remove(file, "new")
    eventually(lambda: time.sleep(0.05) or locked.ask("new").status_code == 401)


@pytest.mark.parametrize(
    "limit", ["requests_per_minute", "concurrency", "scores_per_minute"]
)
def test_a_limit_below_one_is_refused(tmp_path: Path, limit: str) -> None:
    """A limit of 0 does not mean the default, and no key is made."""
    file = tmp_path / "keys.json"
    for value in (0, -5):
        with pytest.raises(ValueError, match="limits begin at 1"):
            add(file, "ann", ("infer",), **{limit: value})
    assert not file.exists()


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Bearer rk-",
        "Bearer rk-a-b",
        "Basic YTpi",
        "Bearer \xff",
    ],
)
def test_no_valid_key_is_a_401(locked: Locked, header: str | None) -> None:
    """The 401 has OpenAI's shape; only the paths for load balancers and the page /docs need no key."""
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/docs/x"),
        ("GET", "/x"),
    ):
        answer = locked.client.request(method, path, headers=headers)
        assert (
            answer.status_code == 401
            and answer.json()["error"]["code"] == "invalid_api_key"
        )
        assert answer.headers["www-authenticate"] == "Bearer"
    assert (
        locked.client.get("/healthz").status_code == 200
        and locked.client.get("/readyz").status_code == 200
    )


def test_a_key_may_use_the_routes_of_its_scopes_only(locked: Locked) -> None:
    """Every route is tried with every key; a missing scope gives a 403."""
    decision_id = locked.ask("ann").headers["x-router-decision-id"]
    asked = {"model": "auto", "input": "a"}
    routes: list[tuple[str, str, Any, set[str]]] = [
        ("POST", "/v1/chat/completions", ASK, {"ann", "asks", "op"}),
        ("POST", "/v1/embeddings", asked, {"ann", "asks", "op"}),
        ("GET", "/v1/models", None, {"ann", "asks", "op"}),
        (
            "POST",
            "/v1/feedback",
            {"decision_id": decision_id, "score": 1},
            {"ann", "op"},
        ),
        ("GET", f"/v1/router/decisions/{decision_id}", None, {"ann", "op"}),
        ("GET", "/v1/router/state", None, {"op"}),
        ("GET", "/v1/router/anything", None, {"op"}),
    ]
    for method, path, body, allowed in routes:
        for name in ("ann", "asks", "op"):
            answer = locked.call(name, method, path, json=body)
            assert (answer.status_code != 403) == (name in allowed), (
                path,
                name,
                answer.text,
            )
            if name not in allowed:
                assert answer.json()["error"]["type"] == "permission_error"
    assert locked.call("ann", "POST", "/v1/router/versions").status_code == 403


def test_every_route_requires_a_key(locked: Locked) -> None:
    """The test reads the routes from the application, so it covers new ones."""
    app = locked.ingress.__serve_build_asgi_app__()
    paths = set()
    for route in app.routes:
        for method in getattr(route, "methods", ()):
            paths.add((method, route.path))  # type: ignore[attr-defined]
    assert len(paths) > 10
    for method, path in paths:
        answer = locked.client.request(
            method, path.replace("{decision_id}", "d").replace("{model}", "m")
        )
        assert (answer.status_code == 401) == (path not in OPEN_PATHS), path


def test_feedback_only_from_the_key_that_owns_the_decision(locked: Locked) -> None:
    """Other keys do not find the decision; a key with the scope `operate` may score all. The journal has the owner."""
    decision_id = locked.ask("ann").headers["x-router-decision-id"]
    before = (
        locked.call("op", "GET", "/v1/router/state").json()["counts"].get("feedback", 0)
    )
    assert locked.score("ben", decision_id).status_code == 404
    assert (
        locked.call("ben", "GET", f"/v1/router/decisions/{decision_id}").status_code
        == 404
    )
    assert (
        locked.call("op", "GET", "/v1/router/state").json()["counts"].get("feedback", 0)
        == before
    )
    assert locked.score("ann", decision_id).json()["status"] == "accepted"
    assert locked.score("op", decision_id, 0.5, "judge").json()["status"] == "accepted"
    find_all = locked.router.thing._journal.find_all
    # the outcome is reported a little later, in a batch
    eventually(lambda: len(find_all([decision_id])[decision_id]) == 4)
    events = find_all([decision_id])[decision_id]
    assert events[0].owner == "ann" and {
        event.owner for event in events if hasattr(event, "owner")
    } == {"ann", "*"}


def test_a_locally_made_decision_has_its_owner_too(locked: Locked) -> None:
    """The ingress decides without the router, and reports later."""
    locked.router.broken = True
    decision_id = locked.ask("ann").headers["x-router-decision-id"]
    locked.router.broken = False
    eventually(
        lambda: time.sleep(0.05) or locked.score("ann", decision_id).status_code == 200
    )
    assert locked.score("ben", decision_id).status_code == 404


def test_a_decision_takes_few_sources(locked: Locked) -> None:
    """Clients choose the names of sources: a thousand sources would be a thousand votes."""
    decision_id = locked.ask("ann").headers["x-router-decision-id"]
    statuses = [
        locked.score("ann", decision_id, 1.0, f"s{i}").status_code
        for i in range(MAX_SOURCES + 3)
    ]
    assert statuses == [200] * MAX_SOURCES + [409] * 3
    # a corrected score is no new source
    corrected = locked.score("ann", decision_id, 0.0, "s0")
    assert corrected.json()["status"] == "accepted"


def test_a_key_gives_so_many_scores_a_minute(tmp_path: Path) -> None:
    """Further scores get a 429 with Retry-After and are not learned; other keys have limits of their own."""
    locked = Locked(tmp_path, scores_per_minute=5)
    with locked.client:
        mine, other = (
            locked.ask(name).headers["x-router-decision-id"] for name in ("ann", "ben")
        )
        answers = [locked.score("ann", mine, i / 20) for i in range(20)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 15
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 12
        assert (
            locked.call("op", "GET", "/v1/router/state").json()["counts"]["feedback"]
            == 5
        )
        assert locked.score("ben", other).status_code == 200


def test_rate_and_headers_as_openai_has_them(locked: Locked) -> None:
    """Three requests a minute pass, then there is a 429 until the bucket has a token."""
    answers = [locked.ask("tight") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert (
        left == ["2", "1", "0", "0"]
        and answers[0].headers["x-ratelimit-limit-requests"] == "3"
    )
    assert answers[0].headers["x-ratelimit-reset-requests"].endswith("s")
    assert 18 <= int(answers[3].headers["retry-after"]) <= 20
    assert answers[3].json()["error"]["code"] == "rate_limit_exceeded"


async def test_concurrency_of_a_key(tmp_path: Path) -> None:
    """The key `tight` has one request at a time; the next one passes when the first has ended."""
    import asyncio

    locked = Locked(tmp_path)

    async with locked.at_once() as client:
        for model in locked.models.values():
            model.script = takes(0.3)
        headers = {"authorization": f"Bearer {locked.keys['tight']}"}
        calls = (
            client.post("/v1/chat/completions", json=ASK, headers=headers)
            for _ in range(2)
        )
        statuses = [answer.status_code for answer in await asyncio.gather(*calls)]
        assert sorted(statuses) == [200, 429]
        assert (
            await client.post("/v1/chat/completions", json=ASK, headers=headers)
        ).status_code == 200


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.5", "router.example.com", None]
)
def test_keys_are_required_as_soon_as_others_can_reach_it(
    tmp_path: Path, host: str | None
) -> None:
    """The launcher refuses to start, and says what to do; without a host Serve binds all interfaces."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    if host is None:
        del config["http_options"]["host"]
    else:
        config["http_options"]["host"] = host
    (problem,) = check_config(config)
    assert (
        "keys is missing" in problem
        and "router keys add" in problem
        and "127.0.0.1" in problem
    )
    config["applications"][-1]["args"]["keys"] = {"file": str(tmp_path / "keys.json")}
    assert check_config(config) == []
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="there is no API key in"):
        load(path, tmp_path, 0)
    add(tmp_path / "keys.json", "ann", ALL)
    assert load(path, tmp_path, 0).config["http_options"].get("host") == host


@pytest.mark.parametrize(
    "listens", [None, "", "0.0.0.0:8000", ":::8000", "127.0.0.1:8000", "::1:8000"]
)
def test_the_gateway_itself_requires_keys_unless_it_is_on_loopback(
    monkeypatch: pytest.MonkeyPatch, listens: str | None
) -> None:
    """`serve deploy` and KubeRay build the gateway without the launcher's check, and Serve binds every address."""
    monkeypatch.delenv("ROUTER_GATEWAY", raising=False)
    if listens is not None:
        monkeypatch.setenv("ROUTER_GATEWAY", listens)
    arguments = yaml.safe_load((ROOT / "serve_config.yaml").read_text())[
        "applications"
    ][-1]["args"]
    if listens in ("127.0.0.1:8000", "::1:8000"):
        assert app.gateway(arguments)
    else:
        with pytest.raises(
            ValueError,
            match=r"keys is missing.*router keys add",
        ):
            app.gateway(arguments)
    assert app.gateway({**arguments, "keys": {"file": "var/keys.json"}})


def test_openais_client_understands_refusals(locked: Locked) -> None:
    """OpenAI's client raises its own exception for every status."""
    http: Any = locked.client
    known = openai.OpenAI(
        base_url="http://localhost/v1",
        api_key=locked.keys["asks"],
        max_retries=0,
        http_client=http,
    )
    assert known.chat.completions.create(model="auto", messages=ASK["messages"]).choices  # type: ignore[call-overload]
    stranger = openai.OpenAI(
        base_url="http://localhost/v1", api_key="sk-1", max_retries=0, http_client=http
    )
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    file = json.loads(Path(locked.settings.keys.file).read_text())  # type: ignore[union-attr]
    assert all(set(entry["scopes"]) <= set(ALL) for entry in file["keys"])
