"""The pages of the documentation, and the commands and paths that they mention."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
# records of what was run at their time; their commands need not exist any more
RECORDS = ("benchmarks/LOG.md", "deploy/FAULTS.md", "CHANGELOG.md")
SHELL = ("", "sh", "bash", "console")
# commands that are found in the middle of a text, too
PROGRAMS = ("make", "router", "python", "pytest", "serve", "kubectl", "docker")
ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the caption of a MyST directive, and its text."""

    language: str
    caption: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a page, without the assignments of variables before it.

    words: the program, without its folder, and its arguments.
    page: where it is.
    complete: False for a mention in the middle of a text, which may leave out required arguments.
    """

    words: tuple[str, ...]
    page: str
    complete: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


@dataclass(frozen=True)
class Page:
    """One page in Markdown; `name` is its path in the repository."""

    name: str

    @cached_property
    def text(self) -> str:
        """The whole page."""
        return (ROOT / self.name).read_text()

    @cached_property
    def blocks(self) -> list[Block]:
        """The fenced blocks."""
        return [_block(token) for token in self._tokens if token.type == "fence"]

    @cached_property
    def spans(self) -> list[str]:
        """The code in the middle of the text, with single spaces."""
        return [
            " ".join(child.content.split())
            for token in self._tokens
            for child in token.children or ()
            if child.type == "code_inline"
        ]

    @cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt().enable("table").parse(self.text)

    def commands(self) -> Iterator[Command]:
        """The commands in blocks of shell code, and those in the text."""
        for block in self.blocks:
            if block.language in SHELL and not block.text.startswith("pyproject.toml"):
                for words in _parsed(block.text):
                    yield Command(words, self.name, complete=True)
        for span in self.spans:
            for words in _parsed(span):
                if words[0] in PROGRAMS and len(words) > 1:
                    yield Command(words, self.name, complete=False)


def pages() -> list[Page]:
    """All pages of the documentation, but for records of measurements and generated pages."""
    paths = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
    ]
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return [
        Page(name)
        for name in names
        if name not in RECORDS and not name.startswith("docs/generated")
    ]


def _block(token: Token) -> Block:
    language, lines = token.info.strip(), token.content.split("\n")
    caption = ""
    if language.startswith("{"):
        _, _, language = language.partition("}")
        while lines and lines[0].startswith(":"):
            option = lines.pop(0)
            if option.startswith(":caption:"):
                caption = option.removeprefix(":caption:").strip().strip('"')
        if not language.strip():
            language = token.info.strip()  # another directive than code
    return Block(language.strip(), caption, "\n".join(lines))


def _parsed(text: str) -> Iterator[tuple[str, ...]]:
    """The commands of a shell text."""
    for line in text.replace("\\\n", " ").split("\n"):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a text with an apostrophe
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", ";", "|", "||"):
                if found := _stripped(command):
                    yield found
                command = []
            else:
                command.append(word)


def _stripped(words: list[str]) -> tuple[str, ...]:
    while words and ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    if not words:
        return ()
    program = words[0].removeprefix(".venv/bin/")
    return (program, *words[1:])
