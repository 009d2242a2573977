"""The command `router`: starts the system, shows how it does, and changes what it does."""

from typing import Annotated

import typer

from deployments.commands import data, experiments, keys, routing, system, versions
from deployments.commands.restore_version import restore_version
from deployments.paths import release

HELP = """Start the adaptive LLM router, see how it does, and change what it does.

`router up` starts the system of this folder, `router status` shows whether it is well. The commands for a running
system use the gateway's HTTP API: --url or ROUTER_URL says where it is, and ROUTER_API_KEY has a key with the scope
`operate`, if the gateway asks for keys. Commands that print data take --json.

\b
Exit codes:
  0  done; for `status`: the system is well
  1  refused, or not found; for `status`: a part is not ready; for `check`: the file is not valid
  2  the command line is wrong
  3  the gateway, or the system, does not run or does not answer
  4  the gate refused: the log does not prove that the version, or the next stage, is better

\b
Example:
  router up
  router status
  router versions list"""

app = typer.Typer(
    name="router",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def say_version(asked: bool) -> None:
    """Print the version of the package and end, if it was asked for."""
    if asked:
        print(release())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=say_version,
            is_eager=True,
            help="Print the version and end.",
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


app.command()(system.init)
app.command()(system.up)
app.command()(system.down)
app.command()(system.reload)
app.command()(system.status)
app.command()(system.check)
app.command()(routing.explain)
app.add_typer(routing.first_day, name="first-day")
versions.app.command(name="restore")(restore_version)
app.add_typer(versions.app, name="versions")
app.add_typer(keys.app, name="keys")
app.command()(experiments.calibrate)
app.command()(experiments.demo)
app.command(context_settings=experiments.PASS_ON)(experiments.report)
app.add_typer(data.app)  # without a name: its commands stand beside the others
