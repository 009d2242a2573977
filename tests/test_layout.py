"""The layout of the project: imports, rooms, the map in the documentation, and plain English in the code."""

import io
import re
import subprocess
import sys
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("policies", "deployments", "benchmarks", "notebooks", "assets")
LONG = 400  # lines of a file; a longer one often has a second purpose
FULL = 9  # files of a room
FORBIDDEN = (ROOT / "tests/words.txt").read_text().split("\n")
PHRASES = [re.escape(words).replace(r"\ ", r"\s+") for words in FORBIDDEN if words]
FORBIDDEN_WORDS = re.compile(rf"(?<![\w-])({'|'.join(PHRASES)})(?![\w-])", re.I)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "policies").rglob("*.py")
    if path.stem != "__init__"
)
ALLOWED = {"policies", "numpy", "numba", "msgspec", "cython_runtime"}
OF_MSGSPEC = {"typing_extensions"}
OF_NUMBA = {"llvmlite", "scipy", "yaml", "cffi", "pycparser", "charset_normalizer"}


def sources(*houses: str) -> dict[str, str]:
    """The text of every Python file, by its path."""
    paths = [path for house in houses for path in (ROOT / house).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def rooms(house: str) -> list[Path]:
    """The folders of a house that have modules."""
    return sorted({path.parent for path in (ROOT / house).glob("*/*.py")})


@pytest.mark.parametrize("module", MODULES)
def test_policies_import_numpy_numba_msgspec_and_the_standard_library_only(
    module: str,
) -> None:
    """A module of policies/ never loads ray, fastapi, mlflow, sqlalchemy, pydantic or deployments."""
    code = f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    roots = {name.partition(".")[0] for name in result.stdout.split()}
    allowed = ALLOWED | OF_MSGSPEC | set(sys.stdlib_module_names)
    if "numba" in roots:
        allowed |= OF_NUMBA
    assert {name for name in roots if not name.startswith("_")} <= allowed


def test_mlflow_is_imported_in_four_files() -> None:
    """Only the runs, the traces, the registry of policy versions and the notebook's report import mlflow."""
    guilty = {
        path
        for path, text in sources(*HOUSES).items()
        if any(
            line.strip().startswith(("import mlflow", "from mlflow"))
            for line in text.splitlines()
        )
    }
    assert guilty == {
        "deployments/tracking/mlflow_runs.py",
        "deployments/tracking/model_registry.py",
        "deployments/tracking/traces.py",
        "notebooks/report.py",
    }


def test_only_app_wraps_and_binds_deployments() -> None:
    """deployments/app.py contains the whole wiring."""
    guilty = {
        path
        for path, text in sources("deployments").items()
        if "serve.deployment(" in text or ").bind(" in text
    }
    assert guilty == {"deployments/app.py"}


def test_init_files_reexport_nothing() -> None:
    """An `__init__.py` contains no import, so every import path names a leaf module."""
    for path, text in sources(*HOUSES).items():
        if path.endswith("__init__.py"):
            assert "import" not in text.replace("imports", ""), path


def test_every_room_has_a_docstring() -> None:
    """The `__init__.py` of each room says in one line what the room is for."""
    for house in ("policies", "deployments", "benchmarks"):
        for room in rooms(house):
            assert (room / "__init__.py").read_text().startswith('"""'), room


def test_the_map_names_every_room_and_every_file_outside_of_one() -> None:
    """The map in docs/architecture.md has exactly the rooms and the files outside of a room."""
    page = (ROOT / "docs/architecture.md").read_text()
    start = page.index("```\npyproject.toml") + 4
    tree = page[start : page.index("```\n", start)]
    named = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    files = {
        path.name
        for house in HOUSES
        if house != "assets"
        for path in (ROOT / house).glob("*")
        if path.suffix in (".py", ".ipynb") and path.name != "__init__.py"
    }
    folders = {f"{room.name}/" for house in HOUSES for room in rooms(house)}
    assert named == files | folders, named ^ (files | folders)


def test_a_room_has_about_nine_files() -> None:
    """A room with many more files should be split."""
    for house in ("policies", "deployments", "benchmarks"):
        for room in rooms(house):
            files = [path for path in room.glob("*.py") if path.stem != "__init__"]
            assert len(files) <= FULL + 2, room


def test_a_long_file_is_reported() -> None:
    """A long file causes a warning and no failure, since some nouns need many lines."""
    for path, text in sources(*HOUSES, "tests").items():
        lines = len(text.splitlines())
        if lines > LONG:
            warnings.warn(UserWarning(f"{path} has {lines} lines"), stacklevel=1)


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Comments and strings of a Python file, each with the number of its first line."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def test_comments_docstrings_and_messages_avoid_forbidden_words() -> None:
    """tests/words.txt lists words that hide the subject of a sentence or avoid the technical term."""
    found = []
    for path, text in sources(*HOUSES, "tests").items():
        for line, words in prose(text):
            for match in FORBIDDEN_WORDS.finditer(words):
                number = line + words.count("\n", 0, match.start())
                phrase = " ".join(match.group().split())
                found.append(f"{path}:{number}: {phrase}")
    assert not found, "\n".join(found)
