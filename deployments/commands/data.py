"""The commands for stored data: backup and restore of an instance, erasure and export of a person's data."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from deployments.commands.restore_version import (
    REFUSED,
    URL,
    WRONG_LINE,
    Url,
    ask,
    client_of,
    fail,
)
from deployments.operations.backup import MLFLOW, BackupError, Sources
from deployments.operations.backup import backup as back_up
from deployments.operations.backup import restore as restore_backup
from deployments.tracking.mlflow_runs import compact

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 2.0
WAIT_S = 60.0  # for MLflow, unless the option says otherwise

app = typer.Typer(
    help="Backup, restore, erasure and export of stored data.", no_args_is_help=True
)

Config = Annotated[Path, typer.Option(help="serve_config.yaml of the instance.")]
State = Annotated[Path, typer.Option(help="Folder of the instance.")]
Key = Annotated[str | None, typer.Option(help="Name of an API key.")]
User = Annotated[
    str | None,
    typer.Option(help="A client's `user` or `safety_identifier`."),
]


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    config: Config = ROOT / "serve_config.yaml",
    state: State = ROOT / "var",
    keys: Annotated[
        Path | None,
        typer.Option(help="File of the API keys, as given to `make serve`."),
    ] = None,
) -> None:
    """Copy journal, policy versions, API keys and configuration while the system runs."""
    try:
        for line in back_up(Sources.of(config, state, keys), target):
            typer.echo(line)
    except BackupError as error:
        fail(str(error))


@app.command()
def restore(
    source: Annotated[Path, typer.Argument(help="The folder of a backup.")],
    state: State = ROOT / "var",
    journal: Annotated[
        str, typer.Option(help="URL of an empty PostgreSQL database.")
    ] = "",
) -> None:
    """Restore a backup into an empty folder; the system must not run."""
    try:
        for line in restore_backup(source, state, journal):
            typer.echo(line)
    except BackupError as error:
        fail(str(error))


@app.command()
def erase(
    key: Key = None,
    user: User = None,
    state: State = ROOT / "var",
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for MLflow; 0 does not wait.")
    ] = WAIT_S,
    url: Url = URL,
) -> None:
    """Erase everything that is stored of an API key or of a user; exit code 1 while MLflow is not done."""
    with client_of(url) as client:
        erasure = ask(client, "POST", "/v1/router/erasures", _person(key, user)).json()
        ends_s = time.monotonic() + wait
        while erasure["state"] not in ("done", "interrupted") and (
            time.monotonic() < ends_s
        ):
            time.sleep(POLL_S)
            path = f"/v1/router/erasures/{erasure['id']}"
            erasure = ask(client, "GET", path).json()
    # the server of MLflow leaves what it deletes in the free pages of its database
    compact(f"sqlite:///{state.resolve() / MLFLOW}")
    typer.echo(json.dumps(erasure, indent=2))
    if erasure["state"] != "done":
        raise typer.Exit(REFUSED)


@app.command()
def export(
    key: Key = None,
    user: User = None,
    output: Annotated[
        Path | None, typer.Option(help="A new file; by default standard output.")
    ] = None,
    url: Url = URL,
) -> None:
    """Write everything that is stored of an API key or of a user, as lines of JSON."""
    person = _person(key, user)
    with client_of(url) as client:
        text = ask(client, "POST", "/v1/router/exports", person).text
    if output is None:
        sys.stdout.write(text)
        return
    try:
        made = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        fail(f"{output} cannot be written ({error.strerror}); name a new file")
    with os.fdopen(made, "w") as file:
        file.write(text)
    typer.echo(f"{len(text.splitlines())} lines are in {output}")


def _person(key: str | None, user: str | None) -> dict[str, str]:
    """The body of a request about a person."""
    if (key is None) == (user is None):
        fail("say whose data: give either --key or --user", WRONG_LINE)
    return {"key": key} if key is not None else {"user": str(user)}
