"""The commands for stored data: backup and restore of an instance, erasure and export of a person's data."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from deployments.commands.gateway import URL, Url, ask, ask_text
from deployments.commands.output import AsJson, ExitCode, example, fail, show
from deployments.commands.system import CONFIG, STATE
from deployments.operations.backup import MLFLOW, BackupError, Sources
from deployments.operations.backup import backup as back_up
from deployments.operations.backup import restore as restore_backup
from deployments.privacy.free_pages import compact

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
@example("router backup /backups/2026-11-30 --keys var/keys.json")
def backup(
    target: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    config: Config = CONFIG,
    state: State = STATE,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of the API keys, as given to `router up`."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy journal, policy versions, API keys and configuration while the system runs."""
    try:
        said = back_up(Sources.of(config, state, keys), target)
    except BackupError as error:
        fail(str(error))
    show("\n".join(said), {"backup": str(target.resolve()), "parts": said}, as_json)


@app.command()
@example("router restore /backups/2026-11-30 --state var")
def restore(
    source: Annotated[Path, typer.Argument(help="The folder of a backup.")],
    state: State = STATE,
    journal: Annotated[
        str, typer.Option(help="URL of an empty PostgreSQL database.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Restore a backup into an empty folder; the system must not run."""
    try:
        said = restore_backup(source, state, journal)
    except BackupError as error:
        fail(str(error))
    show("\n".join(said), {"state": str(state.resolve()), "parts": said}, as_json)


@app.command()
@example("router erase --user zoe@example.com")
def erase(
    key: Key = None,
    user: User = None,
    state: State = STATE,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for MLflow; 0 does not wait.")
    ] = WAIT_S,
    url: Url = URL,
    as_json: AsJson = False,
) -> None:
    """Erase everything that is stored of an API key or of a user; exit code 1 while MLflow is not done."""
    erasure = ask(url, "POST", "/v1/router/erasures", json=_person(key, user))
    ends_s = time.monotonic() + wait
    while erasure["state"] not in ("done", "interrupted") and time.monotonic() < ends_s:
        time.sleep(POLL_S)
        erasure = ask(url, "GET", f"/v1/router/erasures/{erasure['id']}")
    # the server of MLflow leaves what it deletes in the free pages of its database
    compact(f"sqlite:///{state.resolve() / MLFLOW}")
    words = (f"{name}: {value}" for name, value in erasure.items())
    show("\n".join(words), erasure, as_json)
    if erasure["state"] != "done":
        raise typer.Exit(ExitCode.REFUSED)


@app.command()
@example("router export --key crawler --output crawler.jsonl")
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
    text = ask_text(url, "POST", "/v1/router/exports", json=person)
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
        fail("say whose data: give either --key or --user", ExitCode.USAGE)
    return {"key": key} if key is not None else {"user": str(user)}
