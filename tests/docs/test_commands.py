"""Every command in the documentation exists, and takes the arguments that the documentation gives it."""

import ast
import json
import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.documents import ROOT, Command, pages
from tests.support.gateway import Gateway

COMMANDS = sorted({c for page in pages() for c in page.commands()}, key=str)
# modules that need an extra, which is not installed for tests
WITH_EXTRA = ("assets.accuracy", "assets.distill", "assets.train")
OTHER_MODULES = ("pip", "pytest")
# programs that are not of this project; their arguments that are files of this repository must exist
FOREIGN = (
    ".",
    "cp",
    "docker",
    "echo",
    "export",
    "git",
    "haproxy",
    "jq",
    "kubectl",
    "mlflow",
    "pip",
    "pre-commit",
    "prometheus",
    "python3.11",
    "ray",
    "serve",
    "socat",
)
FILES = (".yaml", ".yml", ".lock", ".txt", ".cfg", ".toml")


def of(*programs: str) -> list[Any]:
    """The commands of these programs, as parameters of a test."""
    found = [c for c in COMMANDS if c.words[0] in programs]
    return [pytest.param(c, id=str(c)) for c in found]


def test_every_program_is_known() -> None:
    """A command of a program that no test below resolves is an error."""
    known = {*FOREIGN, "make", "router", "python", "pytest", "curl"}
    assert {c.words[0] for c in COMMANDS} - known == set()
    assert len(COMMANDS) > 100  # they were found at all


def test_make_has_every_target() -> None:
    """`make -n` knows each target with its variables."""
    unknown = []
    lines = {c.words[1:] for c in COMMANDS if c.words[0] == "make"}
    for arguments in sorted(lines):
        result = subprocess.run(
            ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        if result.returncode:
            unknown.append(f"make {shlex.join(arguments)}: {result.stderr.strip()}")
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("command", of("router"))
def test_router_has_the_subcommand_and_its_options(command: Command) -> None:
    """`router SUBCOMMAND OPTIONS --help` succeeds; the parser refuses unknown names before it shows the help."""
    from deployments.commands.main import app

    arguments = [word for word in command.words[1:] if word != "--help"]
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0, f"{command}: {result.output}"


@cache
def help_of(module: str) -> str:
    """What `python -m module --help` prints; the options in the source of a module that needs an extra."""
    if module in WITH_EXTRA:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        strings = ast.walk(ast.parse(source))
        return " ".join(str(n.value) for n in strings if isinstance(n, ast.Constant))
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=True,
    )
    return result.stdout


@pytest.mark.parametrize("command", of("python"))
def test_the_module_exists_and_has_the_options(command: Command) -> None:
    """`python -m module --help` works, and names each option that the documentation uses."""
    flag, *rest = command.words[1:]
    if not rest:  # `python -m` as such
        return
    if flag == "-c":
        compile(rest[0], str(command), "exec")
        return
    assert flag == "-m", f"{command}: only modules are run"
    module, *arguments = rest
    if module == "pytest":
        _check_pytest(command, arguments)
    elif module not in OTHER_MODULES:
        text = help_of(module)
        for option in arguments:
            if option.startswith("--"):
                name = option.partition("=")[0]
                assert name in text, f"{command}: no option {name}"


@pytest.mark.parametrize("command", of("pytest"))
def test_the_tests_exist(command: Command) -> None:
    """Paths of tests exist."""
    _check_pytest(command, list(command.words[1:]))


def _check_pytest(command: Command, arguments: list[str]) -> None:
    paths = [word for word in arguments if word.startswith("tests")]
    for path in paths:
        assert (ROOT / path.partition("::")[0]).exists(), f"{command}: no {path}"


@pytest.mark.parametrize("command", of(*FOREIGN))
def test_files_that_other_programs_get_exist(command: Command) -> None:
    """A file of this repository among the arguments exists."""
    for word in command.words[1:]:
        path = word.rpartition("=")[2]
        if path.endswith(FILES) and not path.startswith(("/", "$")):
            assert (ROOT / path).exists(), f"{command}: no {path}"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A gateway in this process, with one answered request; its decision is the one that the commands name."""
    made = Gateway(tmp_path_factory.mktemp("docs"))
    with made.client:
        yield made


@pytest.mark.parametrize("command", of("curl"))
def test_the_gateway_answers_the_request(command: Command, gateway: Any) -> None:
    """The request of a `curl` is run against a gateway, and gets no error."""
    words = list(command.words[1:])
    body = words[words.index("-d") + 1] if "-d" in words else None
    url = next(word for word in words if word.startswith("http://127.0.0.1:8000"))
    path = url.removeprefix("http://127.0.0.1:8000")
    decision = gateway.chat().headers["x-router-decision-id"]
    place = "PUT-THE-ID-HERE"
    if body is None:
        reply = gateway.client.get(path.replace(place, decision))
    else:
        content = json.loads(body.replace(place, decision))
        reply = gateway.client.post(path, json=content)
    assert reply.status_code < 300, f"{command}: {reply.text}"


def test_a_command_that_does_not_exist_is_found(tmp_path: Path) -> None:
    """The checks above fail for an unknown target, subcommand or option."""
    wrong = Command(("make", "no-such-target"), "here", complete=True)
    result = subprocess.run(
        ["make", "-n", *wrong.words[1:]], cwd=ROOT, capture_output=True
    )
    assert result.returncode
    for words in ("versions promot 12", "versions promote 12 --too shadow"):
        with pytest.raises(AssertionError, match="here: router versions promot"):
            test_router_has_the_subcommand_and_its_options(
                Command(("router", *words.split()), "here", complete=True)
            )
    with pytest.raises(AssertionError, match="--no-such"):
        test_the_module_exists_and_has_the_options(
            Command(
                ("python", "-m", "notebooks.report", "--no-such"), "here", complete=True
            )
        )
