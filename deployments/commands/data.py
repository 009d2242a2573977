"""Commands on the data of a system: backup, restore, erase and export."""

import typer

app = typer.Typer()
