"""The command that goes back to a policy version without some of the scores that arrived since."""

from contextlib import suppress
from typing import Annotated

import typer

from deployments.commands.gateway import URL, Url, ask
from deployments.commands.output import AsJson, example, show


@example("router versions restore 12 --forget 2026-11-30T10:00Z --key crawler")
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
    as_json: AsJson = False,
) -> None:
    """Go back to a version: the champion learns again all that happened since then, without some scores.

    `router versions rollback` undoes it.
    """
    since: str | float = forget
    with suppress(ValueError):
        since = float(forget)
    body = {"forget_since": since, "key": key, "reason": reason}
    reply = ask(url, "POST", f"/v1/router/versions/{version}/restore", json=body)
    whose = "all keys" if key is None else f"the key '{key}'"
    show(
        f"version {reply['version']} is the champion: version {version}, and all that happened since then without the "
        f"scores of {whose} since {forget}",
        reply,
        as_json,
    )
