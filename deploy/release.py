"""Checks and builds a release into dist/ and publishes nothing: `make release`, `python deploy/release.py STEP ...`."""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)((a|b|rc)\d+)?")


class ReleaseError(Exception):
    """A step found a reason not to release; the message says what to change."""


def version(root: Path = ROOT) -> str:
    """The version of pyproject.toml.

    Raises:
        ReleaseError: it is no version, or CHANGELOG.md has no dated section for it.
    """
    found: str = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "version"
    ]
    if VERSION.fullmatch(found) is None:
        raise ReleaseError(
            f"pyproject.toml: '{found}' is no version; write it as 0.1.0 or 0.1.0rc1"
        )
    heading = re.compile(rf"^## \[{re.escape(found)}\] - \d{{4}}-\d\d-\d\d$", re.M)
    if heading.search((root / "CHANGELOG.md").read_text()) is None:
        raise ReleaseError(
            f"CHANGELOG.md has no section '## [{found}] - YYYY-MM-DD'; give 'Unreleased' this heading, with the date"
        )
    return found


def check_version() -> None:
    """The version is new: no tag has it."""
    tag = f"v{version()}"
    if _output("git", "tag", "--list", tag):
        raise ReleaseError(f"the tag {tag} exists; raise the version in pyproject.toml")


def check_tree() -> None:
    """Everything is committed."""
    changed = _output("git", "status", "--porcelain")
    if changed:
        raise ReleaseError(
            f"the working tree is not clean; commit or remove:\n{changed}"
        )


def lint() -> None:
    """Style, types and imports."""
    _run("make", "lint")


def documentation() -> None:
    """The documentation is built without a warning, and its commands exist."""
    _run("make", "docs")
    _run(sys.executable, "-m", "pytest", "-q", "tests/docs", "tests/test_layout.py")


def wheel() -> None:
    """The wheel, without its dependencies."""
    # setuptools would also pack what an earlier build has left
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    DIST.mkdir(exist_ok=True)
    _run(
        *(sys.executable, "-m", "pip", "wheel", ".", "--no-deps"),
        *("--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(DIST)),
    )
    shutil.rmtree(ROOT / "build", ignore_errors=True)


def sbom() -> None:
    """The list of all installed packages with their licences, in CycloneDX's format."""
    DIST.mkdir(exist_ok=True)
    program = Path(sys.executable).with_name("cyclonedx-py")
    if not program.exists():
        raise ReleaseError("cyclonedx-py is missing; run `make .venv/tools` first")
    file = DIST / "sbom.cdx.json"
    _run(
        *(str(program), "environment", "--pyproject", "pyproject.toml"),
        *("--output-reproducible", "--of", "JSON", "-o", str(file), sys.executable),
    )


def image() -> None:
    """The image of the CPU default, where docker is installed and runs."""
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "info"], capture_output=True).returncode
    ):
        print("image: left out, because docker is not running here")
        return
    name = f"adaptive-llm-router:{version()}"
    _run(docker, "build", "-f", "deploy/Dockerfile", "-t", name, ".")


STEPS: dict[str, Callable[[], None]] = {
    "version": check_version,
    "tree": check_tree,
    "lint": lint,
    "docs": documentation,
    "wheel": wheel,
    "sbom": sbom,
    "image": image,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the named steps, or all of them in their order; the first that fails ends the release."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    steps = parser.parse_args(arguments).steps or list(STEPS)
    unknown = [step for step in steps if step not in STEPS]
    if unknown:
        parser.error(f"no step {unknown[0]}; choose from: {', '.join(STEPS)}")
    for step in steps:
        print(f"{step}: {(STEPS[step].__doc__ or '').strip().splitlines()[0]}")
        try:
            STEPS[step]()
        except ReleaseError as error:
            raise SystemExit(f"{step}: {error}") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"{step}: `{' '.join(error.cmd)}` failed; see above"
            ) from None


def _run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def _output(*command: str) -> str:
    result = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


if __name__ == "__main__":
    main()
