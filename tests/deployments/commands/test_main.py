"""The command `router` as a whole: help, exit codes, and gateways that do not answer as they should."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import httpx
import pytest
from typer.core import TyperGroup
from typer.main import get_command

from deployments.commands.main import app
from tests.support.commands import invoke
from tests.support.gateway import ROOT

# nothing listens at port 9 of loopback
AWAY = "--url http://127.0.0.1:9"
ASKING = (
    "explain x",
    "first-day status",
    "first-day advance",
    "versions list",
    "versions show 1",
    "versions diff 1",
    "versions register",
    "versions evaluate 1",
    "versions promote 1",
    "versions rollback",
    "versions history",
)


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its words, as `versions list`."""
    for name, command in group.commands.items():
        words = f"{path} {name}".strip()
        if isinstance(command, TyperGroup):
            yield from commands(command, words)
        else:
            yield words, command


COMMANDS = dict(commands(get_command(app)))


def answering(status: int, content: Any) -> httpx.Client:
    """A client whose server always answers so."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=body))
    return httpx.Client(transport=transport, base_url="http://gateway")


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help_with_an_example(words: str) -> None:
    """The example is a command line that begins with the command itself."""
    result = invoke(None, f"{words} --help")
    assert result.exit_code == 0
    assert re.search(rf"Example:\n +router {words}\b", result.stdout), result.stdout
    assert "\b" not in result.stdout


def test_the_help_names_every_command_and_the_exit_codes() -> None:
    """`router` alone shows the same."""
    result = invoke(None, "--help")
    assert result.exit_code == 0
    for words in COMMANDS:
        assert re.search(rf"^  {words.split()[0]} ", result.stdout, re.M), words
    assert "Exit codes:" in result.stdout and "4  the gate refused" in result.stdout
    assert "Usage: " in invoke(None, "").output


def test_the_version_is_that_of_the_package() -> None:
    """In a checkout it is that of pyproject.toml, also if an older one was installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    result = invoke(None, "--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == project["project"]["version"]


def test_the_documentation_names_every_command() -> None:
    """docs/commands.md has a row for each, and the table of the exit codes."""
    text = (ROOT / "docs/commands.md").read_text()
    for words in COMMANDS:
        group, _, name = words.rpartition(" ")
        row = rf"\| `router {group} [^|]*\b{name}\b" if group else rf"`(router )?{name}"
        assert re.search(row, text), words
    for code in range(5):
        assert f"| {code} |" in text


def test_every_command_with_data_prints_json() -> None:
    """`init` and `report` make files, and `export` writes lines of JSON in any case."""
    without = {
        words
        for words, command in COMMANDS.items()
        if "--json" not in {name for p in command.params for name in p.opts}
    }
    assert without == {"init", "report", "export"}


def test_the_package_installs_the_command() -> None:
    """The entry point of pyproject.toml is the same application, and its package is part of the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    target = project["project"]["scripts"]["router"]
    assert EntryPoint("router", target, "console_scripts").load() is app
    included = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert f"{target.partition('.')[0]}*" in included


def test_python_m_starts_it() -> None:
    """The tests and the fault checks start the system in this way; the help does not need Ray or MLflow."""
    code = "import sys, deployments.commands.main; print(*{'ray', 'mlflow', 'numba', 'matplotlib'} & set(sys.modules))"
    for command in (["-m", "deployments.commands", "--help"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("line", ASKING)
def test_a_gateway_that_does_not_run_is_exit_code_3(line: str) -> None:
    """The message says where nothing answered; there is no traceback, and no JSON."""
    result = invoke(None, f"{line} {AWAY}")
    assert result.exit_code == 3 and result.stdout == ""
    assert "no answer from http://127.0.0.1:9" in result.stderr


@pytest.mark.parametrize("line", ASKING)
def test_the_url_may_come_from_the_environment(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ROUTER_URL is the default of --url."""
    monkeypatch.setenv("ROUTER_URL", "http://127.0.0.1:9/there")
    assert "http://127.0.0.1:9/there" in invoke(None, line).stderr


@pytest.mark.parametrize(
    ("status", "content", "code", "words"),
    [
        (
            404,
            {"error": {"message": "no such thing", "code": None}},
            1,
            "no such thing",
        ),
        (409, {"error": {"message": "no", "code": "refused"}}, 1, "no"),
        (409, {"error": {"message": "no proof", "code": "gate_refused"}}, 4, "proof"),
        (503, {"error": {"message": "later", "code": "unavailable"}}, 3, "later"),
        (401, {"error": {"message": "a key", "code": None}}, 1, "ROUTER_API_KEY"),
        (200, b"<html>", 3, "is it the gateway's URL?"),
        (404, b"<html>", 3, "is it the gateway's URL?"),
        (404, {"detail": "Not Found"}, 3, "is it the gateway's URL?"),
        (500, [1], 3, "is it the gateway's URL?"),
    ],
)
def test_each_refusal_has_its_exit_code(
    status: int, content: Any, code: int, words: str
) -> None:
    """The text of the gateway is what the user reads."""
    result = invoke(answering(status, content), "versions list")
    assert result.exit_code == code and words in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "versions show",
        "versions show 0",
        "versions show x",
        "versions promote 1 --to chief",
        "versions promote 1 --share 2",
        "versions promote 1 --override-gate",
        "first-day advance --override-gate",
        "versions register --options {",
        "versions register --options 3",
        "versions list --jsno",
        "no-such-command",
        "calibrate",
        "versions list --url nonsense",
    ],
)
def test_a_wrong_command_line_is_exit_code_2(line: str) -> None:
    """Nothing is asked."""
    result = invoke(None, line)
    assert result.exit_code == 2 and result.stderr
