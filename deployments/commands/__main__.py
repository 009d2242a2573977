"""Starts the command `router` by `python -m deployments.commands`."""

from deployments.commands.main import app

app(prog_name="router")
