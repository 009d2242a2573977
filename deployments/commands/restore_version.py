"""The command that goes back to a policy version without some of the scores that arrived since."""

import json
import os
from contextlib import suppress
from typing import Annotated, NoReturn

import httpx
import typer

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 310.0
# exit codes: the gateway or the system refused, the command line is wrong, the gateway does not answer
REFUSED, WRONG_LINE, NO_ANSWER = 1, 2, 3

Url = Annotated[str, typer.Option(envvar="ROUTER_URL", help="Of the gateway.")]


def restore_version(
    version: Annotated[int, typer.Argument(min=1, help="A registered policy version.")],
    forget: Annotated[
        str,
        typer.Option(
            help="Forget the scores that arrived at this time or later: 2026-11-30T10:00Z (UTC without a zone), or "
            "seconds since the epoch."
        ),
    ],
    key: Annotated[
        str | None, typer.Option(help="Only the scores that this API key gave.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Recorded in the history.")] = "",
    url: Url = URL,
) -> None:
    """Go back to a version: the champion learns again all that happened since then, without some scores.

    `rollback` undoes it. ROUTER_API_KEY needs the scope `operate`.
    """
    since: str | float = forget
    with suppress(ValueError):
        since = float(forget)
    body = {"forget_since": since, "key": key, "reason": reason}
    with client_of(url) as client:
        answer = ask(client, "POST", f"/v1/router/versions/{version}/restore", body)
    typer.echo(json.dumps(answer.json(), indent=2))


def client_of(url: str) -> httpx.Client:
    """A client of the gateway with the key of ROUTER_API_KEY."""
    key = os.environ.get("ROUTER_API_KEY", "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)


def ask(
    client: httpx.Client, method: str, path: str, body: object = None
) -> httpx.Response:
    """The gateway's answer; without one, or if it refuses, the command ends with its message."""
    try:
        answer = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        fail(
            f"no answer from {client.base_url} ({type(error).__name__}); is it running?",
            NO_ANSWER,
        )
    if answer.is_error:
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"the gateway answered with status {answer.status_code}"
        fail(message)
    return answer


def fail(message: str, code: int = REFUSED) -> NoReturn:
    """End the command with a message and an exit code."""
    typer.echo(message, err=True)
    raise typer.Exit(code)
