"""Commands on the API keys: router keys add, list, remove, trust and distrust."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments.access import api_keys
from deployments.access.api_keys import FILE, SCOPES, Key
from deployments.commands.gateway import URL, GatewayError, Url, request
from deployments.commands.output import (
    DASH,
    AsJson,
    ExitCode,
    example,
    fail,
    iso,
    show,
    table,
)

STANDING_S = 2.0  # timeout of the question which keys are quarantined

app = typer.Typer(
    no_args_is_help=True,
    help=f"""Add, list and remove the API keys in a file. The running gateway reads a changed file within seconds.

The scopes are {", ".join(SCOPES)}.

\b
Example:
  router keys add ann --scopes infer,feedback
  router keys list""",
)

File = Annotated[Path, typer.Option("--file", help="The file of the keys.")]
Name = Annotated[str, typer.Argument(help="Of the key's owner; all keys of this name.")]
Limit = Annotated[int | None, typer.Option(help="Replaces the limit of the settings.")]


@app.command()
@example(
    "router keys add ann --scopes infer,feedback",
    "router keys add ops --scopes operate > ops.key",
)
def add(
    name: Annotated[str, typer.Argument(help="Of the key's owner.")],
    scopes: Annotated[
        str, typer.Option(help="What the key may do, separated by commas.")
    ] = "infer,feedback",
    file: File = FILE,
    requests_per_minute: Limit = None,
    concurrency: Limit = None,
    scores_per_minute: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. This is the only time that it is shown."""
    wanted = tuple(scope.strip() for scope in scopes.split(",") if scope.strip())
    limits = {
        "requests_per_minute": requests_per_minute,
        "concurrency": concurrency,
        "scores_per_minute": scores_per_minute,
    }
    try:
        key = api_keys.add(file, name, wanted, **limits)
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {file}: {error.strerror}")
    show(key, {"name": name, "scopes": wanted, "key": key}, as_json)
    typer.echo("this is the only time that it is shown", err=True)


@app.command("list")
@example("router keys list")
def list_keys(
    file: File = FILE,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """List the keys, without their secrets.

    The gateway is asked when each key was last used, and whether it is quarantined; without an answer (it needs the
    scope `operate`) there is a dash.
    """
    try:
        keys = list(api_keys.read(file).values())
    except ValueError as error:
        fail(str(error))
    state = _state(url) if keys else {}
    rows, plain = [], []
    for key in keys:
        standing = _standing(key, state)
        last_used_s = state.get("last_used_s", {}).get(key.name)
        rows.append(
            (
                key.name,
                f"rk-{key.id}-…",
                ", ".join(key.scopes),
                _limits(key),
                iso(key.created_s),
                iso(last_used_s),
                standing,
            )
        )
        known = {k: v for k, v in asdict(key).items() if k != "sha256"}
        plain.append({**known, "last_used_s": last_used_s, "standing": standing})
    header = ("name", "key", "scopes", "limits", "created", "last use", "scores")
    empty = f"no keys yet in {file}; create one with `router keys add NAME`"
    show(table(header, rows, empty), {"keys": plain}, as_json)


@app.command()
@example("router keys remove ann")
def remove(name: Name, file: File = FILE, as_json: AsJson = False) -> None:
    """Remove all keys of a name."""
    try:
        count = api_keys.remove(file, name)
    except ValueError as error:
        fail(str(error))
    show(f"removed {_counted(count)} of {name}", {"removed": count}, as_json)


@app.command()
@example("router keys trust ann")
def trust(name: Name, file: File = FILE, as_json: AsJson = False) -> None:
    """Count the scores of a key even if they contradict those of other keys; its next score ends a quarantine."""
    _set_trust(file, name, True, as_json)


@app.command()
@example("router keys distrust ann")
def distrust(name: Name, file: File = FILE, as_json: AsJson = False) -> None:
    """Compare the scores of a key with those of other keys again, as those of every key that is not trusted."""
    _set_trust(file, name, False, as_json)


def _set_trust(file: Path, name: str, trusted: bool, as_json: bool) -> None:
    try:
        count = api_keys.set_trust(file, name, trusted)
    except ValueError as error:
        fail(str(error))
    words = "trusted" if trusted else "not trusted any more"
    show(
        f"{_counted(count)} of {name}: {words}",
        {"changed": count, "trusted": trusted},
        as_json,
    )


def _state(url: str) -> dict[str, Any]:
    """The router's state; nothing if the gateway cannot be asked."""
    try:
        return request(url, "GET", "/v1/router/state", timeout_s=STANDING_S)
    except GatewayError as error:
        if error.code is ExitCode.USAGE:
            fail(str(error), error.code)
        return {}


def _standing(key: Key, state: dict[str, Any]) -> str:
    """Whether the scores of a key count."""
    if key.trusted:
        return "trusted"
    if "quarantined" not in state:
        return DASH
    if key.name in state["quarantined"]:
        return "quarantined"
    return "in doubt" if key.name in state["in_doubt"] else "count"


def _limits(key: Key) -> str:
    """The limits that replace those of the settings."""
    given = {
        "requests/min": key.requests_per_minute,
        "at once": key.concurrency,
        "scores/min": key.scores_per_minute,
    }
    return ", ".join(f"{value} {unit}" for unit, value in given.items() if value)


def _counted(count: int) -> str:
    return f"{count} key" if count == 1 else f"{count} keys"
