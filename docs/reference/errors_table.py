"""The table of the error codes, from the places in deployments/ that make an error for a client."""

import ast
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs.reference.markdown import table

ROOT = Path(__file__).resolve().parents[2]
# position of status, message and code among the arguments of what makes an error
MAKERS = {
    "ApiError": (0, 1, 3),
    "ApiError.later": (0, 1, 3),
    "ModelError": (1, 0, 3),
}
ONLY_THEN = "…"  # stands for what is known at run time only
SAYS_WHY = "(what was refused, and why)"
CODE = re.compile(r"[a-z]+(_[a-z]+)*")
REFUSED = 409  # status of an exception whose class has a code: deployments/gateway/version_routes.py


@dataclass(frozen=True, order=True)
class ErrorCode:
    """One kind of error: its status, its code, and the message at one place that makes it."""

    status: int
    code: str
    message: str


def errors_page() -> str:
    """A table of all codes, by status."""
    first: dict[tuple[int, str], str] = {}
    for error in sorted(error_codes()):
        first.setdefault((error.status, error.code), error.message)
    return table(
        ("status", "code", "a message with it"),
        (
            (str(status), f"`{code}`", SAYS_WHY if text == ONLY_THEN else text)
            for (status, code), text in first.items()
        ),
    )


def error_codes() -> set[ErrorCode]:
    """All errors with a code."""
    found = set()
    for path in sorted((ROOT / "deployments").rglob("*.py")):
        module = _parse(path.read_text())
        found |= {*_errors_of(module), *_refusals_of(module)}
    return found


def _parse(source: str) -> ast.Module:
    """The syntax tree; a finalizer that parses, too, while the tree is made would confuse CPython 3.11."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if enabled:
            gc.enable()


def _errors_of(module: ast.Module) -> Iterator[ErrorCode]:
    constants = {**_imported(module), **_assignments(module)}
    for scope in ast.walk(module):
        if not isinstance(scope, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        known = {**constants, **_assignments(scope)}
        for node in _own_nodes(scope):
            arguments = _arguments(node)
            if arguments is None:
                continue
            status, message, code = (_text(part, known) for part in arguments)
            if status.isdigit() and CODE.fullmatch(code):
                yield ErrorCode(int(status), code, message)


def _refusals_of(module: ast.Module) -> Iterator[ErrorCode]:
    """The exceptions that have a code, with the first line of their docstring as message."""
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
            code = _text(_assignments(node).get("code"), {})
            if CODE.fullmatch(code):
                words = (ast.get_docstring(node) or "").split("\n")[0]
                yield ErrorCode(REFUSED, code, words)


def _imported(module: ast.Module) -> dict[str, ast.expr]:
    """The constants that a module takes from another one of deployments/."""
    found = {}
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "deployments."
        ):
            path = (ROOT / str(node.module).replace(".", "/")).with_suffix(".py")
            names = {name.name for name in node.names if name.name.isupper()}
            if names and path.exists():
                known = _assignments(_parse(path.read_text()))
                found |= {name: known[name] for name in names & known.keys()}
    return found


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or module, without those of the functions in it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _own_nodes(child)


def _assignments(scope: ast.AST) -> dict[str, ast.expr]:
    return {
        target.id: node.value
        for node in _own_nodes(scope)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _arguments(node: ast.AST) -> tuple[ast.expr | None, ...] | None:
    """Status, message and code of an expression that makes an error, or of a tuple with the arguments of one."""
    if isinstance(node, ast.Tuple) and len(node.elts) == 4:
        status, message, _, code = node.elts
        if isinstance(status, ast.Constant) and isinstance(status.value, int):
            return status, message, code
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in MAKERS:
        return None
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    places = zip(("status", "message", "code"), MAKERS[ast.unparse(node.func)])
    return tuple(
        node.args[place] if place < len(node.args) else keywords.get(name)
        for name, place in places
    )


def _text(node: ast.expr | None, known: dict[str, ast.expr]) -> str:
    """An expression as text; what is known only at run time becomes an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, known)
    if isinstance(node, ast.Name) and node.id in known:
        others = {name: value for name, value in known.items() if name != node.id}
        return _text(known[node.id], others)
    if isinstance(node, ast.IfExp):
        return _text(node.body, known)
    return ONLY_THEN if node is not None else ""
