"""Every key at every route with every method. The routes are those of the application.

A new route fails these tests until ALLOWED says which scopes may use it.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.access.api_keys import SCOPES, add
from tests.deployments.access.test_api_keys import Locked
from tests.support.hostile_input import openai_shape

OPEN = None  # without a key, too
ANY_KEY = SCOPES
# the scopes of which a key needs one, by the route's path
ALLOWED: dict[str, tuple[str, ...] | None] = {
    "/healthz": OPEN,
    "/readyz": OPEN,
    "/": OPEN,
    "/openapi.json": OPEN,
    "/docs": OPEN,
    "/docs/start.js": OPEN,
    "/docs/swagger-ui-bundle.js": OPEN,
    "/docs/swagger-ui.css": OPEN,
    "/docs/favicon.png": OPEN,
    "/favicon.ico": OPEN,
    "/v1/models": ANY_KEY,
    "/v1/models/{model:path}": ANY_KEY,
    "/v1/chat/completions": ("infer",),
    "/v1/completions": ("infer",),
    "/v1/embeddings": ("infer",),
    "/v1/feedback": ("feedback",),
    "/v1/router/decisions/{decision_id}": ("feedback", "operate"),
    "/v1/router/state": ("operate",),
    "/v1/router/versions": ("operate",),
    "/v1/router/versions/{version}": ("operate",),
    "/v1/router/versions/{version}/diff": ("operate",),
    "/v1/router/versions/{version}/evaluate": ("operate",),
    "/v1/router/versions/{version}/promote": ("operate",),
    "/v1/router/versions/{version}/restore": ("operate",),
    "/v1/router/versions/rollback": ("operate",),
    "/v1/router/erasures": ("operate",),
    "/v1/router/erasures/{erasure_id}": ("operate",),
    "/v1/router/exports": ("operate",),
    "/v1/router/rollout": ("operate",),
    "/v1/router/rollout/advance": ("operate",),
    "/v1/router/calibrations": ("operate",),
    "/v1/router/calibrations/answers": ("operate",),
    "/v1/router/calibrations/scores": ("operate",),
}
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH")
VALUES = {
    "{model:path}": "small",
    "{decision_id}": "dec-1",
    "{version}": "1",
    "{erasure_id}": "0123456789abcdef",
}
SUBSETS = [
    scopes
    for count in range(1, len(SCOPES) + 1)
    for scopes in itertools.combinations(SCOPES, count)
]


class Keyed(Locked):
    """A gateway with a key for each set of scopes, and no rate limit that a test could meet."""

    def __init__(self, folder: Path):
        unlimited = {
            "requests_per_minute": 10**6,
            "concurrency": 10**3,
            "scores_per_minute": 10**6,
        }
        super().__init__(folder, **unlimited)
        file = folder / "keys.json"
        self.by_scopes = {
            scopes: add(file, f"subset-{i}", scopes) for i, scopes in enumerate(SUBSETS)
        }
        right = self.by_scopes[SCOPES]
        _, key_id, secret = right.split("-", 2)
        self.wrong = {
            "no header": "",
            "no key": "Bearer ",
            "another scheme": f"Basic {right}",
            "no scheme": right,
            "a wrong secret": f"Bearer rk-{key_id}-{secret[:-1]}",
            "another key's secret": f"Bearer rk-00000000-{secret}",
            "no secret": f"Bearer rk-{key_id}-",
            "the hash": f"Bearer rk-{key_id}-{'0' * 64}",
            "two keys": f"Bearer {right} {right}",
        }


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    # the store reads the file once when it is made, so the keys are made first
    made = Keyed(tmp_path_factory.mktemp("keys"))
    with made.client:
        yield made


def routes(keyed: Keyed) -> set[str]:
    """The paths of all routes of the application."""
    app = keyed.ingress.__serve_build_asgi_app__()
    return {str(getattr(route, "path", route)) for route in app.routes}


def filled(path: str) -> str:
    """The path with values for its parameters."""
    for name, value in VALUES.items():
        path = path.replace(name, value)
    assert "{" not in path, "give the parameter of the new route a value in VALUES"
    return path


def wrong_of(status: int, given: tuple[str, ...] | None, path: str) -> bool:
    """Whether this status is wrong for a key with the scopes `given`; None for a key that is not valid."""
    needed = ALLOWED[path]
    if needed is OPEN:
        return status in (401, 403)
    if given is None:
        return status != 401
    if not set(given) & set(needed):
        return status != 403
    return status in (401, 403)


def test_every_route_has_a_decision_about_its_scopes(keyed: Keyed) -> None:
    """ALLOWED and the application have the same routes."""
    assert routes(keyed) == set(ALLOWED)


def test_keys_times_routes_times_methods(keyed: Keyed) -> None:
    """A key without the scope gets a 403, no valid key a 401, and a key with the scope neither; always in one shape."""
    wrong = []
    seen: Counter[int] = Counter()
    given: list[tuple[str, tuple[str, ...] | None]] = [
        (f"Bearer {key}", scopes) for scopes, key in keyed.by_scopes.items()
    ]
    given += [(header, None) for header in keyed.wrong.values()]
    for path, method, (header, scopes) in itertools.product(
        sorted(routes(keyed)), METHODS, given
    ):
        headers = {"content-type": "application/json"}
        headers |= {"authorization": header} if header else {}
        answer = keyed.client.request(
            method,
            filled(path),
            headers=headers,
            content=b"{}" if method == "POST" else b"",
        )
        seen[answer.status_code] += 1
        refused = answer.status_code in (401, 403)
        if wrong_of(answer.status_code, scopes, path) or (
            refused and method != "HEAD" and not openai_shape(answer.json())
        ):
            wrong.append((method, path, header[:12], scopes, answer.status_code))
    assert sum(seen.values()) >= 300 and seen[200] and seen[401] and seen[403]
    assert not wrong, f"{len(wrong)} of {sum(seen.values())}: {wrong[:10]}"


@pytest.mark.parametrize(
    "spelling",
    [
        "{}/",
        "/{}",
        "{}//",
        "{}%2f",
        "{}?x=/healthz",
        "{};a",
        "{}%00",
        "/healthz/..{}",
        "/v1/models/..{}",
        "/v1/router/decisions/..{}",
        "{}/../../../healthz",
        "/./{}",
    ],
)
def test_no_other_spelling_of_a_path_passes_its_scope(
    keyed: Keyed, spelling: str
) -> None:
    """A key that may only ask never gets an operator's answer, however the path is written."""
    key = keyed.by_scopes["infer",]
    for path, needed in ALLOWED.items():
        if needed != ("operate",):
            continue
        written = [filled(path), filled(path).replace("/router", "%2frouter")]
        written += [filled(path).upper(), filled(path).replace("router", "r%6futer")]
        for form in written:
            for header in ({}, {"authorization": f"Bearer {key}"}):
                answer = keyed.client.get(
                    f"http://testserver{spelling.format(form)}",
                    headers=header,
                    follow_redirects=False,
                )
                passed = answer.status_code == 200 and "healthz" not in spelling
                assert not passed, f"{spelling.format(form)}: {answer.text[:200]}"
