"""Asks the gateway's HTTP API, and turns its refusals into exit codes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer

from deployments.commands.output import ExitCode, fail
from deployments.errors import GATE_REFUSED

URL = "http://127.0.0.1:8000"
KEY = "ROUTER_API_KEY"
TIMEOUT_S = 310.0  # an evaluation reads thousands of rows
Json = dict[str, Any]  # a reply of the gateway
Url = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="ROUTER_URL",
        help=f"The gateway. It takes an API key from {KEY}, if it asks for one.",
    ),
]


class GatewayError(Exception):
    """The gateway refused a request, or did not answer it.

    Args:
        message: what to tell the user.
        code: exit code of the command.
        status: of HTTP; 0 if there was no answer.
    """

    def __init__(self, message: str, code: ExitCode, status: int = 0):
        super().__init__(message)
        self.code = code
        self.status = status


@contextmanager
def connect(url: str, timeout_s: float = TIMEOUT_S) -> Iterator[httpx.Client]:
    """A client of the gateway."""
    with httpx.Client(base_url=url, timeout=timeout_s) as client:
        yield client


def key_headers() -> dict[str, str]:
    """The header with the API key of the environment; none without a key."""
    key = os.environ.get(KEY, "")
    return {"authorization": f"Bearer {key}"} if key else {}


def request(
    url: str, method: str, path: str, timeout_s: float = TIMEOUT_S, **options: Any
) -> Json:
    """A reply of the gateway.

    Raises:
        GatewayError: there is no answer, or a refusal.
    """
    answer = _answer(url, method, path, timeout_s, **options)
    content = _content(answer)
    if not isinstance(content, dict):
        raise _foreign(url, path, answer.status_code)
    return content


def _answer(
    url: str, method: str, path: str, timeout_s: float = TIMEOUT_S, **options: Any
) -> httpx.Response:
    """The gateway's successful answer.

    Raises:
        GatewayError: there is none, or a refusal.
    """
    try:
        with connect(url, timeout_s) as client:
            answer = client.request(method, path, headers=key_headers(), **options)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise GatewayError(
            f"{url} is no URL of a gateway, as {URL}: {error}", ExitCode.USAGE
        ) from None
    except httpx.HTTPError as error:
        message = f"no answer from {url} ({type(error).__name__}); is it running?"
        raise GatewayError(message, ExitCode.NO_ANSWER) from None
    if answer.is_success:
        return answer
    status = answer.status_code
    content = _content(answer)
    refusal = content.get("error") if isinstance(content, dict) else None
    if not isinstance(refusal, dict):
        raise _foreign(url, path, status)
    message = str(refusal.get("message"))
    if status == 401:
        message += f"; put it into the environment variable {KEY}"
    code = ExitCode.REFUSED
    if status >= 500:
        code = ExitCode.NO_ANSWER
    elif refusal.get("code") == GATE_REFUSED:
        code = ExitCode.GATE
    raise GatewayError(message, code, status)


def _content(answer: httpx.Response) -> object:
    """The JSON of an answer; None if it has none."""
    try:
        content: object = answer.json()
    except ValueError:
        return None
    return content


def _foreign(url: str, path: str, status: int) -> GatewayError:
    message = f"{url} answers {status} to {path}, not as this router does; is it the gateway's URL?"
    return GatewayError(message, ExitCode.NO_ANSWER, status)


def ask_text(url: str, method: str, path: str, **options: Any) -> str:
    """The text of a reply that is no JSON object; a refusal ends the command."""
    try:
        return _answer(url, method, path, **options).text
    except GatewayError as error:
        fail(str(error), error.code)


def ask(url: str, method: str, path: str, **options: Any) -> Json:
    """A reply of the gateway; a refusal ends the command."""
    try:
        return request(url, method, path, **options)
    except GatewayError as error:
        fail(str(error), error.code)
