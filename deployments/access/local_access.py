"""Access to a gateway without API keys: only programs of this machine, and no web page of another site.

A web page in a browser of this machine can send requests to loopback. Such a request names another host (DNS rebinding)
or another origin.
"""

from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.types import Scope

from deployments.errors import ApiError
from deployments.runtime import LOOPBACK

PROXY_HEADERS = (
    b"x-forwarded-for",
    b"forwarded",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-real-ip",
    b"via",
)
# what lets a gateway take requests of others
USE_KEYS = "make a key (`router keys add NAME`) and start it with `router up --keys var/keys.json`"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing


def check_local(scope: Scope, origins: Collection[str] = ()) -> None:
    """Refuse a request that did not come directly from a program of this machine.

    Args:
        scope: of the request.
        origins: of web pages that may use the gateway (`cors_origins`).

    Raises:
        ApiError: 403.
    """
    _refuse_proxied(scope)
    for host in _values(scope, b"host"):
        if not _is_loopback(f"//{host}"):
            message = (
                f"this gateway has no API keys and answers to the hosts {', '.join(LOOPBACK)} only, not to "
                f"'{host[:100]}'; ask it at one of these, or {USE_KEYS}"
            )
            raise ApiError(403, message, code="host_not_allowed")
    if scope["method"] not in SAFE_METHODS:
        _refuse_cross_site(scope, origins)


def _refuse_proxied(scope: Scope) -> None:
    """Refuse a request that came through a proxy, because its client may be anywhere."""
    given = {name.lower() for name, _ in scope["headers"]}
    for name in PROXY_HEADERS:
        if name in given:
            message = (
                "this gateway has no API keys and takes no requests from a proxy "
                f"(header '{name.decode()}'); {USE_KEYS}, or ask it directly on loopback"
            )
            raise ApiError(403, message, code="no_keys_behind_a_proxy")


def _refuse_cross_site(scope: Scope, origins: Collection[str]) -> None:
    """Refuse a request of another site's web page. Programs send neither of the two headers."""
    given = _values(scope, b"origin")
    if given and all(origin in origins for origin in given):
        return
    foreign = [origin for origin in given if not _is_loopback(origin)]
    if foreign or "cross-site" in _values(scope, b"sec-fetch-site"):
        message = (
            "this gateway has no API keys and takes no requests from web pages of other sites; list the page's "
            f"origin under cors_origins, or {USE_KEYS}"
        )
        raise ApiError(403, message, code="cross_site")


def _values(scope: Scope, wanted: bytes) -> Sequence[str]:
    """The values of a header, in lower case."""
    return [
        value.decode("latin-1").strip().lower()
        for name, value in scope["headers"]
        if name.lower() == wanted
    ]


def _is_loopback(url: str) -> bool:
    """Whether a URL names this machine, at any port."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for a port that is none
    except ValueError:
        return False
    plain = parts.username is None and not (parts.path or parts.query or parts.fragment)
    return plain and parts.hostname in LOOPBACK
