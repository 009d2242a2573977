"""The house rules: who may import whom, and a README that knows every file."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in (ROOT / "policies").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_policies_import_numpy_numba_msgspec_and_the_standard_library_only(module: str) -> None:
    """No module of policies/ pulls in ray, fastapi, mlflow, sqlalchemy, pydantic or deployments."""
    code = f"import sys; before = set(sys.modules); import policies.{module}; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in result.stdout.split()}
    allowed = {"policies", "numpy", "numba", "msgspec", "cython_runtime"} | set(sys.stdlib_module_names)
    allowed.add("typing_extensions")  # which msgspec imports where it is there
    if "numba" in roots:
        allowed |= {
            "llvmlite",
            "scipy",
            "yaml",
            "cffi",
            "pycparser",
            "charset_normalizer",
        }  # which numba itself imports
    assert {name for name in roots if not name.startswith("_")} <= allowed


def test_mlflow_has_its_rooms() -> None:
    """Runs and traces in deployments/runs.py, versions in versions.py, the report in notebooks/report.py."""
    guilty = {
        path.name
        for folder in ("policies", "deployments", "benchmarks", "notebooks", "assets")
        for path in (ROOT / folder).glob("*.py")
        if any(line.strip().startswith(("import mlflow", "from mlflow")) for line in path.read_text().splitlines())
    }
    assert guilty == {"runs.py", "versions.py", "report.py"}


def test_only_app_says_deployment_and_bind() -> None:
    """The whole wiring is on one page."""
    guilty = {
        path.name
        for path in (ROOT / "deployments").glob("*.py")
        if "serve.deployment(" in path.read_text() or ").bind(" in path.read_text()
    }
    assert guilty == {"app.py"}


def test_init_files_reexport_nothing() -> None:
    """Import paths are leaf modules."""
    for path in ROOT.glob("*/__init__.py"):
        assert "import" not in path.read_text().replace("imports", ""), path


def test_readme_has_a_line_for_every_file() -> None:
    """The README's tree names each Python file and notebook, and no file that is gone."""
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("```\npyproject.toml") : readme.index("```\n", readme.index("```\npyproject.toml") + 4)]
    named = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    there = {
        path.name
        for folder in ("deployments", "policies", "assets", "benchmarks", "notebooks")
        for path in (ROOT / folder).glob("*")
        if path.suffix in (".py", ".ipynb") and path.name != "__init__.py"
    }
    assert there - named == set()
    assert {name for name in named if name.endswith((".py", ".ipynb"))} - there == set()


def test_no_file_is_longer_than_three_hundred_lines() -> None:
    """A longer file has a second noun in it."""
    long = {p.name for p in ROOT.glob("*/*.py") if ".venv" not in p.parts and len(p.read_text().splitlines()) > 400}
    assert long == set()
