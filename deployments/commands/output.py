"""What the commands print: tables, JSON, times in words, and messages that end a command with an exit code."""

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from tabulate import tabulate

from deployments.errors import NoAnswerError

DASH = "-"  # an unknown value in a table
UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))

Command = TypeVar("Command", bound=Callable[..., Any])
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class ExitCode(IntEnum):
    """How a command ended; `router --help` and docs/commands.md explain the codes."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    NO_ANSWER = 3
    GATE = 4


def fail(message: str, code: ExitCode = ExitCode.REFUSED) -> NoReturn:
    """End the command with a message on standard error."""
    typer.echo(message, err=True)
    raise typer.Exit(code)


def example(*lines: str) -> Callable[[Command], Command]:
    """Add an example to the help of a command, which is its docstring."""

    def add(command: Command) -> Command:
        shown = "\n".join(f"  {line}" for line in lines)
        # \b keeps the line breaks of the paragraph
        command.__doc__ = f"{inspect.getdoc(command)}\n\n\b\nExample:\n{shown}"
        return command

    return add


@contextmanager
def reported() -> Iterator[None]:
    """Turn the messages with which deployments/operations/ gives up into the end of the command."""
    try:
        yield
    except NoAnswerError as error:
        fail(str(error), ExitCode.NO_ANSWER)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        fail(error.code)


def show(text: str, data: object, as_json: bool) -> None:
    """Print the data as JSON if that is wanted, and otherwise the text."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False) if as_json else text)


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], empty: str = ""
) -> str:
    """A table of text; `empty` says in a sentence that there are no rows. None and "" are shown as a dash."""
    if not rows:
        return empty
    shown = [
        [DASH if cell is None or cell == "" else str(cell) for cell in row]
        for row in rows
    ]
    return str(tabulate(shown, header, tablefmt="simple", disable_numparse=True))


def iso(time_s: object) -> str:
    """A time of the epoch in ISO 8601, UTC; a dash for an unknown one."""
    if not isinstance(time_s, int | float):
        return DASH
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


def duration(seconds: float) -> str:
    """A length of time in words, as `2 h 5 min`; at most two units."""
    left = max(0.0, seconds)
    parts: list[str] = []
    for unit, length in UNITS:
        count = int(left // length)
        left -= count * length
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        if len(parts) == 2:
            break
    return " ".join(parts)


def percent(share: object) -> str:
    """A share in percent; a dash for an unknown one."""
    return f"{share:.1%}" if isinstance(share, int | float) else DASH


def in_words(options: object) -> str:
    """Options as `name=value, name=value`; "" if there are none."""
    if not isinstance(options, Mapping):
        return str(options)
    return ", ".join(f"{name}={value}" for name, value in options.items())
