"""Runs the command `router` in this process, against a gateway in this process."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import httpx
from typer.testing import CliRunner, Result

from deployments.commands.main import app


def invoke(client: httpx.Client | None, line: str, *more: str) -> Result:
    """Run a command line.

    Args:
        client: of the gateway that is asked, whatever the URL; None for real connections.
        line: the arguments, as in a shell.
        more: further arguments, with spaces and quotes as they are.
    """
    arguments = [*shlex.split(line), *more]
    runner = CliRunner()
    if client is None:
        return runner.invoke(app, arguments, catch_exceptions=False)

    @contextmanager
    def connect(*_: object) -> Iterator[httpx.Client]:
        assert client is not None
        yield client

    with mock.patch("deployments.commands.gateway.connect", connect):
        return runner.invoke(app, arguments, catch_exceptions=False)


def data_of(client: httpx.Client, line: str, *more: str) -> Any:
    """What a command that succeeds prints as JSON."""
    result = invoke(client, line, *more, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal_of(client: httpx.Client, line: str, *more: str) -> str:
    """What a command that is refused says, by the gate or otherwise."""
    result = invoke(client, line, *more)
    assert result.exit_code in (1, 4), result.output
    assert not result.stdout, result.stdout
    return result.stderr
